"""Joint attention: self-attentions of diffusers' U-Nets or transformers attend to all views of a sample."""

from __future__ import annotations

from typing import TypeVar

from diffusers import ModelMixin
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from einops import rearrange
from torch import Tensor, nn

from cameo.errors import ShapeError

__all__ = ["JointViewAttnProcessor", "check_joined", "inflate"]

Denoiser = TypeVar("Denoiser", bound=ModelMixin)


class JointViewAttnProcessor:
    """Attention processor in which the tokens of all views of a sample attend to each other.

    Takes `num_views` through `cross_attention_kwargs`. With `join=False` (text cross-attention) it accepts
    the argument and attends per view. xformers is used on request and only on CUDA, since it has no CPU kernel.
    """

    def __init__(self, *, join: bool, use_xformers: bool = False, latent_stride: int | None = None) -> None:
        self.join = join
        self.latent_stride = latent_stride
        self.use_xformers = use_xformers
        self._sdpa = AttnProcessor2_0()
        self._xformers = XFormersAttnProcessor() if use_xformers else None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        num_views: int = 1,
    ) -> Tensor:
        """Attend as diffusers' own processors do, over the joined tokens where `join` is set."""
        kernel = self._xformers if self._xformers is not None and hidden_states.is_cuda else self._sdpa
        if not self.join:
            return kernel(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if hidden_states.shape[0] % num_views:
            raise ShapeError(
                "cross_attention_kwargs['num_views']",
                expected=f"a divisor of the batch {hidden_states.shape[0]} = samples x views",
                got=str(num_views),
            )
        hidden_states = rearrange(hidden_states, "(b v) n c -> b (v n) c", v=num_views)
        hidden_states = kernel(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return rearrange(hidden_states, "b (v n) c -> (b v) n c", v=num_views)


def inflate(unet: Denoiser, *, use_xformers: bool = False, latent_stride: int | None = None) -> Denoiser:
    """Let every self-attention of a U-Net or `JointDiT` attend across views, in place; the weights stay as they are.

    `latent_stride` (image pixels per latent cell side, 8 for the VAE of Stable Diffusion) tells the layers their token
    grid for an image size, which `CameoModel.token_grid` needs. Each forward then takes the number of views of a
    sample, in `cross_attention_kwargs`; without it every view is taken as a sample of its own.
    `docs/your_own_loop.md` shows the steps from here to a training loop.

    Example:
        >>> import torch
        >>> from diffusers import UNet2DConditionModel
        >>> unet = UNet2DConditionModel(
        ...     sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8,
        ...     down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        ...     cross_attention_dim=8, attention_head_dim=4)
        >>> context = torch.zeros(6, 1, 8)
        >>> views = {"num_views": 3}
        >>> out = inflate(unet, latent_stride=8)(torch.zeros(6, 4, 8, 8), 0, context, cross_attention_kwargs=views)
        >>> import cameo
        >>> cameo.wrap(unet, backbone="cat3d").token_grid(64, 64)
        (8, 8)
    """
    unet.set_attn_processor(
        {
            name: JointViewAttnProcessor(
                join=name.endswith("attn1.processor"), use_xformers=use_xformers, latent_stride=latent_stride
            )
            for name in unet.attn_processors
        }
    )
    return unet


def check_joined(unet: nn.Module) -> None:
    """Refuse a denoiser whose views were separated again.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("cat3d").build("tiny").unet
        >>> check_joined(unet)
        >>> unet.set_attn_processor(AttnProcessor2_0())
        >>> check_joined(unet)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        RuntimeError: the self-attention down_blocks.1.attentions.0.transformer_blocks.0.attn1 sees one view ...

    Raises:
        RuntimeError: names the layer and the cure. diffusers' switches for xformers, attention slicing and the
            like replace the attention processors, and with them the joint attention.
    """
    for name, module in unet.named_modules():
        if name.endswith("attn1") and not getattr(getattr(module, "processor", None), "join", False):
            raise RuntimeError(
                f"the self-attention {name} sees one view at a time: its processor is "
                f"{type(getattr(module, 'processor', None)).__name__}, set after the pipeline was built. Call "
                "pipeline.disable_xformers_memory_efficient_attention() to join the views again"
            )
