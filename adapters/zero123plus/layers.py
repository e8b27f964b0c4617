"""Where the views meet in Zero123++: self-attentions that store the reference's tokens or read them.

Recognized are the attentions of this library and, by their structure, the processors of the published pipeline.

Axes: B samples, h w latent cells of one view; the canvas is six views in three rows of two. The reference has a grid
of its own.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn

from cameo.adapters.common.diffusers_attention import XFormersOnCudaAttnProcessor, set_kernel, turn_into
from cameo.adapters.common.unet_layers import levels_of, self_attentions
from cameo.attention.layout import TokenLayout

__all__ = [
    "LAYOUT",
    "RELEASED_REFERENCE_SIZE",
    "ReferenceAttention",
    "ReferenceAttnProcessor",
    "check_references",
    "find_attentions",
    "find_levels",
    "is_published",
    "latent_stride",
    "make_reference_attention",
    "reads_references",
    "reference_size",
    "set_reference_processors",
    "unet_name",
]

# The queries are tokens of the canvas; the keys are the same tokens, followed by those of the reference.
LAYOUT = TokenLayout("b (r h c w)", key="b (r h c w + h' w')", references_last=1, r=3, c=2)
RELEASED_STRIDE = 8  # of Stable Diffusion's VAE, on which the releases are built
RELEASED_REFERENCE_SIZE = (512, 512)  # height and width in pixels at which the releases encode the reference image
CURE = "cameo.adapters.zero123plus.set_reference_processors(unet)"


def find_attentions(model: nn.Module) -> dict[str, Any]:
    """List the self-attentions of a U-Net, or of the U-Net in the published wrapper, by path, in execution order.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> list(find_attentions(get_backbone("zero123plus").build("tiny").unet))[0]
        'down_blocks.1.attentions.0.transformer_blocks.0.attn1'
    """
    return self_attentions(model) or self_attentions(model, prefix="unet")


def find_levels(model: nn.Module) -> dict[str, int]:
    """How often the latents were halved at each of these attentions, by path."""
    return levels_of(model, find_attentions(model))


def unet_name(model: nn.Module) -> str:
    """Name of the U-Net in the published wrapper; empty for a U-Net itself."""
    return "" if self_attentions(model) else "unet"


class ReferenceAttention(Attention):
    """diffusers' attention that stores its tokens (`mode="w"`) or reads the stored ones (`mode="r"`), by any processor.

    The reference is handled here and not by the processor, which is only the kernel, so what switches kernels in
    diffusers (attention slicing, xformers, `set_attn_processor`) leaves it in sight. Parameters are those of the base
    class.

    The published processor removes a reference when it reads it, so that the recomputation under gradient
    checkpointing finds none. This class leaves it there, which makes checkpointed gradients exact.

    Attributes:
        name: key of this layer in `ref_dict`.
        reads: False for text cross-attention, which takes the arguments and ignores them.
        latent_stride: image pixels per latent cell, to tell the token grid for an image size.
        reference_size: height and width in pixels at which the reference image is encoded.
    """

    name: str
    reads: bool
    latent_stride: int
    reference_size: tuple[int, int]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mode: str | None = None,
        ref_dict: dict[str, Tensor] | None = None,
        is_cfg_guidance: bool = False,
        **options: Any,
    ) -> Tensor:
        """Attend; `mode` and `ref_dict` come from `cross_attention_kwargs`, `options` are for the processor."""
        if not self.reads:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **options)
        if is_cfg_guidance:
            raise ValueError("is_cfg_guidance: expected False, as in the published pipeline; double the batch instead")
        tokens = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if ref_dict is None or mode not in ("w", "r"):
            raise ValueError(
                f"cross_attention_kwargs: expected mode 'w' or 'r' and a ref_dict, got mode={mode!r}. Run the U-Net "
                "over the reference with mode='w', then over the canvas with mode='r' and the same ref_dict"
            )
        if mode == "w":
            ref_dict[self.name] = tokens
        elif self.name not in ref_dict:
            raise ValueError(
                f"cross_attention_kwargs['ref_dict']: holds no reference for {self.name}; run the U-Net over the "
                "reference image with mode='w' first"
            )
        else:
            tokens = torch.cat([tokens, ref_dict[self.name]], dim=1)
        return super().forward(hidden_states, tokens, attention_mask, **options)


def make_reference_attention(
    attention: nn.Module,
    name: str,
    *,
    reads: bool,
    latent_stride: int = RELEASED_STRIDE,
    reference_size: tuple[int, int] = RELEASED_REFERENCE_SIZE,
) -> ReferenceAttention:
    """Turn an attention of diffusers into a `ReferenceAttention`, in place; its weights stay.

    Its processor stays as the kernel; of a published one, or one of an earlier release, the kernel in it.

    Args:
        attention: an `Attention` or one that was turned already.
        name, reads, latent_stride, reference_size: see `ReferenceAttention`.

    Raises:
        TypeError: for a module of another class.
    """
    turn_into(ReferenceAttention, {name: attention})
    assert isinstance(attention, ReferenceAttention)
    attention.name, attention.reads = name, reads
    attention.latent_stride, attention.reference_size = latent_stride, reference_size
    if is_published(attention.processor):
        attention.set_processor(attention.processor.chained_proc)
    elif isinstance(attention.processor, ReferenceAttnProcessor):
        attention.set_processor(attention.processor.kernel)
    return attention


class ReferenceAttnProcessor:
    """What stored and read the references in earlier releases; `set_reference_processors` replaces it.

    Models that were pickled by them hold it. In its first call it turns its attention into a `ReferenceAttention`.
    """

    def __init__(
        self,
        name: str,
        *,
        reads: bool,
        kernel: Any = None,
        use_xformers: bool = False,
        latent_stride: int = RELEASED_STRIDE,
        reference_size: tuple[int, int] = RELEASED_REFERENCE_SIZE,
    ) -> None:
        warnings.warn(
            f"ReferenceAttnProcessor is replaced by {CURE}, which reads references by any processor; the next release "
            "drops it",
            FutureWarning,
            stacklevel=2,
        )
        self.name, self.reads = name, reads
        self.latent_stride, self.reference_size = latent_stride, reference_size
        self._kernel = AttnProcessor2_0() if kernel is None else kernel
        self._cuda_kernel = XFormersAttnProcessor() if use_xformers else None

    @property
    def kernel(self) -> Any:
        """The processor that attends."""
        return self._kernel if self._cuda_kernel is None else XFormersOnCudaAttnProcessor()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mode: str | None = None,
        ref_dict: dict[str, Tensor] | None = None,
        is_cfg_guidance: bool = False,
    ) -> Tensor:
        """Attend as the `ReferenceAttention` that `attn` becomes."""
        settings = {"latent_stride": self.latent_stride, "reference_size": self.reference_size}
        turned = make_reference_attention(attn, self.name, reads=self.reads, **settings)  # type: ignore[arg-type]
        return ReferenceAttention.forward(
            turned, hidden_states, encoder_hidden_states, attention_mask, mode, ref_dict, is_cfg_guidance
        )


def latent_stride(attention: nn.Module) -> int:
    """Image pixels per latent cell side that an attention of ours was given; otherwise that of the releases."""
    return getattr(_settings_of(attention), "latent_stride", RELEASED_STRIDE)


def reference_size(attention: nn.Module) -> tuple[int, int]:
    """Height and width in pixels at which the reference is encoded; of a published attention those of the releases."""
    return getattr(_settings_of(attention), "reference_size", RELEASED_REFERENCE_SIZE)


def _settings_of(attention: nn.Module) -> Any:
    return attention if isinstance(attention, ReferenceAttention) else getattr(attention, "processor", None)


def set_reference_processors(
    unet: UNet2DConditionModel,
    *,
    latent_stride: int = RELEASED_STRIDE,
    reference_size: tuple[int, int] = RELEASED_REFERENCE_SIZE,
    use_xformers: bool = False,
) -> UNet2DConditionModel:
    """Let the self-attentions of `unet` store and read references, in place; weights and kernels stay as they are.

    The caller then runs both passes; `ReferenceUNet` does it by itself. Whatever attention processors are set later,
    the references stay in sight, see `ReferenceAttention`.

    Example:
        >>> unet = UNet2DConditionModel(
        ...     sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8,
        ...     down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        ...     cross_attention_dim=8, attention_head_dim=4)
        >>> context, references = torch.zeros(1, 1, 8), {}
        >>> writing, reading = ({"mode": mode, "ref_dict": references} for mode in "wr")
        >>> _ = set_reference_processors(unet)(torch.zeros(1, 4, 8, 8), 0, context, cross_attention_kwargs=writing)
        >>> unet(torch.zeros(1, 4, 12, 8), 0, context, cross_attention_kwargs=reading).sample.shape
        torch.Size([1, 4, 12, 8])

    Raises:
        TypeError: for attentions of another class than diffusers' `Attention`.
    """
    attentions = {name: unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors}
    turn_into(ReferenceAttention, attentions)
    for name, attention in attentions.items():
        make_reference_attention(
            attention,
            name,
            reads=name.endswith("attn1.processor"),
            latent_stride=latent_stride,
            reference_size=reference_size,
        )
    if use_xformers:
        set_kernel(unet, xformers=True)
    return unet


def is_published(processor: Any) -> bool:
    """Whether this is a reference-only attention processor of the published pipeline, by its structure."""
    return hasattr(processor, "chained_proc") and hasattr(processor, "enabled")


def reads_references(attention: nn.Module) -> bool:
    """Whether this attention, ours or published, appends references to its keys."""
    settings = _settings_of(attention)
    if is_published(settings):
        return bool(settings.enabled)
    return isinstance(settings, ReferenceAttention | ReferenceAttnProcessor) and settings.reads


def check_references(unet: nn.Module) -> None:
    """Refuse a U-Net whose self-attentions do not read references.

    Raises:
        RuntimeError: names the layer and the cure.
    """
    for path, module in find_attentions(unet).items():
        if not reads_references(module):
            raise RuntimeError(
                f"the self-attention {path} sees no reference: its processor is "
                f"{type(getattr(module, 'processor', None)).__name__}, set after the U-Net was built. Call {CURE} to "
                "bring the references back"
            )
