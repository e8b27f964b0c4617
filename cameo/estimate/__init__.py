"""Will it fit? The memory and the FLOPs of a training step, computed without weights, data or a GPU."""

from cameo.estimate.building import OutlinedRun
from cameo.estimate.report import dry_run
from cameo.estimate.step import StepEstimate, estimate_step

__all__ = ["OutlinedRun", "StepEstimate", "dry_run", "estimate_step"]
