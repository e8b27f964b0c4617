"""The supervision of a run beside the denoising loss: CAMEO's matches or REPA's features, and at which steps.

Axes: B samples, V views.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from cameo.alarms import alignment_chance, matchable_tokens
from cameo.correspondence import Correspondence
from cameo.correspondence.controls import matches_of_next_sample, random_matches
from cameo.correspondence.features import FeatureExtractor
from cameo.correspondence.matcher import KeypointMatcher
from cameo.data import MultiViewDataset, collate
from cameo.data.batches import match_layers, to_device
from cameo.data.settings import data_format
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline, TrainingInputs
from cameo.training.data import step_generator
from cameo.training.repa import FeatureAlignment, align_features
from cameo.training.settings import TrainingConfig

__all__ = [
    "MatchWatch",
    "MicroStep",
    "Supervision",
    "alignment_weight",
    "drop_low_noise",
    "figure",
    "make_matcher",
    "matches_of_next_sample",
    "noisy_depth",
    "random_matches",
    "training_matches",
]

# Purposes of random numbers beside the noise of the images.
DEPTH_NOISE, RANDOM_MATCHES, QUERIES = 1, 2, 3
PROJECTOR_FILE = "repa_projector.safetensors"
# Number of optimizer steps without any match after which a run that was to have some warns. Even where nine of ten
# samples have no match, a batch of 4 has none in 66 % of the steps, and ten such steps follow each other in 1.3 %.
PATIENCE = 10


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
        num_wanted: number of samples that the latest micro step was to supervise, whether or not they have a match.
        chance: alignment loss of uniform attention with the matches of the latest micro step; 0 without matches.
        matchable: number of matches that there could have been in the latest micro step.
        watch: warns where the first steps of the run meet no match.
    """

    def __init__(
        self,
        model: CameoModel,
        pipeline: MultiViewPipeline,
        dataset: MultiViewDataset,
        config: TrainingConfig,
        device: torch.device,
    ) -> None:
        self.model, self.pipeline, self.config, self.device = model, pipeline, config, device
        self.module: CameoModel | FeatureAlignment = model
        self.heads: nn.Module = model.alignment_heads
        self.features: FeatureExtractor | None = None
        self.matcher = make_matcher(config).to(device) if config.uses_matcher else None
        self.num_wanted: int | Tensor = 0
        self.chance: float | Tensor = 0.0
        self.matchable: int | Tensor = 0
        self.watch = MatchWatch(model, config)
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
    def num_supervised(self) -> int | Tensor:
        """Number of matches, or of tokens with features, behind the latest alignment loss, where it is."""
        if not self.config.loss_weight:
            return 0
        if isinstance(self.module, FeatureAlignment):
            return self.module.num_supervised
        count = self.module._num_supervised
        return 0 if count is None else count

    def targets(
        self, batch: Mapping[str, Any], inputs: TrainingInputs, micro_step: int, process: int = 0
    ) -> dict[str, Any]:
        """Return the arguments with which `module` computes its alignment loss; none at a step without alignment."""
        config = self.config
        self.num_wanted = self.chance = self.matchable = 0
        if not (self.weight(micro_step) and inputs.aligned):
            return {}
        noise_levels = inputs.timesteps / (self.pipeline.num_train_timesteps - 1)
        self.num_wanted = (noise_levels >= config.alignment_min_noise).sum()
        if self.features is not None:
            batch = {**batch, "features": self.features(batch["images"])}
        if self.matcher is not None:
            found = self.matcher(batch["images"], batch["intrinsics"], batch["extrinsics"])
            batch = {**batch, "pixel_matches": found}
        if isinstance(self.module, FeatureAlignment):
            kept = noise_levels >= config.alignment_min_noise
            return {"features": batch["features"], "grids": self.module.grids(batch), "kept": kept}
        matches = training_matches(self.model, batch, noise_levels, config, micro_step, process)
        self.watch.offer(matches)
        layers = self.model.supervised_layers
        self.chance = alignment_chance(layers, matches, self.model.cameo_config)
        most = sum(matchable_tokens(*one) for one in zip(layers, (match.token_grids for match in matches), strict=True))
        self.matchable = self.num_wanted * most
        return {"correspondence": matches}

    def figures(self) -> list[float | Tensor]:
        """Return what the micro step of the latest targets adds to the records of its step."""
        return [self.num_wanted, self.chance, self.matchable]

    def begin(self, micro_step: int, process: int = 0) -> None:
        """Prepare the random numbers of the forward of a micro step."""
        if self.config.max_queries is not None:
            self.model.query_generator = step_generator(self.config, micro_step, process, QUERIES)

    @property
    def divides_by_matches(self) -> bool:
        """Whether the alignment loss is a mean over matches."""
        return self.config.uses_matches and self.config.reduction != "sum"

    def totals(self, targets: Mapping[str, Any]) -> Tensor:
        """Return what the alignment loss of a micro step with these targets divides by (`CameoModel.match_totals`)."""
        if targets:
            return self.model.match_totals(targets["correspondence"])
        parts = 2 if self.config.reduction == "released" else 1
        return torch.zeros(len(self.model.supervised_layers), parts, device=self.device)

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


@dataclass(frozen=True)
class MicroStep:
    """A micro batch before its forward.

    Attributes:
        number: of the micro step, counted over the whole run.
        samples: keys of the samples.
        inputs: of the denoiser.
        targets: what `Supervision.targets` returned.
        figures: what `Supervision.figures` returned.
    """

    number: int
    samples: list[str]
    inputs: TrainingInputs
    targets: dict[str, Any]
    figures: list[float | Tensor]


class MatchWatch:
    """Warns once of a run whose first steps supervise nothing although they were to; it ends at the first match.

    Steps without anything to supervise do not count: those of weight 0, of batches that the pipeline does not align,
    and of samples below `alignment_min_noise` only.

    Args:
        model: whose supervised layers the warning names.
        config: the settings of the run.
    """

    def __init__(self, model: CameoModel, config: TrainingConfig) -> None:
        self.model, self.config = model, config
        self.ended = not config.loss_weight
        self._steps = 0
        self._offered: int | Tensor = 0

    def offer(self, matches: Sequence[Correspondence]) -> None:
        """Count the matches of a micro step, one correspondence per layer, for what the warning says of the cause."""
        if not self.ended:
            self._offered = self._offered + sum(match.matched.sum() for match in matches)

    def see(self, num_wanted: float, num_supervised: float, *, warn: bool = True) -> None:
        """Count an optimizer step.

        Args:
            num_wanted: number of samples that it was to supervise.
            num_supervised: number of matches, or of tokens with features, that it supervised.
            warn: False in all processes but one.
        """
        if self.ended or not (num_wanted or num_supervised):
            return
        self._steps += 1
        self.ended = bool(num_supervised) or self._steps == PATIENCE
        if self.ended and not num_supervised and warn:
            warnings.warn(self._message(), stacklevel=2)

    def _message(self) -> str:
        config = self.config
        layers = "; ".join(f"{layer.path} with {layer.layout!r}" for layer in self.model.supervised_layers)
        place = {"train_data_dir": config.train_data_dir, "camera_rig": config.camera_rig}
        data = [f"{name}={value}" for name, value in place.items() if value]
        data += [f"num_views={config.num_views}"]
        data += [] if config.camera_rig else [f"min_overlap={config.min_overlap:g}"]
        what = "match" if config.supervision == "cameo" else "token with features"
        return (
            f"no {what} in the first {PATIENCE} optimizer steps that were to have some, so this run trains as if "
            f"loss_weight were 0. Backbone {config.backbone}, layer {layers}; data: {data_format(config)}, "
            f"{', '.join(data)}. {self._cause()}"
        )

    def _cause(self) -> str:
        if self.config.supervision == "repa":
            return "Likely cause: the layout of the layer leaves out all views. Cure: another layer="
        if offered := int(self._offered):
            return (
                f"Their batches have {offered} matches, and the layer supervises none of them. Likely causes: a query "
                "reaches only a part of the other views, or the matches are between views that the layout leaves out. "
                "Cure: another layer=, for SV3D inflate=true or own_view=true, or views that overlap there"
            )
        return (
            "Their batches have no match between any two views. Likely causes: views that do not show the same "
            "surfaces (min_overlap, num_views, camera_rig); depth without measurements or in another unit than the "
            "camera positions (depth_scale); cameras of another convention than OpenCV world-to-camera; for another "
            "correspondence than depth, a low cycle_threshold; for correspondence=tracks, points that few views show; "
            "for correspondence=matcher, a high matcher_threshold or a low max_epipolar_error"
        )


def make_matcher(config: TrainingConfig) -> KeypointMatcher:
    """Build the matcher of a run.

    Raises:
        DataError, ImportError, WeightsUnavailable: as `KeypointMatcher` says.
    """
    return KeypointMatcher(
        config.matcher,
        size=config.matcher_size,
        threshold=config.matcher_threshold,
        max_epipolar_error=config.max_epipolar_error,
    )


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


def figure(value: float | Tensor, device: torch.device) -> Tensor:
    """Return a number as a float32 tensor on a device; the host does not wait, as it would for a copy of a number.

    Example:
        >>> figure(3, torch.device("cpu")).item()
        3.0
    """
    if isinstance(value, Tensor):
        return value.to(device, torch.float32)
    return torch.full((), float(value), device=device)
