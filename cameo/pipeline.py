"""What a backbone's pipeline offers to the shared recipes and to the shared evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = ["LatentEncoder", "MultiViewPipeline", "TrainingInputs"]


@dataclass
class TrainingInputs:
    """One noised multi-view batch, ready for the denoiser: `output = denoiser(*args, **kwargs)`.

    Attributes:
        args, kwargs: arguments of the denoiser's forward.
        noisy: what the denoiser sees of each view, `[B, V, C, h, w]`; reference views are clean.
        target: what it is to predict, `[B, V, C, h, w]`.
        loss_views: views that carry the denoising loss, bool `[V]`; on the CPU, or the host waits for it in each step.
        timesteps: integers `[B]`, shared by the views of a sample.
        aligned: whether the views attend to each other in this forward; without it there is nothing to align, as in
            the batches of single images that MVDream also trains on.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    noisy: Tensor
    target: Tensor
    loss_views: Tensor
    timesteps: Tensor
    aligned: bool = True


class MultiViewPipeline(Protocol):
    """A denoiser with what training and sampling need beside it; batches are stacked samples of `cameo.data`."""

    denoiser: nn.Module

    @property
    def num_train_timesteps(self) -> int:
        """Number of noise levels `T`; timesteps run from 0 (clean) to `T - 1`."""

    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape `[B, V, C, h, w]` of the noise for images `[B, V, 3, H, W]`."""

    def training_inputs(self, batch: Mapping[str, Any], **options: Any) -> TrainingInputs:
        """Noise a batch and build the denoiser's conditioning and target."""

    def denoising_loss(self, output: Any, inputs: TrainingInputs) -> Tensor:
        """Return the mean squared error of each sample over the views that carry a loss, `[B]`."""

    def predict_clean(self, output: Any, inputs: TrainingInputs) -> Tensor:
        """Predict the clean images in [0, 1], `[B, V, 3, H, W]`, from the denoiser's output."""

    def sample(self, batch: Mapping[str, Any], **options: Any) -> Tensor:
        """Generate the target views of a batch from its reference views, `[B, V - R, 3, H, W]` in [0, 1]."""

    def save_pretrained(self, folder: str, **options: Any) -> Any:
        """Write all components in diffusers' folder layout."""


@runtime_checkable
class LatentEncoder(Protocol):
    """What a pipeline has besides if the latents of its views can be kept: `cache_latents=true`.

    Its `training_inputs` takes the `latents` of a batch, `[B, V, C, h, w]`, in place of encoding its `images`.
    """

    backbone: str
    vae: Any
    encoder_precision: torch.dtype | None

    @property
    def latent_dtype(self) -> torch.dtype:
        """Return the precision in which the encoder gives latents."""

    def encode_views(self, images: Tensor) -> Tensor:
        """Encode images `[B, V, 3, H, W]` in [0, 1] to latents `[B, V, C, h, w]`, a function of the images alone."""

    def encoded_together(self, num_views: int) -> list[list[int]]:
        """Return the views of a sample that the encoder sees as one image, each view once."""
