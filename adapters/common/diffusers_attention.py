"""The class `Attention` of diffusers: subclasses of it put into a model, and the processors that are its kernels.

A subclass decides what attends to what, whichever processor is set; the processor is the kernel: xformers', PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers import ModelMixin
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn

__all__ = ["XFormersOnCudaAttnProcessor", "set_kernel", "turn_into"]


class XFormersOnCudaAttnProcessor:
    """Attention processor with xformers' kernel on CUDA and PyTorch's elsewhere, since xformers has none for the CPU.

    Example:
        >>> import torch
        >>> attention = Attention(query_dim=8, heads=2, dim_head=4, processor=XFormersOnCudaAttnProcessor())
        >>> attention(torch.zeros(2, 16, 8)).shape
        torch.Size([2, 16, 8])

    Args:
        attention_op: operator of xformers; None lets it choose.
    """

    def __init__(self, attention_op: Callable[..., Any] | None = None) -> None:
        self._on_cuda, self._elsewhere = XFormersAttnProcessor(attention_op), AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend as diffusers' own processors do."""
        kernel = self._on_cuda if hidden_states.is_cuda else self._elsewhere
        return kernel(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def set_kernel(
    unet: ModelMixin, *, xformers: bool, attention_op: Callable[..., Any] | None = None, inside: str = ""
) -> None:
    """Switch the kernel of a U-Net's attentions, in place: xformers' where it runs, or PyTorch's.

    Processors that hold weights, such as those of an IP-Adapter, stay.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("cat3d").build("tiny").unet
        >>> set_kernel(unet, xformers=True)
        >>> {type(processor).__name__ for processor in unet.attn_processors.values()}
        {'XFormersOnCudaAttnProcessor'}

    Args:
        unet: a model of diffusers with `set_attn_processor`.
        xformers: False goes back to PyTorch's kernel.
        attention_op: operator of xformers; None lets it choose.
        inside: only the attentions with this part in their names.
    """
    processors = unet.attn_processors
    kernel = XFormersOnCudaAttnProcessor(attention_op) if xformers else AttnProcessor2_0()
    unet.set_attn_processor(
        {name: kernel if inside in name and not isinstance(one, nn.Module) else one for name, one in processors.items()}
    )


def turn_into(kind: type[Attention], attentions: Mapping[str, nn.Module]) -> None:
    """Give attentions a subclass of their class, in place; their parameters and processors stay.

    Example:
        >>> class Scaled(Attention):
        ...     pass
        >>> attention = Attention(query_dim=8, heads=2, dim_head=4)
        >>> turn_into(Scaled, {"attn1": attention})
        >>> type(attention).__name__
        'Scaled'

    Args:
        kind: subclass of `Attention` without parameters of its own.
        attentions: by name, for the error. None is changed if one is refused.

    Raises:
        TypeError: for a module of another class, which may decide by itself what attends to what.
    """
    for name, attention in attentions.items():
        if type(attention) is not Attention and not isinstance(attention, kind):
            raise TypeError(f"{name}: expected diffusers' Attention, got {type(attention).__name__}")
    for attention in attentions.values():
        if not isinstance(attention, kind):
            attention.__class__ = kind
