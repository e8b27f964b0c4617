"""What `torch.compile` does to a training step with an alignment loss: graphs, differences and seconds.

    python -m benchmarks.step.compiled [--device cpu] [--again]

For the tiny transformer and the tiny U-Net of CAT3D with LoRA, with and without gradient checkpointing, each compiled
as a whole and by its repeated blocks with inductor. Steps with and without compilation run in turn, on the same inputs
and a new correspondence each time. Graphs are those that `torch.compile` made for steps with a correspondence.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.measuring import Results, interleaved, summary, table_of
from benchmarks.common.page import RESULTS
from cameo.attention.compiled.in_place import compile_in_place
from cameo.backbone import get_backbone, unwrap_peft
from cameo.correspondence import Correspondence
from cameo.training.settings import TrainingConfig
from cameo.training.setup import add_lora, load_pipeline, wrap_denoiser

PRESETS = {"transformer": ("transformer-tiny", 32), "U-Net": ("tiny", 32)}  # name: preset, pixels
WAYS = ("default", "regional")
CHECKED, REPEATS, SECONDS = 3, 15, 60.0


class Stepped:
    """A wrapped model with LoRA, compiled or not, and its training step on a correspondence."""

    def __init__(self, preset: str, pixels: int, checkpointing: bool, device: str, torch_compile: str) -> None:
        config = TrainingConfig(preset=preset, gradient_checkpointing=checkpointing, seed=0)
        pipeline = load_pipeline(config)
        add_lora(pipeline.denoiser, config)
        self.model = wrap_denoiser(pipeline, config).to(device).train()
        self.grid = self.model.token_grid(pixels, pixels)
        args, kwargs = get_backbone(config.backbone).example_inputs(self.model.base_model)
        self.args, self.kwargs = [arg.to(device) if torch.is_tensor(arg) else arg for arg in args], kwargs
        self.device, self.steps = device, 0
        base = self.model.base_model
        compile_in_place(base, unwrap_peft(base), torch_compile)

    def step(self) -> list[Tensor]:
        """Run forward and backward on the next correspondence; returns the losses and all gradients."""
        self.steps += 1
        torch.manual_seed(self.steps)
        tokens = self.grid[0] * self.grid[1]
        index = torch.randint(-1, tokens, (1, 2, 2, tokens))
        index[:, [0, 1], [0, 1]] = -1
        self.model.zero_grad()
        match = Correspondence(index.to(self.device), (self.grid,) * 2)
        output = self.model(*self.args, **self.kwargs, correspondence=match).sample
        denoising, alignment = output.square().mean(), self.model.alignment_loss
        (denoising + alignment).backward()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return [denoising.detach(), alignment.detach(), *(gradient.clone() for gradient in gradients)]


def measure(preset: str, pixels: int, checkpointing: bool, way: str, device: str) -> dict[str, Any]:
    """Graphs, largest difference from eager, and seconds of one model compiled in one way."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    eager, compiled = (Stepped(preset, pixels, checkpointing, device, choice) for choice in ("off", way))
    for stepped in (eager, compiled):
        stepped.step()  # the first one checks the attention, eagerly
    counters.clear()
    start = time.perf_counter()
    differences = [_largest_difference(eager.step(), compiled.step())]
    seconds_to_compile = time.perf_counter() - start
    graphs = counters["stats"]["unique_graphs"]
    differences += [_largest_difference(eager.step(), compiled.step()) for _ in range(CHECKED - 1)]
    runs: dict[str, Callable[[], object]] = {"eager": eager.step, "compiled": compiled.step}
    found = interleaved(runs, REPEATS, device, warm_up=1, budget=SECONDS)
    return {
        "graphs": graphs,
        "breaks": sum(counters["graph_break"].values()),
        "recompiles": counters["stats"]["unique_graphs"] - graphs,
        "loss_difference": max(loss for loss, _ in differences),
        "gradient_difference": max(gradient for _, gradient in differences),
        "first_step": seconds_to_compile,
        "steps": {name: summary(seconds) for name, seconds in found.items()},
    }


def _largest_difference(eager: list[Tensor], compiled: list[Tensor]) -> tuple[float, float]:
    """Largest relative difference of the losses, and of the gradients in the norm of all of them."""
    losses = [(theirs, ours) for theirs, ours in zip(eager[:2], compiled[:2], strict=True)]
    loss = max(float((theirs - ours).abs() / theirs.abs().clamp(min=1e-12)) for theirs, ours in losses)
    ours, theirs = (torch.cat([gradient.flatten() for gradient in found[2:]]) for found in (compiled, eager))
    return loss, float((ours - theirs).norm() / theirs.norm())


def table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per model and way."""
    return [
        {
            "model": name,
            "graphs": entry["graphs"],
            "breaks": entry["breaks"],
            "recompiles": entry["recompiles"],
            "loss differs by": entry["loss_difference"],
            "gradient differs by": entry["gradient_difference"],
            "first compiled step s": entry["first_step"],
            "eager s": entry["steps"]["eager"]["median"],
            "compiled s": entry["steps"]["compiled"]["median"],
            "eager / compiled": entry["steps"]["eager"]["median"] / entry["steps"]["compiled"]["median"],
        }
        for name, entry in found.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure what is not in the results file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--again", action="store_true", help="measure also what is in the results file")
    parser.add_argument("--output", type=Path, help="results file")
    options = parser.parse_args(arguments)
    path = options.output or RESULTS / f"compiled_step_{torch.device(options.device).type}.json"
    results = Results(path, options.device, again=options.again)
    for model, (preset, pixels) in PRESETS.items():
        for checkpointing in (False, True):
            for way in WAYS:
                name = f"{model}, {'checkpointing' if checkpointing else 'no checkpointing'}, {way}"
                results.get(name, partial(measure, preset, pixels, checkpointing, way, options.device))
    print(table_of(table(results.found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
