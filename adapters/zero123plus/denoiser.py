"""The denoiser of Zero123++: a U-Net that runs twice, first over the reference image, then over the canvas.

In the first (write) pass every self-attention stores its input tokens; in the second (read) pass it appends them to
its keys and values. Source: Zero123++, arXiv 2310.15110, section 2.2, and its published pipeline.

Axes: B samples, C latent channels, h w latent cells of one view; the canvas is [B, C, 3h, 2w], six views in three rows
of two. The reference has a grid of its own.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from cameo.adapters.common.noise_schedules import linear_ddpm
from cameo.adapters.common.positions import PositionMap, set_position, sincos
from cameo.adapters.zero123plus.layers import CURE, set_reference_processors, unet_name
from cameo.errors import ShapeError

__all__ = ["ReferenceUNet", "TilePositionMap", "set_tile_position", "view_code"]

ROWS, COLUMNS = 3, 2  # of the canvas


class ReferenceUNet(UNet2DConditionModel):
    """`UNet2DConditionModel` that noises the reference and runs the write and the read pass in one forward.

    It is called as the published `RefOnlyNoisedUNet`, but it *is* the U-Net: same parameter names, and it is saved
    as a plain `UNet2DConditionModel`. The published wrapper takes the noise level from the training schedule in
    training and from the sampler otherwise. Both are the same level, so this class ignores its mode.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("zero123plus").build("tiny").unet
        >>> canvas, context = torch.zeros(1, 48, 24, 16), torch.zeros(1, 1, 8)
        >>> given = {"cond_lat": torch.zeros(1, 48, 12, 12)}
        >>> unet(canvas, torch.tensor([500]), context, cross_attention_kwargs=given).sample.shape
        torch.Size([1, 48, 24, 16])

    Attributes:
        noise_scheduler: noise levels of the reference; None is `linear_ddpm()`.
    """

    noise_scheduler: DDPMScheduler | None = None

    @classmethod
    def from_unet(
        cls, unet: UNet2DConditionModel, *, noise_scheduler: DDPMScheduler | None = None, **options: Any
    ) -> ReferenceUNet:
        """Turn a U-Net into a `ReferenceUNet`, in place: the very same module, with the same weights.

        Args:
            unet: a plain `UNet2DConditionModel`, or a `ReferenceUNet`, which gets the new settings.
            noise_scheduler: noise levels of the reference; default those of the releases.
            **options: of `set_reference_processors`.

        Raises:
            TypeError: for another class, such as the published wrapper; pass the U-Net in it.
        """
        if type(unet) not in (UNet2DConditionModel, cls):
            inner = getattr(unet, "unet", None)
            cure = "; pass its .unet" if isinstance(inner, UNet2DConditionModel) else ""
            raise TypeError(f"unet: expected a UNet2DConditionModel, got {type(unet).__name__}{cure}")
        set_reference_processors(unet, **options)
        unet.__class__ = cls
        unet.noise_scheduler = noise_scheduler
        return unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        *,
        cross_attention_kwargs: dict[str, Any],
        down_block_res_samples: Any = None,
        mid_block_res_sample: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Denoise a canvas whose queries also attend to a reference.

        Args:
            sample: noisy canvas `[B, C, 3h, 2w]`.
            timestep: one for all or `[B]`; samplers that step between the levels give fractions.
            encoder_hidden_states: context `[B, T, D]` of the text cross-attention.
            class_labels: as `UNet2DConditionModel`.
            cross_attention_kwargs: `cond_lat`, clean reference latents `[B, C, h', w']`; `cond_noise`, the noise on
                them, default drawn anew in each forward; further entries go to both passes.
            down_block_res_samples, mid_block_res_sample: residuals of a ControlNet, added in the read pass.
            **options: as `UNet2DConditionModel`, given to both passes.

        Raises:
            ValueError: if `cond_lat` is missing or does not fit.
            RuntimeError: if no self-attention reads references.
        """
        given = dict(cross_attention_kwargs)
        reference = given.pop("cond_lat", None)
        noise = given.pop("cond_noise", None)
        if reference is None:
            raise ValueError("cross_attention_kwargs['cond_lat']: expected the latents of the reference, got none")
        expected = (sample.shape[0], sample.shape[1])
        if reference.ndim != 4 or reference.shape[:2] != expected:
            raise ShapeError(
                "cross_attention_kwargs['cond_lat']",
                expected=f"[{expected[0]}, {expected[1]}, h, w]",
                got=reference.shape,
            )
        noise = torch.randn_like(reference) if noise is None else noise
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])
        references: dict[str, Tensor] = {}
        super().forward(
            self.noised(reference, noise, timesteps),
            timestep,
            encoder_hidden_states,
            class_labels,
            cross_attention_kwargs={**given, "mode": "w", "ref_dict": references},
            **options,
        )
        if not references:
            raise RuntimeError(f"no self-attention stored its reference: none reads references. Call {CURE}")
        down, mid = down_block_res_samples, mid_block_res_sample
        return super().forward(
            sample,
            timestep,
            encoder_hidden_states,
            class_labels,
            cross_attention_kwargs={**given, "mode": "r", "ref_dict": references},
            down_block_additional_residuals=None if down is None else [residual.to(self.dtype) for residual in down],
            mid_block_additional_residual=None if mid is None else mid.to(self.dtype),
            **options,
        )

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` at time steps `[B]`; between the levels, linear in sigma as Euler samplers are."""
        if self.noise_scheduler is None:
            self.noise_scheduler = linear_ddpm()
        scheduler = self.noise_scheduler
        if not timesteps.is_floating_point():
            # Half precision would round the small noise of the first levels away.
            exact = torch.promote_types(latents.dtype, torch.float32)
            return scheduler.add_noise(latents.to(exact), noise.to(exact), timesteps).to(latents.dtype)
        alphas = scheduler.alphas_cumprod.to(timesteps.device)
        sigmas = ((1 - alphas) / alphas).sqrt()
        below = timesteps.floor().long().clamp(0, len(sigmas) - 2)
        sigma = torch.lerp(sigmas[below], sigmas[below + 1], timesteps.float() - below)[:, None, None, None]
        return ((latents + sigma * noise) / (sigma.square() + 1).sqrt()).to(latents.dtype)

    def to_json_string(self) -> str:
        """Return the configuration of a plain U-Net: the weights are those of one, and any program should load them."""
        return (
            json.dumps({**json.loads(super().to_json_string()), "_class_name": "UNet2DConditionModel"}, indent=2) + "\n"
        )


def view_code(view: int, channels: int) -> Tensor:
    """Return the constant of one view, `[C]`, by which tiles are told apart; view 0 is the reference.

    Cosines and sines of the multiples of the view's seventh of a turn: over seven successive multiples the codes of any
    two views are orthogonal.

    Example:
        >>> codes = torch.stack([view_code(view, 14) for view in range(7)])
        >>> torch.allclose(codes @ codes.T, 7 * torch.eye(7, dtype=torch.float64))
        True
    """
    angles = 2 * math.pi * view / (1 + ROWS * COLUMNS) * torch.arange(channels // 2, dtype=torch.float64)
    return torch.cat([angles.cos(), angles.sin()])


class TilePositionMap(PositionMap):
    """`PositionMap` that begins anew in each tile of the canvas, plus the constant of the view (`view_code`).

    Views are square, so a grid of three to two is the canvas, and a square one the reference. Both are measured in
    cells of a tile of `tile_size` cells, so that the same place of a view has the same coordinates in the reference and
    in a tile, at any image size.

    Example:
        >>> built = TilePositionMap(tile_size=8)
        >>> canvas, reference = built.build(16, 24, 16), built.build(16, 8, 8)
        >>> codes = [view_code(view, 16)[:, None, None] for view in (3, 0)]
        >>> torch.allclose(canvas[:, 8:16, :8] - codes[0], reference - codes[1])
        True

    Args:
        tile_size: cells per side of a tile, at the image size that the U-Net was made for.
    """

    def __init__(self, tile_size: int) -> None:
        super().__init__()
        self.tile_size = tile_size

    def build(self, channels: int, height: int, width: int) -> Tensor:
        """Map `[C, 3h, 2h]` of a canvas or `[C, h', h']` of a reference, in float64 on the CPU.

        Raises:
            ShapeError: for another aspect.
        """
        if height == width:
            return self._view(0, channels, height)
        if height * COLUMNS != width * ROWS or height % ROWS:
            raise ShapeError(
                "sample", expected=f"[B, C, {ROWS}h, {COLUMNS}h] or [B, C, h, h]", got=(channels, height, width)
            )
        views = [self._view(1 + tile, channels, height // ROWS) for tile in range(ROWS * COLUMNS)]
        rows = [torch.cat(views[start : start + COLUMNS], dim=2) for start in range(0, len(views), COLUMNS)]
        return torch.cat(rows, dim=1)

    def _view(self, view: int, channels: int, cells: int) -> Tensor:
        centres = (torch.arange(cells, dtype=torch.float64) + 0.5) * self.tile_size / cells - 0.5
        return sincos(centres, centres, channels) + view_code(view, channels)[:, None, None]


def set_tile_position(model: nn.Module, position: str) -> None:
    """Call `set_position` with a `TilePositionMap` for a U-Net, or for the one in the published wrapper, in place.

    Example:
        >>> from cameo.adapters.common.positions import get_position
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("zero123plus").build("tiny").unet
        >>> set_tile_position(unet, "none")
        >>> get_position(unet)
        'none'
    """
    unet = model.get_submodule(unet_name(model))
    size = unet.config.sample_size  # type: ignore[union-attr]
    side = size[1] // COLUMNS if isinstance(size, tuple | list) else size
    set_position(unet, position, TilePositionMap(int(side or 1)))  # type: ignore[arg-type]
