"""The supervision of a run beside the denoising loss: CAMEO's matches or REPA's features, and at which steps.

Axes: B samples, V views.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from cameo.correspondence import Correspondence
from cameo.correspondence.controls import matches_of_next_sample, random_matches
from cameo.correspondence.features import FeatureExtractor
from cameo.data import MultiViewDataset, collate
from cameo.data.batches import match_layers, to_device
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline, TrainingInputs
from cameo.training.data import step_generator
from cameo.training.repa import FeatureAlignment, align_features
from cameo.training.settings import TrainingConfig

__all__ = [
    "Supervision",
    "alignment_weight",
    "drop_low_noise",
    "matches_of_next_sample",
    "noisy_depth",
    "random_matches",
    "training_matches",
]

# Purposes of random numbers beside the noise of the images.
DEPTH_NOISE, RANDOM_MATCHES = 1, 2
PROJECTOR_FILE = "repa_projector.safetensors"


class Supervision:
    """The auxiliary loss of a run: which module computes it, and what it is computed from at each step.

    Args:
        model: wraps `pipeline.denoiser`.
        pipeline: knows the noise levels.
        dataset: its first sample tells the size of what REPA aligns.
        config: the settings of the run.
        device: where the run trains.

    Attributes:
        module: what the training calls in place of `model`: `model` itself, or `FeatureAlignment` around it.
        heads: the modules whose parameters get a gradient from the auxiliary loss alone, and which are not published.
    """

    def __init__(
        self,
        model: CameoModel,
        pipeline: MultiViewPipeline,
        dataset: MultiViewDataset,
        config: TrainingConfig,
        device: torch.device,
    ) -> None:
        self.model, self.pipeline, self.config = model, pipeline, config
        self.module: CameoModel | FeatureAlignment = model
        self.heads: nn.Module = model.alignment_heads
        self.features: FeatureExtractor | None = None
        if not config.uses_matches:  # the alignment heads would get no gradient
            model.alignment_heads.requires_grad_(False)
        if config.uses_features:
            self.features = FeatureExtractor(
                config.feature_model, config.feature_checkpoint, config.feature_pretrained, size=config.feature_size
            ).to(device)
        if self.features is not None and config.supervision == "repa":
            sample = to_device(collate([dataset[0]]), device)
            self.module = align_features(model.to(device), pipeline, sample, self.features.dim, seed=config.seed)
            self.heads = self.module.projectors

    @property
    def num_supervised(self) -> int:
        """Number of matches, or of tokens with features, behind the latest alignment loss."""
        return self.module.num_supervised if self.config.loss_weight else 0

    def targets(
        self, batch: Mapping[str, Any], inputs: TrainingInputs, micro_step: int, process: int = 0
    ) -> dict[str, Any]:
        """Return the arguments with which `module` computes its alignment loss; none at a step without alignment."""
        config = self.config
        if not (self.weight(micro_step) and inputs.aligned):
            return {}
        noise_levels = inputs.timesteps / (self.pipeline.num_train_timesteps - 1)
        if self.features is not None:
            batch = {**batch, "features": self.features(batch["images"])}
        if isinstance(self.module, FeatureAlignment):
            kept = noise_levels >= config.alignment_min_noise
            return {"features": batch["features"], "grids": self.module.grids(batch), "kept": kept}
        return {"correspondence": training_matches(self.model, batch, noise_levels, config, micro_step, process)}

    def no_loss(self, denoising: Tensor) -> Tensor:
        """Return an alignment loss of 0 like `denoising`, for a step without alignment.

        In a run with alignment it has a gradient of 0 for every head: `DistributedDataParallel` waits for a gradient of
        each parameter.
        """
        zero = torch.zeros_like(denoising)
        if not self.config.loss_weight:
            return zero
        return zero + sum(parameter.sum() * 0 for parameter in self.heads.parameters())

    def weight(self, micro_step: int) -> float:
        """Return the factor of the alignment loss in a micro step."""
        return alignment_weight(self.config, micro_step // self.config.gradient_accumulation_steps)

    def save(self, folder: str | Path) -> None:
        """Write what trains beside the model and its alignment heads."""
        if isinstance(self.module, FeatureAlignment):
            save_model(self.module.projectors, str(Path(folder) / PROJECTOR_FILE))

    def load(self, folder: str | Path) -> None:
        """Read what `save` has written."""
        if isinstance(self.module, FeatureAlignment):
            load_model(self.module.projectors, str(Path(folder) / PROJECTOR_FILE))


def alignment_weight(config: TrainingConfig, step: int) -> float:
    """Return the factor of the alignment loss at a step, counted from 0; 0 from `alignment_until` on.

    Example:
        >>> config = TrainingConfig(loss_weight=0.1, weight_schedule="linear", alignment_until=75, max_train_steps=100)
        >>> [round(alignment_weight(config, step), 3) for step in (0, 50, 74, 75)]
        [0.1, 0.05, 0.026, 0.0]
    """
    if config.alignment_until is not None and step >= config.alignment_until:
        return 0.0
    if config.weight_schedule == "constant":
        return config.loss_weight
    done = step / config.max_train_steps
    share = 1 - done if config.weight_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.loss_weight * share


def training_matches(
    model: CameoModel,
    batch: Mapping[str, Any],
    noise_levels: Tensor,
    config: TrainingConfig,
    micro_step: int,
    process: int = 0,
) -> list[Correspondence]:
    """Return the matches that each supervised layer trains with, as the settings of the run change them.

    Args:
        model: whose supervised layers decide the token grids.
        batch: collated samples; matches that a loader handed over are used.
        noise_levels: noise level of each sample, its share of the last timestep in [0, 1], `[B]`.
        config: controls and noise.
        micro_step: decides the random numbers, with the seed of the run.
        process: decides them too.

    Raises:
        DataError: if the batch carries no geometry.
    """
    if config.geometry_noise:
        generator = step_generator(config, micro_step, process, DEPTH_NOISE)
        batch = {**batch, "depth": noisy_depth(batch["depth"], config.geometry_noise, generator)}
    matches = match_layers(
        model.supervised_layers, batch, kind=config.correspondence, cycle_threshold=config.cycle_threshold
    )
    if config.correspondence_control == "other_scene":
        matches = [matches_of_next_sample(match) for match in matches]
    elif config.correspondence_control == "random":
        generators = [step_generator(config, micro_step, process, RANDOM_MATCHES) for _ in matches]
        matches = [random_matches(match, generator) for match, generator in zip(matches, generators, strict=True)]
    if config.alignment_min_noise:
        matches = [drop_low_noise(match, noise_levels, config.alignment_min_noise) for match in matches]
    return matches


def noisy_depth(depth: Tensor, relative: float, generator: torch.Generator) -> Tensor:
    """Multiply each pixel's depth by `1 + relative * gaussian`; a depth that falls to 0 or below is no measurement.

    Example:
        >>> depth = torch.full((1, 1, 1, 64, 64), 2.0)
        >>> round(float(noisy_depth(depth, 0.1, torch.Generator().manual_seed(0)).std()), 2)
        0.2
    """
    gaussian = torch.randn(depth.shape, generator=generator, dtype=torch.float32)
    return depth * (1 + relative * gaussian.to(depth))


def drop_low_noise(match: Correspondence, noise_levels: Tensor, least: float) -> Correspondence:
    """Leave the samples whose noise level is below `least` without matches.

    Example:
        >>> index = torch.tensor([[[-1], [0]], [[0], [-1]]]).expand(2, 2, 2, 1)
        >>> match = drop_low_noise(Correspondence(index, ((1, 1), (1, 1))), torch.tensor([0.4, 0.5]), 0.5)
        >>> match.matched.sum(dim=(1, 2, 3)).tolist()
        [0, 2]
    """
    low = noise_levels.to(match.device) < least
    return replace(match, index=match.index.masked_fill(low[:, None, None, None], -1))
