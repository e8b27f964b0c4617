"""What `--dry-run` prints: the expected peak memory and FLOPs of a step, their parts, and what would save some."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from cameo.estimate.building import OutlinedRun
from cameo.estimate.savings import Saving, savings
from cameo.estimate.step import StepEstimate, estimate_step
from cameo.tables import markdown_row, markdown_table
from cameo.training.settings import TrainingConfig

__all__ = ["DEVICES", "dry_run", "gigabytes", "report_lines"]

DEVICES = ("cpu", "cuda")


def dry_run(
    config: TrainingConfig, outline: Callable[[TrainingConfig], OutlinedRun], device: str | None = None
) -> None:
    """Print what a training step of these settings takes; builds no weights, reads no data, writes nothing.

    Args:
        config: settings of the run.
        outline: builds the run without its weights, see `estimate_step`.
        device: "cpu", or "cuda" for a GPU, which need not be there; None takes what this machine has.

    Raises:
        DataError: for weights on the Hub whose architecture is not known.
        ValueError: for another device, or settings that do not go together.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in DEVICES:
        raise ValueError(f"--dry-run={device}: expected {' or '.join(DEVICES)}, as in --dry-run=cuda")
    for line in report_lines(config, outline, device):
        print(line, flush=True)


def report_lines(
    config: TrainingConfig, outline: Callable[[TrainingConfig], OutlinedRun], device: str
) -> Iterator[str]:
    """Return the lines of the report, each as soon as it is known."""
    if config.mixed_precision == "fp16" and device == "cpu":
        raise ValueError("mixed_precision=fp16 needs a GPU, for which --dry-run=cuda is; on the CPU use bf16 or no")
    step = estimate_step(config, outline, device)
    yield _title(config, step, device)
    yield ""
    yield markdown_table(["parameters", "number"], [*step.parameters.items(), ("trained of them", step.num_trained)])
    yield ""
    yield markdown_table(["memory at the peak", "GB"], _parts(config, step))
    yield ""
    phases = [(name, gigabytes(peak), tera(step.flops[name])) for name, peak in step.peaks.items()]
    yield markdown_table(["phase of a step", "peak GB", "TFLOP"], phases)
    yield ""
    yield markdown_row(["with one setting changed", "peak GB", "saves GB", "TFLOP"])
    yield markdown_row(["---"] * 4)
    has_vae = any(name == "vae" for name in step.parameters)
    for saving in savings(config, outline, device, has_vae=has_vae):
        yield _saving(config, saving, step)
    yield ""
    yield from notes(config, device)


def gigabytes(size: float) -> str:
    """Write bytes in GB of 10 ** 9 bytes, with three figures.

    Example:
        >>> gigabytes(7_880_000_000), gigabytes(12_345_678), gigabytes(0)
        ('7.88', '0.0123', '0')
    """
    return f"{size / 1e9:.3g}"


def tera(flops: float) -> str:
    """Write floating-point operations in 10 ** 12, with three figures."""
    return f"{flops / 1e12:.3g}"


def notes(config: TrainingConfig, device: str) -> list[str]:
    """Return what is not counted, or counted in another way, for these settings."""
    found = []
    if device == "cuda":
        found.append(
            "Beside this a GPU holds its context, the workspaces of its libraries, and what its allocator keeps in "
            "pieces. The precisions are those of autocast on CUDA; no GPU was asked."
        )
    if config.layer == "auto":
        found.append("layer=auto: the default layer stands in for the one that probing would choose.")
    if config.loss_weight and (config.supervision == "repa" or config.correspondence in ("features", "matcher")):
        what = "REPA's projector and the" if config.supervision == "repa" else "the"
        found.append(f"Not counted: {what} network that reads the images for the supervision.")
    if config.uses_matches:
        found.append("The alignment loss counts as if each token had a match in every other view.")
    if config.alignment_implementation == "reference":
        found.append("alignment_implementation=reference holds all logits, which is not counted.")
    if config.torch_compile != "off":
        found.append("torch_compile fuses operators, which usually takes less than what is said here.")
    return found


def _title(config: TrainingConfig, step: StepEstimate, device: str) -> str:
    base = config.pretrained_model_name_or_path or f"preset {config.preset or 'tiny'}"
    where = "a GPU" if device == "cuda" else "a CPU; for a GPU --dry-run=cuda"
    trained = f"{step.num_trained / 1e6:.3g} million weights trained"
    return (
        f"Expected peak {gigabytes(_total(config, step))} GB in the phase {_phase(step)!r}, {tera(step.total_flops)} "
        f"TFLOP a step: {config.backbone}, {base}, {trained}, {config.num_views} views of "
        f"{config.resolution} px, batch {config.train_batch_size}, mixed_precision={config.mixed_precision}, on "
        f"{where}. Computed in {step.seconds:.0f} s without weights and data."
    )


def _phase(step: StepEstimate) -> str:
    return max(step.peaks, key=lambda name: step.peaks[name])


def _first_run(config: TrainingConfig, step: StepEstimate) -> int:
    """Return the bytes that the run without CAMEO leaves in memory, where both are compared."""
    kept = sum(size for kind, size in step.held.items() if kind != "batch")
    return kept if config.compare_without_cameo else 0


def _total(config: TrainingConfig, step: StepEstimate) -> int:
    return step.peak + _first_run(config, step)


def _parts(config: TrainingConfig, step: StepEstimate) -> list[tuple[str, str]]:
    parts = [(kind, gigabytes(size)) for kind, size in step.at_peak.items() if size]
    if first := _first_run(config, step):
        parts.append(("the run without CAMEO before it", gigabytes(first)))
    parts.append(("all", gigabytes(_total(config, step))))
    return [*parts, ("kept by the forward pass for the backward pass", gigabytes(step.kept))]


def _saving(config: TrainingConfig, saving: Saving, step: StepEstimate) -> str:
    if saving.step is None:
        return markdown_row([saving.setting, "-", saving.reason, "-"])
    total = _total(config, saving.step)
    saved = _total(config, step) - total
    return markdown_row([saving.setting, gigabytes(total), gigabytes(saved), tera(saving.step.total_flops)])
