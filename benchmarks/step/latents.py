"""Steps of a training whose VAE encodes in every step, against steps that read latents encoded before.

    OMP_NUM_THREADS=1 python -m benchmarks.step.latents --device cpu

The data are rendered rooms at 256 pixels, the denoiser and the VAE are those of Stable Diffusion in kind but narrower,
on fresh weights, so nothing is downloaded. A step loads its batch in this process, encodes it or reads its latents,
adds noise, finds the matches, runs forward and backward with the alignment and takes an AdamW step on a LoRA. All ways
start from the same weights and take turns on the same samples. What is in `benchmarks/results/latents_DEVICE.json` is
not measured again. `--resolution 64 --output tried.json` tries the script.

Besides the time on the clock, that of the processor is measured, which other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from benchmarks.common.measuring import Results, interleaved, summary, table_of
from benchmarks.common.page import RESULTS
from cameo.adapters.cat3d.cameras import CONDITION_CHANNELS
from cameo.adapters.cat3d.pipeline import Cat3DPipeline
from cameo.adapters.common.noise_schedules import ddim
from cameo.data.batches import match_layers
from cameo.latents.encode import latent_settings
from cameo.processes.accelerator import make_accelerator
from cameo.scenes.cache import fingerprint
from cameo.training.data import StepSampler, build_dataset, noisy_inputs, training_batches, with_latents
from cameo.training.settings import TrainingConfig
from cameo.training.setup import add_lora, wrap_denoiser

WAYS: dict[str, dict[str, Any]] = {
    "encoded in every step": {},
    "latents in float32": {"cache_latents": True, "latent_precision": "float32"},
    "latents in float16": {"cache_latents": True},
}
LIVE = next(iter(WAYS))
VAE_WIDTHS, WIDTHS = (32, 64, 128, 128), (64, 128, 256)
RESOLUTION, SCENES, VIEWS, REPEATS, SECONDS = 256, 4, 6, 10, 300.0


def pipeline() -> Cat3DPipeline:
    """A U-Net and a VAE of Stable Diffusion's kind with a quarter or a fifth of its widths."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=4 + CONDITION_CHANNELS,
        out_channels=4,
        block_out_channels=WIDTHS,
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=[width // 32 for width in WIDTHS],
        cross_attention_dim=32,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=VAE_WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * len(VAE_WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(VAE_WIDTHS),
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    return Cat3DPipeline(unet, ddim(prediction_type="v_prediction"), vae=vae.eval().requires_grad_(False))


class Trained:
    """A model with its data and optimizer, and the losses of the steps that it took."""

    def __init__(self, folder: Path, resolution: int, changes: Mapping[str, Any], stack: ExitStack) -> None:
        self.config = config = TrainingConfig(
            output_dir=str(folder),
            latents_dir=str(folder / "latents"),
            report_to="none",
            resolution=resolution,
            num_scenes=SCENES,
            views_per_scene=VIEWS,
            num_views=3,
            train_batch_size=1,
            max_overlap=0.95,
            **changes,
        )
        accelerator = make_accelerator(config)
        self.device = accelerator.device
        self.pipeline = pipeline()
        add_lora(self.pipeline.unet, config)
        self.pipeline.to(self.device)
        self.model = wrap_denoiser(self.pipeline, config).to(self.device).train()
        self.optimizer = torch.optim.AdamW([one for one in self.model.parameters() if one.requires_grad], lr=1e-4)
        dataset = build_dataset(config, "train")
        begin = time.process_time()
        samples = with_latents(dataset, dataset, self.pipeline, config, accelerator)
        self.encoding = time.process_time() - begin
        batches = training_batches(samples, StepSampler(start=0, stop=1000, batch_size=1), config, self.device)
        self.batches = stack.enter_context(batches)
        self.losses: list[tuple[float, float]] = []
        self.seconds: list[float] = []

    def step(self) -> None:
        """Take the next step, and keep its losses and the seconds of the processor."""
        begin = time.process_time()
        micro_step, batch = next(self.batches)
        inputs = noisy_inputs(self.pipeline, batch, self.config, micro_step)
        matches = match_layers(self.model.supervised_layers, batch)
        output = self.model(*inputs.args, correspondence=matches, **inputs.kwargs)
        denoising, alignment = self.pipeline.denoising_loss(output, inputs).mean(), self.model.alignment_loss
        (denoising + self.config.loss_weight * alignment).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append((denoising.item(), alignment.item()))
        self.seconds.append(time.process_time() - begin)


def measure(resolution: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a step and of the encoding, the size of the latents, and how far the losses are from those of LIVE."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        trained = {way: Trained(folder, resolution, changes, stack) for way, changes in WAYS.items()}
        steps = {way: one.step for way, one in trained.items()}
        seconds = interleaved(steps, repeats, device, budget=SECONDS)
        sizes = {LIVE: None} | {way: size_on_disk(folder / "latents", one) for way, one in list(trained.items())[1:]}
        return {
            "resolution": resolution,
            "views": SCENES * VIEWS,
            "ways": {
                way: {
                    **summary(seconds[way]),
                    "processor": summary(one.seconds[1:]),  # the first step warms up
                    "encoding": one.encoding if way != LIVE else None,
                    "bytes": sizes[way],
                    "steps": len(one.losses),
                    "largest relative difference of a loss": difference(one.losses, trained[LIVE].losses),
                }
                for way, one in trained.items()
            },
        }


def size_on_disk(folder: Path, trained: Trained) -> int:
    """Bytes of the latents that a run reads."""
    settings = latent_settings(
        trained.pipeline, resolution=trained.config.resolution, stored=trained.config.latent_precision
    )
    return sum(path.stat().st_size for path in (folder / fingerprint(settings)).iterdir())


def difference(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> float:
    """Largest relative difference between the losses of two runs, step by step.

    Example:
        >>> difference([(1.0, 2.0), (1.0, 3.0)], [(1.0, 2.0), (1.0, 2.0)])
        0.5
    """
    pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    return max(abs(one - other) / abs(other) for one, other in pairs)


def table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per way to get the latents."""
    return [
        {
            "px": entry["resolution"],
            "latents": way,
            "steps per second": 1 / row["median"],
            "steps per second of the processor": 1 / row["processor"]["median"],
            "that time / encoded in every step": row["processor"]["median"]
            / entry["ways"][LIVE]["processor"]["median"],
            "encoding of one view, s": None if row["encoding"] is None else row["encoding"] / entry["views"],
            "one view on the disk, KB": None if row["bytes"] is None else row["bytes"] / entry["views"] / 1e3,
            "largest relative difference of a loss": row["largest relative difference of a loss"],
            "in steps": row["steps"],
        }
        for entry in found.values()
        for way, row in entry["ways"].items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure what is not in the results file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--again", action="store_true", help="measure also what is in the results file")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--resolution", type=int, default=RESOLUTION)
    parser.add_argument("--output", type=Path, help="results file")
    options = parser.parse_args(arguments)
    if options.output is None and options.resolution != RESOLUTION:
        parser.error("--resolution tries another size: it needs an --output beside the results")
    device = torch.device(options.device)
    path = options.output or RESULTS / f"latents_{device.type}.json"
    results = Results(path, device, again=options.again)
    name = f"cat3d, {options.resolution} px"
    results.get(name, partial(measure, options.resolution, options.repeats, device))
    print(f"\n{results.environment}\n\n{table_of(table(results.found))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
