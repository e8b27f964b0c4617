"""SV3D's denoiser on diffusers' `UNetSpatioTemporalConditionModel`: one camera per frame instead of one per sample.

Axes: B samples, T frames, C channels, h w latent cells, E embedding channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    ModelMixin,  # noqa: F401 - diffusers asks the module of a pipeline's component for the base class it loads by
    UNetSpatioTemporalConditionModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from cameo.adapters.common.joined_frames import inflate
from cameo.errors import ShapeError

__all__ = ["SV3DUNet"]

# Fourier features of each number, in multiples of `addition_time_embed_dim`: SV3D's 256 ++ 512 ++ 512.
FEATURES = {1: (1,), 5: (1, 2, 2)}
PUBLISHED_EPSILON = 1e-5


class SV3DUNet(UNetSpatioTemporalConditionModel, PeftAdapterMixin):
    """Video U-Net whose frames have camera angles of their own; weights and state dict are those of its base class.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("sv3d").build("tiny").unet
        >>> sample = torch.zeros(1, 5, unet.config.in_channels, 8, 8)
        >>> angles = torch.zeros(1, 5, 3)
        >>> unet(sample, 0.5, torch.zeros(1, 1, unet.config.cross_attention_dim), angles).sample.shape
        torch.Size([1, 5, 48, 8, 8])

    Takes the base class's settings, and:

    Args:
        latent_stride: image pixels per latent cell side; tells the layers their token grid for an image size.
        joined_layers: spatial self-attentions in which all frames are joined, see
            `cameo.adapters.common.joined_frames`. `cameo.wrap(..., inflate=True)` writes them here, so that a saved
            U-Net loads with its layers joined.

    The embedding of the noise level plus that of the frame's `cond_aug, polar, azimuth` (SV3D_p) or `cond_aug`
    (SV3D_u) reaches every residual block; the base class adds one embedding per sample. The norms of all residual
    blocks use the epsilon of the release, 1e-5, where diffusers has 1e-6 in the blocks with attention.

    Source: Stability-AI/generative-models, sgm/modules/diffusionmodules/video_model.py; arXiv 2403.12008.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 8,
        out_channels: int = 4,
        down_block_types: tuple[str, ...] = (*("CrossAttnDownBlockSpatioTemporal",) * 3, "DownBlockSpatioTemporal"),
        up_block_types: tuple[str, ...] = ("UpBlockSpatioTemporal", *("CrossAttnUpBlockSpatioTemporal",) * 3),
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        addition_time_embed_dim: int = 256,
        projection_class_embeddings_input_dim: int = 1280,
        layers_per_block: int | tuple[int] = 2,
        cross_attention_dim: int | tuple[int] = 1024,
        transformer_layers_per_block: int | tuple[int, tuple[tuple]] = 1,
        num_attention_heads: int | tuple[int, ...] = (5, 10, 20, 20),
        num_frames: int = 21,
        latent_stride: int | None = 8,
        joined_layers: Sequence[str] = (),
    ) -> None:
        parts, rest = divmod(projection_class_embeddings_input_dim, addition_time_embed_dim)
        if rest or parts not in FEATURES:
            raise ValueError(
                "projection_class_embeddings_input_dim: expected addition_time_embed_dim (SV3D_u) or 5 times that "
                f"(SV3D_p), got {projection_class_embeddings_input_dim} with {addition_time_embed_dim}"
            )
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            addition_time_embed_dim=addition_time_embed_dim,
            projection_class_embeddings_input_dim=projection_class_embeddings_input_dim,
            layers_per_block=layers_per_block,
            cross_attention_dim=cross_attention_dim,
            transformer_layers_per_block=transformer_layers_per_block,
            num_attention_heads=num_attention_heads,
            num_frames=num_frames,
        )
        self.frame_features = FEATURES[parts]
        for block in self._blocks():
            for module in block.resnets.modules():  # type: ignore[union-attr]
                if isinstance(module, nn.GroupNorm):
                    module.eps = PUBLISHED_EPSILON
        # The handles are kept with the module: unpickled in another process, no newer hook gets the id of one of these.
        self.frame_hooks = [
            block.register_forward_pre_hook(_use_frame_embedding, with_kwargs=True) for block in self._blocks()
        ]
        for path in joined_layers:
            inflate(self, path)

    @classmethod
    def from_plain(cls, unet: UNetSpatioTemporalConditionModel, **settings: Any) -> SV3DUNet:
        """Take over settings and weights, not copied, of the diffusers class.

        Raises:
            ValueError: if its added embedding is not SV3D's (Stable Video Diffusion's has frame rate and motion).
        """
        with torch.device("meta"):
            taken = cls.from_config(unet.config, **settings)
        taken.load_state_dict(unet.state_dict(keep_vars=True), assign=True)
        return taken.train(unet.training)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        added_time_ids: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """Denoise the frames of each sample together.

        Args:
            sample: `[B, T, C, h, w]`, noisy latents with the condition latents behind them.
            timestep: `[B]` or a number, a quarter of the logarithm of the noise level.
            encoder_hidden_states: `[B, L, D]`, image embedding.
            added_time_ids: `[B, T, 3]`: noise on the condition image, polar angle and azimuth in radians; `[B, T, 1]`
                without the angles for SV3D_u.
            return_dict: whether to return an object with `sample [B, T, C', h, w]`, or a tuple.

        Raises:
            ShapeError: angles of another shape.
        """
        expected = (*sample.shape[:2], len(self.frame_features))
        if tuple(added_time_ids.shape) != expected:
            raise ShapeError("added_time_ids", expected=f"{list(expected)} for [B, T, N]", got=added_time_ids.shape)
        embedding = self._embed(sample, timestep, added_time_ids)
        unused = added_time_ids.new_zeros(sample.shape[0], sum(self.frame_features))
        blocks = self._blocks()
        try:
            for block in blocks:
                block.frame_embedding = embedding
            return super().forward(sample, timestep, encoder_hidden_states, unused, return_dict)
        finally:
            for block in blocks:
                del block.frame_embedding

    def _embed(self, sample: Tensor, timestep: Tensor | float | int, numbers: Tensor) -> Tensor:
        """Embedding of noise level and angles of each frame, `[(B T), E]`."""
        samples, frames = sample.shape[:2]
        level = torch.as_tensor(timestep, device=sample.device).expand(samples)
        time = self.time_embedding(self.time_proj(level).to(sample.dtype))
        width = self.config.addition_time_embed_dim
        features = [
            get_timestep_embedding(
                numbers[..., column].flatten(), parts * width, flip_sin_to_cos=True, downscale_freq_shift=0
            )
            for column, parts in enumerate(self.frame_features)
        ]
        cameras = self.add_embedding(torch.cat(features, dim=-1).to(sample.dtype))
        return time.repeat_interleave(frames, dim=0, output_size=samples * frames) + cameras

    def _blocks(self) -> list[nn.Module]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]


def _use_frame_embedding(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a block: the frames' embeddings in place of the samples'."""
    embedding = getattr(block, "frame_embedding", None)
    return None if embedding is None else (args, {**kwargs, "temb": embedding})
