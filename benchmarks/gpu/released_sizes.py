"""Memory and seconds of a LoRA training step at the released sizes, with and without CAMEO, for each backbone.

    python benchmarks/gpu/released_sizes.py [--backbone cat3d] [--steps 3] [--output results.json]

Takes the settings files of the released sizes, but draws the weights: U-Nets of the released widths and depths on
latents of the released grid (8 x 8 pixels folded into channels), so nothing is downloaded. VAE, text and image encoders
are not counted. What is in the output file (`benchmarks/results/released_sizes.json`) is not measured again.
`--width 0.05 --resolution 64` tries the script on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from cameo.config import write_atomically
from cameo.training.config import TrainingConfig, load_config
from cameo.training.correspondences import match_layers
from cameo.training.data import to_device
from cameo.training.setup import add_lora, load_pipeline, wrap_denoiser

ROOT = Path(__file__).parent.parent.parent
FILES = {
    "cat3d": "lora_cat3d_sd21",
    "zero123plus": "lora_zero123plus_v12",
    "mvdream": "lora_mvdream_sd21",
    "sv3d": "lora_sv3d_p",
}
WIDTHS, HEADS = (320, 640, 1280, 1280), (5, 10, 20, 20)  # Stable Diffusion 2.1
DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def settings(backbone: str, arguments: argparse.Namespace) -> TrainingConfig:
    """The shipped settings, on fresh weights of the released shape."""
    config = load_config(ROOT / "recipes" / "configs" / f"{FILES[backbone]}.yaml")
    heads = [max(1, round(arguments.width * count)) for count in HEADS]
    options: dict[str, Any] = {
        "patch_size": 8,
        "block_out_channels": [64 * count for count in heads] if arguments.width < 1 else list(WIDTHS),
        "attention_levels": [True, True, True, False],
        "layers_per_block": 2,
        "heads": heads,
    }
    if backbone == "sv3d":
        options["embed_dim"] = 256
    if backbone == "zero123plus":
        options["reference_size"] = 512 if arguments.resolution is None else arguments.resolution
    return replace(
        config,
        pretrained_model_name_or_path=None,
        preset="small",
        preset_options=options,
        resolution=arguments.resolution or config.resolution,
    )


def wall(config: TrainingConfig) -> dict[str, Any]:
    """A wall seen by cameras side by side, with random pictures and exact depth."""
    samples, views, side = config.train_batch_size, config.num_views, config.resolution
    intrinsics = torch.tensor([[side, 0, side / 2], [0, side, side / 2], [0, 0, 1]], dtype=torch.float32)
    extrinsics = torch.eye(4).repeat(samples, views, 1, 1)
    extrinsics[:, :, 0, 3] = -1.0 / views * torch.arange(views)
    return {
        "images": torch.rand(samples, views, 3, side, side, generator=torch.Generator().manual_seed(0)),
        "intrinsics": intrinsics.expand(samples, views, 3, 3).clone(),
        "extrinsics": extrinsics,
        "depth": torch.full((samples, views, 1, side, side), 2.0),
        "num_reference_views": config.num_reference_views,
        "key": ["wall"] * samples,
    }


def measure(config: TrainingConfig, device: torch.device, steps: int) -> dict[str, Any]:
    """Peak memory in GB (GPU only) and median seconds of a step."""
    pipeline = load_pipeline(config)
    add_lora(pipeline.denoiser, config)
    model = wrap_denoiser(pipeline, config).to(device).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    batch = to_device(wall(config), device)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5)
    half = DTYPES[config.mixed_precision]
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps + 1):  # the first step is not counted
        start = time.perf_counter()
        inputs = pipeline.training_inputs(batch, generator=torch.Generator().manual_seed(0))
        matches = match_layers(model, batch) if config.weight else None
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            output = model(*inputs.args, correspondence=matches, **inputs.kwargs)
            loss = pipeline.denoising_loss(output, inputs).mean()
        if config.weight:
            loss = loss + config.weight * model.alignment_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return {"peak_gb": peak, "seconds": sorted(seconds[1:])[len(seconds[1:]) // 2]}


def main() -> None:
    """Measure what is not in the output file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=FILES)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=float, default=1.0, help="share of the released widths")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "released_sizes.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    found = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for backbone in [arguments.backbone] if arguments.backbone else FILES:
        for way, changes in (("without CAMEO", {"weight": 0.0, "inflate": False}), ("with CAMEO", {})):
            key = f"{backbone}, {way}"
            if key in found:
                continue
            config = replace(settings(backbone, arguments), **changes)
            try:
                measured = measure(config, device, arguments.steps)
            except torch.OutOfMemoryError:
                measured = {"peak_gb": "out of memory", "seconds": None}
            shown = {name: getattr(config, name) for name in ("resolution", "num_views", "train_batch_size", "inflate")}
            found[key] = {**measured, **shown, "device": name, "date": str(date.today())}
            write_atomically(arguments.output, json.dumps(found, indent=2) + "\n")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print("| backbone | peak GB | seconds per step | px | views | batch | device | date |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for key, row in found.items():
        figures = [f"{row[name]:.2f}" if isinstance(row[name], float) else row[name] for name in ("peak_gb", "seconds")]
        cells = [row[name] for name in ("resolution", "num_views", "train_batch_size", "device", "date")]
        print(f"| {key} | " + " | ".join(map(str, [*figures, *cells])) + " |")


if __name__ == "__main__":
    main()
