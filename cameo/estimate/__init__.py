"""Will it fit? The memory and the FLOPs of a training step, computed without weights, data or a GPU."""

from cameo.estimate.report import dry_run
from cameo.estimate.step import StepEstimate, estimate_step

__all__ = ["StepEstimate", "dry_run", "estimate_step"]
