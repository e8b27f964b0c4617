"""What `CameoModel.check_layout` costs, in training steps of the same model on the same images.

    python -m benchmarks.step.check_layout [--repeats 20]

One thread of a CPU, two models: the preset `transformer-tiny` of CAT3D at 3 views of 32 x 32 pixels, and a narrow Wan
transformer (diffusers) at 5 latent frames of 16 x 16. A step is forward, alignment loss, backward and AdamW; steps and
checks run in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import cameo
from benchmarks.common.measuring import environment, interleaved, summary
from cameo import CameoModel, Correspondence
from cameo.backbone import get_backbone
from cameo.geometry.grids import TokenGrids
from cameo.tables import markdown_table

Inputs = Callable[[Tensor], tuple[Sequence[Any], dict[str, Any]]]


def cat3d() -> tuple[CameoModel, Inputs, Tensor]:
    """Return the wrapped denoiser, what makes its arguments of images, and the images."""
    pipeline = get_backbone("cat3d").build("transformer-tiny")
    images = torch.rand(1, 3, 3, 32, 32)
    intrinsics = torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]).expand(1, 3, 3, 3)
    extrinsics = torch.eye(4).repeat(1, 3, 1, 1)
    extrinsics[0, :, 0, 3] = torch.arange(3)
    batch = {"intrinsics": intrinsics, "extrinsics": extrinsics, "num_reference_views": 1}

    def inputs(images: Tensor) -> tuple[Sequence[Any], dict[str, Any]]:
        generator, timesteps = torch.Generator().manual_seed(0), torch.tensor([pipeline.num_train_timesteps // 2])
        found = pipeline.training_inputs({**batch, "images": images}, generator=generator, timesteps=timesteps)
        return found.args, found.kwargs

    return cameo.wrap(pipeline.unet, backbone="cat3d"), inputs, images


def wan() -> tuple[CameoModel, Inputs, Tensor]:
    """Return the same of a narrow transformer of diffusers."""
    import diffusers

    model = diffusers.WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=128,
        rope_max_seq_len=32,
    )
    text, timestep = torch.randn(1, 16, 32), torch.tensor([500])

    def inputs(latents: Tensor) -> tuple[Sequence[Any], dict[str, Any]]:
        return (latents.transpose(1, 2), timestep, text), {}

    return cameo.wrap(model, layer="blocks.2.attn1", layout="b (v h w)"), inputs, torch.randn(1, 5, 4, 16, 16)


def shifted(token_grids: TokenGrids) -> Correspondence:
    """Every token matches one of each other view."""
    views, tokens = len(token_grids), token_grids[0][0] * token_grids[0][1]
    index = ((torch.arange(tokens) + 1) % tokens).repeat(1, views, views, 1)
    index[:, range(views), range(views)] = -1
    return Correspondence(index, token_grids)


def row(name: str, made: tuple[CameoModel, Inputs, Tensor], repeats: int) -> list[str]:
    """Measure one model; cells of the table."""
    model, inputs, images = made
    checked = model.train().check_layout(inputs, images)
    if checked.fits is not True:
        raise RuntimeError(f"{name}: expected a layout that fits, got\n{checked}")
    match, optimizer = shifted(checked.layers[0].token_grids), torch.optim.AdamW(model.parameters(), lr=1e-4)
    args, kwargs = inputs(images)

    def step() -> None:
        output = model(*args, correspondence=match, **kwargs)
        (output.sample.square().mean() + model.weight * model.alignment_loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = interleaved({"step": step, "check": lambda: model.check_layout(inputs, images)}, repeats, warm_up=3)
    median = {what: float(summary(seconds)["median"]) for what, seconds in found.items()}
    milliseconds = [f"{1e3 * median[what]:.0f}" for what in ("step", "check")]
    return [name, *milliseconds, f"{median['check'] / median['step']:.1f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="rounds of a step and a check")
    repeats = parser.parse_args(arguments).repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [row("CAT3D, transformer-tiny", cat3d(), repeats), row("Wan, narrow", wan(), repeats)]
    print(markdown_table(["model", "step, ms", "check_layout, ms", "check in steps"], rows))
    print(environment("cpu"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
