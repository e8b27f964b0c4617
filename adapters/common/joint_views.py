"""Joint attention: self-attentions of diffusers' U-Nets or transformers attend to all views of a sample.

The views are joined by the attention itself and not by its processor. The processor is the kernel, so what switches
kernels in diffusers (attention slicing, xformers, `set_attn_processor`, fused projections) leaves the views joined.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from diffusers import ModelMixin
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from einops import rearrange
from torch import Tensor, nn

from cameo.adapters.common.diffusers_attention import XFormersOnCudaAttnProcessor, set_kernel, turn_into
from cameo.errors import ShapeError

__all__ = [
    "JointAttention",
    "JointViewAttnProcessor",
    "check_joined",
    "inflate",
    "joins_views",
    "latent_stride_of",
    "make_joint",
]

INFLATE = (
    "cameo.adapters.common.joint_views.inflate(pipeline.unet, latent_stride=pipeline.latent_stride) to join its views"
)

Denoiser = TypeVar("Denoiser", bound=ModelMixin)


class JointAttention(Attention):
    """diffusers' attention, in which the tokens of all views of a sample attend to each other by any processor.

    Its parameters and their names are those of the base class. Takes `num_views` through `cross_attention_kwargs`;
    with `join=False` (text cross-attention) it accepts the argument and attends per view.

    Example:
        >>> import torch
        >>> attention = make_joint(Attention(query_dim=8, heads=2, dim_head=4), join=True)
        >>> attention.set_processor(AttnProcessor2_0())  # another kernel; the views stay joined
        >>> attention(torch.zeros(6, 16, 8), num_views=3).shape  # two samples of three views
        torch.Size([6, 16, 8])

    Attributes:
        join: whether the views meet here.
        latent_stride: image pixels per latent cell side, where it is known.
    """

    join: bool
    latent_stride: int | None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_views: int = 1,
        **options: Any,
    ) -> Tensor:
        """Attend over the joined tokens `b (v n) c` where `join` is set; `options` are for the processor.

        Raises:
            ShapeError: if `num_views` does not divide the batch.
        """
        if not self.join:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **options)
        if hidden_states.shape[0] % num_views:
            raise ShapeError(
                "cross_attention_kwargs['num_views']",
                expected=f"a divisor of the batch {hidden_states.shape[0]} = samples x views",
                got=str(num_views),
            )
        hidden_states = rearrange(hidden_states, "(b v) n c -> b (v n) c", v=num_views)
        hidden_states = super().forward(hidden_states, encoder_hidden_states, attention_mask, **options)
        return rearrange(hidden_states, "b (v n) c -> (b v) n c", v=num_views)


def make_joint(attention: nn.Module, *, join: bool, latent_stride: int | None = None) -> JointAttention:
    """Turn one attention of diffusers into a `JointAttention`, in place; its weights and processor stay.

    Args:
        attention: an `Attention` or one that was turned already.
        join, latent_stride: see `JointAttention`.

    Raises:
        TypeError: for a module of another class.
    """
    turn_into(JointAttention, {"attention": attention})
    assert isinstance(attention, JointAttention)
    attention.join, attention.latent_stride = join, latent_stride
    if isinstance(attention.processor, JointViewAttnProcessor):
        attention.set_processor(attention.processor.kernel())
    return attention


class JointViewAttnProcessor:
    """The joint attention of earlier releases, in which the processor joined the views; `inflate` replaces it.

    Models that were pickled by them hold it. In its first call it turns its attention into a `JointAttention`.
    """

    def __init__(self, *, join: bool, use_xformers: bool = False, latent_stride: int | None = None) -> None:
        warnings.warn(
            "JointViewAttnProcessor is replaced by cameo.adapters.common.joint_views.inflate(unet), which joins the "
            "views by any processor; the next release drops it",
            FutureWarning,
            stacklevel=2,
        )
        self.join, self.use_xformers, self.latent_stride = join, use_xformers, latent_stride

    def kernel(self) -> Any:
        """Return the processor that attends without joining."""
        return XFormersOnCudaAttnProcessor() if self.use_xformers else AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        num_views: int = 1,
    ) -> Tensor:
        """Attend as the `JointAttention` that `attn` becomes."""
        joint = make_joint(attn, join=self.join, latent_stride=self.latent_stride)
        return JointAttention.forward(joint, hidden_states, encoder_hidden_states, attention_mask, num_views)


def inflate(unet: Denoiser, *, use_xformers: bool = False, latent_stride: int | None = None) -> Denoiser:
    """Let every self-attention of a U-Net or `JointDiT` attend across views, in place; the weights stay as they are.

    `latent_stride` (image pixels per latent cell side, 8 for the VAE of Stable Diffusion) tells the layers their token
    grid for an image size, which `CameoModel.token_grid` needs. Each forward then takes the number of views of a
    sample, in `cross_attention_kwargs`; without it every view is taken as a sample of its own.
    `docs/guides/your_own_loop.md` shows the steps from here to a training loop.

    The attention kernels stay as they are, and diffusers' switches for them can be used before and after: attention
    slicing, xformers, other attention processors.

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

    Args:
        unet: a model of diffusers whose attentions are of its class `Attention`.
        use_xformers: attend by xformers' kernel on CUDA.
        latent_stride: see above.

    Raises:
        TypeError: for attentions of another class, which may join the views in their own way.
    """
    paths = [name.removesuffix(".processor") for name in unet.attn_processors]
    attentions = {path: unet.get_submodule(path) for path in paths}
    turn_into(JointAttention, attentions)
    for path, attention in attentions.items():
        make_joint(attention, join=path.endswith("attn1"), latent_stride=latent_stride)
    if use_xformers:
        set_kernel(unet, xformers=True)
    return unet


def joins_views(attention: nn.Module) -> bool:
    """Whether the tokens of all views of a sample meet in this attention, by this module."""
    joint = attention if isinstance(attention, JointAttention) else getattr(attention, "processor", None)
    return isinstance(joint, JointAttention | JointViewAttnProcessor) and joint.join


def latent_stride_of(attention: nn.Module) -> int | None:
    """Image pixels per latent cell side that an attention of this module was given; None without one."""
    joint = attention if isinstance(attention, JointAttention) else getattr(attention, "processor", None)
    return joint.latent_stride if isinstance(joint, JointAttention | JointViewAttnProcessor) else None


def check_joined(unet: nn.Module, *, cure: str = INFLATE) -> None:
    """Refuse a denoiser whose views are apart; `cure` is what the error recommends.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("cat3d").build("tiny").unet
        >>> unet.set_attn_processor(AttnProcessor2_0())
        >>> check_joined(unet)
        >>> check_joined(type(unet).from_config(unet.config))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        RuntimeError: the self-attention down_blocks.1.attentions.0.transformer_blocks.0.attn1 sees one view ...

    Raises:
        RuntimeError: names the layer and the cure.
    """
    for name, module in unet.named_modules():
        if name.endswith("attn1") and not joins_views(module):
            raise RuntimeError(
                f"the self-attention {name} sees one view at a time, since the denoiser was set after the pipeline was "
                f"built. Build a pipeline around it, or call {cure}"
            )
