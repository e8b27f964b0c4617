"""The pipeline and the model of a run without weights, and a batch as the run would see it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from cameo.correspondence import Correspondence
from cameo.data.batches import layer_grids
from cameo.model import CameoModel
from cameo.pipeline import LatentEncoder, MultiViewPipeline
from cameo.training.settings import TrainingConfig
from cameo.training.setup import add_lora, load_pipeline, wrap_denoiser
from cameo.training.trainer import HALF

__all__ = ["batch_bytes", "example_batch", "example_matches", "outlined_model", "reads_images"]


def outlined_model(config: TrainingConfig, *, full: bool) -> tuple[Any, CameoModel]:
    """Build pipeline and wrapped model of a run as its recipe would, without weights.

    Example:
        >>> pipeline, model = outlined_model(TrainingConfig(preset="tiny"), full=True)
        >>> next(model.parameters()).device.type
        'meta'

    Args:
        config: settings of the run. With `layer=auto`, which would probe the weights, the default layer is taken.
        full: whether all weights are trained, or a LoRA.

    Raises:
        DataError: for weights on the Hub whose architecture is not known.
        ValueError: for a backbone that does not say how it is built without weights, and for settings that do not fit.
    """
    layer = None if config.layer == "auto" else config.layer
    kernel = {"enable_xformers_memory_efficient_attention": False, "alignment_implementation": "auto"}
    config = replace(config, layer=layer, resume_from_checkpoint=None, **kernel)
    try:
        with init_empty_weights():
            pipeline = load_pipeline(config, outline=True)
            if full:
                pipeline.denoiser.requires_grad_(True)
            else:
                add_lora(pipeline.denoiser, config)
            model = wrap_denoiser(pipeline, config)
    except NotImplementedError as error:
        raise ValueError(f"{error}, so a dry run cannot build it; give it the method `outline`, or a preset") from error
    if not config.uses_matches:  # as in a training, whose heads would get no gradient
        model.alignment_heads.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:  # mixed precision keeps trained parameters in float32
            parameter.data = parameter.data.float()
    if isinstance(pipeline, LatentEncoder):
        pipeline.encoder_precision = HALF.get(config.mixed_precision)
    return pipeline, model


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
