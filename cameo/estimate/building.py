"""A run without weights, and a batch as the run would see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from cameo.correspondence import Correspondence
from cameo.data.batches import layer_grids
from cameo.model import CameoModel
from cameo.pipeline import LatentEncoder, MultiViewPipeline, TrainingInputs
from cameo.training.settings import TrainingConfig

__all__ = ["OutlinedRun", "batch_bytes", "example_batch", "example_matches", "quiet_loading", "reads_images"]


@dataclass(frozen=True)
class OutlinedRun:
    """A run as its recipe would build it, without weights.

    Attributes:
        pipeline: the denoiser with its VAE, encoders and noise schedule.
        model: wraps the denoiser; what is to be trained requires a gradient.
        inputs: adds noise to a batch, a function of the batch and the number of the micro step, as the training does.
    """

    pipeline: Any
    model: CameoModel
    inputs: Callable[[Mapping[str, Any], int], TrainingInputs]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep diffusers from showing the progress of a loading in which nothing is loaded."""
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def reads_images(pipeline: MultiViewPipeline) -> bool:
    """Whether the pipeline works on pixels, without a VAE, so that the values of images enter the denoiser."""
    return not (isinstance(pipeline, LatentEncoder) and pipeline.vae is not None)


def example_batch(config: TrainingConfig, pipeline: MultiViewPipeline) -> dict[str, Any]:
    """Return a batch of black pictures from cameras side by side, without depth; with latents where there is a VAE.

    Images of which the shape alone is read take no memory.
    """
    samples, views, side = config.train_batch_size, config.num_views, config.resolution
    intrinsics = torch.tensor([[side, 0, side / 2], [0, side, side / 2], [0, 0, 1]], dtype=torch.float32)
    extrinsics = torch.eye(4).repeat(samples, views, 1, 1)
    extrinsics[:, :, 0, 3] = -1.0 / views * torch.arange(views)
    shape = (samples, views, 3, side, side)
    batch = {
        "images": torch.zeros(shape) if reads_images(pipeline) else torch.zeros(()).expand(shape),
        "intrinsics": intrinsics.expand(samples, views, 3, 3).clone(),
        "extrinsics": extrinsics,
        "num_reference_views": config.num_reference_views,
        "key": ["dry run"] * samples,
    }
    if not reads_images(pipeline):
        batch["latents"] = torch.zeros(pipeline.latent_shape(shape))
    return batch


def example_matches(model: CameoModel, batch: dict[str, Any], *, distances: bool) -> list[Correspondence]:
    """Return a correspondence per supervised layer, in which every token has a match in every other view."""
    samples, views = batch["images"].shape[:2]
    found: dict[Any, Correspondence] = {}
    for layer in model.supervised_layers:
        grids = layer_grids(layer, batch)
        if grids not in found:
            tokens = torch.arange(max(height * width for height, width in grids))
            inside = tokens < torch.tensor([height * width for height, width in grids])[:, None]
            other = ~torch.eye(views, dtype=torch.bool)
            index = torch.where(other[:, :, None] & inside[:, None], 0, -1).expand(samples, -1, -1, -1).clone()
            found[grids] = Correspondence(index, grids, distance=torch.zeros(index.shape) if distances else None)
    return [found[layer_grids(layer, batch)] for layer in model.supervised_layers]


def batch_bytes(config: TrainingConfig, matches: list[Correspondence]) -> int:
    """Return the bytes of a batch where the model trains: images in float32, depth, cameras, matches."""
    views = config.train_batch_size * config.num_views
    pixels = views * config.resolution**2 * (3 + 1) * 4
    cameras = views * (9 + 16) * 4
    different = {id(match): match for match in matches}.values()
    tensors = [tensor for match in different for tensor in (match.index, match.distance)]
    return pixels + cameras + sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
