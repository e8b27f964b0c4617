"""Encodes each view of a training set once, in batches as large as those of the training.

Axes: n images that the encoder sees as one, H W image pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cameo.data import MultiViewDataset
from cameo.errors import DataError
from cameo.latents.store import LatentReader, LatentWriter, image_keys
from cameo.pipeline import LatentEncoder
from cameo.scenes.views import images_to_float

__all__ = ["STORED", "encode_missing", "latent_settings", "stored_dtype"]

STORED = ("half", "float32")
# Weights of a VAE that latents do not depend on.
DECODER = ("decoder.", "post_quant_conv.")
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}


def stored_dtype(pipeline: LatentEncoder, stored: str) -> torch.dtype:
    """Return the precision in which latents are kept: float32, or "half": the encoder's if it is half, else float16.

    Float16 keeps 11 significant bits, bfloat16 only 8; what exceeds the range of float16 is refused when it is encoded.

    Raises:
        ValueError: for another name.
    """
    if stored not in STORED:
        raise ValueError(f"latent_precision: expected {' or '.join(STORED)}, got {stored!r}")
    if stored == "float32":
        return torch.float32
    return pipeline.latent_dtype if pipeline.latent_dtype == torch.bfloat16 else torch.float16


def latent_settings(pipeline: LatentEncoder, *, resolution: int, stored: str) -> dict[str, Any]:
    """Return what latents depend on besides the pixels: encoder, precision and size; each has a folder of its own."""
    return {
        "backbone": pipeline.backbone,
        "vae": _digest(pipeline.vae),
        "encoded_in": NAMES[pipeline.latent_dtype],
        "stored_in": NAMES[stored_dtype(pipeline, stored)],
        "resolution": resolution,
    }


def _digest(vae: Any) -> str:
    """Hexadecimal digits of the encoder's weights and of the VAE's configuration."""
    facts = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16)
    for name, weight in sorted(vae.state_dict().items()):
        if not name.startswith(DECODER):
            digest.update(f"{name}{list(weight.shape)}{weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Unit:
    """Images `[n, 3, H, W]` that the encoder sees as one, and their keys."""

    images: Tensor
    keys: list[int]


def encode_missing(
    pipeline: LatentEncoder,
    dataset: MultiViewDataset,
    folder: Path,
    settings: dict[str, Any],
    *,
    batch_size: int,
    stored: str = "half",
    process: int = 0,
    num_processes: int = 1,
    progress: bool = True,
) -> int:
    """Encode the views of a data set of which the folder lacks the latents, and return how many these were.

    The encoder gets as many images at a time as in a training step, the last time repeated ones, so that it computes
    each with the same kernels as there.

    Args:
        pipeline: encodes the views.
        dataset: training set; all views of all its scenes are encoded.
        folder: of the latents with these settings.
        settings: of `latent_settings`, written into each shard.
        batch_size: samples per training step.
        stored: "half" or "float32", see `stored_dtype`.
        process: number of this process, which encodes its share.
        num_processes: how many there are; they need not communicate.
        progress: whether a bar is shown.

    Raises:
        DataError: if the folder cannot be written or has a damaged shard, or a view has latents that are not finite.
        ValueError: if the encoder sees views together that are drawn anew for each sample.
    """
    reader = LatentReader(folder)
    dtype = stored_dtype(pipeline, stored)
    scenes = len(dataset.source)
    owned = range(process, scenes, num_processes) if scenes >= num_processes else range(scenes)
    bar = tqdm(
        total=len(owned),
        desc="latents",
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
        disable=not progress,
    )
    waiting: dict[int, list[_Unit]] = defaultdict(list)
    in_sample = [len(views) for views in pipeline.encoded_together(dataset.num_views)]
    planned: set[int] = set()
    encoded = number = 0
    with bar, LatentWriter(folder, settings) as writer:
        for scene in owned:
            units = list(_units(pipeline, dataset, scene))
            for images in units:
                unit = _Unit(images, image_keys(images))
                number += 1
                mine = scenes >= num_processes or number % num_processes == process
                if mine and unit.keys[0] not in planned and unit.keys[0] not in reader:
                    planned.update(unit.keys)
                    group = waiting[len(images)]
                    group.append(unit)
                    encoded += len(images)
                    if len(group) == batch_size * in_sample.count(len(images)):
                        _encode(pipeline, group, len(group), dtype, writer)
                        group.clear()
                bar.update(1 / len(units))
                bar.set_postfix_str(f"{encoded:,} views encoded", refresh=False)
        for together, group in waiting.items():
            if group:
                _encode(pipeline, group, batch_size * in_sample.count(together), dtype, writer)
    return encoded


def _units(pipeline: LatentEncoder, dataset: MultiViewDataset, scene: int) -> Iterator[Tensor]:
    """The images of a scene `[n, 3, H, W]` that the encoder sees together."""
    images = dataset.source.views(scene).images
    together = pipeline.encoded_together(dataset.num_views)
    if dataset.selection == "in_order":
        yield from (images[views] for views in together)
    elif max(map(len, together)) == 1:
        yield from images[:, None]
    else:
        raise ValueError(
            f"cache_latents=true: {pipeline.backbone} encodes {max(map(len, together))} views of a sample as one "
            "image, and views that are drawn anew for each sample are together once only; give camera_rig=, whose "
            "views are always the same, or cache_latents=false"
        )


@torch.no_grad()
def _encode(pipeline: LatentEncoder, units: list[_Unit], count: int, dtype: torch.dtype, writer: LatentWriter) -> None:
    """Encode units of one size, `count` at a time with repeated ones at the end, and write their latents."""
    filled = [units[min(number, len(units) - 1)].images for number in range(count)]
    images = torch.stack(filled).to(pipeline.vae.device)
    latents = pipeline.encode_views(images_to_float(images)).to(dtype)[: len(units)].cpu()
    for unit, of_unit in zip(units, latents, strict=True):
        if not torch.isfinite(of_unit).all():
            raise DataError(
                f"cache_latents=true: the VAE gives latents that are not finite in {NAMES[pipeline.latent_dtype]}, "
                f"kept in {NAMES[dtype]}. Set force_upcast=true in its config, or use mixed_precision=bf16 and "
                "latent_precision=float32"
            )
        for key, of_view in zip(unit.keys, of_unit, strict=True):
            writer.add(key, of_view)
