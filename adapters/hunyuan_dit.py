"""Hunyuan-DiT as a multi-view model: the self-attentions of diffusers' transformer attend to all views of a sample.

The paper's third model. It has no adapter of its own, since no multi-view weights or camera conditioning were
released: join the views, then describe the layer to `cameo.wrap`.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

from diffusers import HunyuanDiT2DModel
from diffusers.models.attention_processor import Attention, HunyuanAttnProcessor2_0
from einops import rearrange
from torch import Tensor, nn

from cameo.adapters.common.diffusers_attention import turn_into
from cameo.errors import ShapeError

__all__ = ["MultiViewHunyuanAttention", "MultiViewHunyuanAttnProcessor", "join_views"]

SELF_ATTENTION = re.compile(r"blocks\.\d+\.attn1")


class MultiViewHunyuanAttention(Attention):
    """diffusers' attention in which the tokens of `num_views` consecutive images attend to each other.

    The processor stays diffusers' `HunyuanAttnProcessor2_0`, or whichever is set: query and key are normalized, then
    rotated by the position in their own image, so a token meets the same cell of another view at distance zero. The
    number of views is an attribute, because the transformer passes no arguments of the caller on to its attentions.

    Raises:
        ShapeError: in the forward, if `num_views` does not divide the batch.
    """

    num_views: int

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """Attend over the joined tokens `b (v l) c`; `image_rotary_emb` is (cos, sin), `[l, D]` each, of one image."""
        if hidden_states.shape[0] % self.num_views:
            raise ShapeError(
                "hidden_states",
                expected=f"a batch of samples x {self.num_views} views",
                got=hidden_states.shape,
                cure="Call join_views(transformer, num_views) with the number of views of this batch",
            )
        if image_rotary_emb is not None:
            cosine, sine = image_rotary_emb
            options["image_rotary_emb"] = cosine.repeat(self.num_views, 1), sine.repeat(self.num_views, 1)
        hidden_states = rearrange(hidden_states, "(b v) l c -> b (v l) c", v=self.num_views)
        hidden_states = super().forward(hidden_states, encoder_hidden_states, attention_mask, **options)
        return rearrange(hidden_states, "b (v l) c -> (b v) l c", v=self.num_views)


class MultiViewHunyuanAttnProcessor:
    """What joined the views in earlier releases; `join_views` replaces it.

    Models that were pickled by them hold it. In its first call it turns its attention into a
    `MultiViewHunyuanAttention`.
    """

    def __init__(self, num_views: int) -> None:
        warnings.warn(
            "MultiViewHunyuanAttnProcessor is replaced by cameo.adapters.hunyuan_dit.join_views(transformer, "
            "num_views), which joins the views by any processor; the next release drops it",
            FutureWarning,
            stacklevel=2,
        )
        self.num_views = num_views

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend as the `MultiViewHunyuanAttention` that `attn` becomes."""
        joined = _join(attn, self.num_views)
        return MultiViewHunyuanAttention.forward(
            joined, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )


def join_views(transformer: HunyuanDiT2DModel, num_views: int) -> HunyuanDiT2DModel:
    """Let every self-attention of `transformer` attend across views, in place; weights and processors stay.

    Afterwards the batch is `(b v)`, the views of a sample in consecutive order. Call it again for another number of
    views. The views stay joined whatever processor is set: `set_default_attn_processor()`, `fuse_qkv_projections()`.

    Example:
        >>> import cameo
        >>> transformer = HunyuanDiT2DModel(
        ...     num_attention_heads=2, attention_head_dim=8, hidden_size=16, num_layers=2, in_channels=4, patch_size=2,
        ...     cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=8, text_len=2, text_len_t5=2)
        >>> model = cameo.wrap(
        ...     join_views(transformer, num_views=4),
        ...     layer="blocks.1.attn1",  # the paper's is layer 32 of 40: blocks.32.attn1 of the released size
        ...     layout="b (v h w)",
        ...     stride=16,  # 8 pixels per latent cell, 2 cells per patch
        ... )
        >>> model.token_grid(512, 512)
        (32, 32)

    Raises:
        ValueError: if there are no self-attentions named `blocks.N.attn1`, or `num_views` is no positive integer.
        TypeError: if they are not of diffusers' class `Attention`.

    Source: the layer is of arXiv 2512.03045, which does not say how views are joined or where counting starts; here
    it starts at 0, as in the authors' code for the U-Net.
    """
    if not isinstance(num_views, int) or num_views < 1:
        raise ValueError(f"num_views: expected an integer of at least 1, got {num_views!r}")
    names = [name for name, _ in transformer.named_modules() if SELF_ATTENTION.fullmatch(name)]
    if not names:
        raise ValueError(
            f"transformer: {type(transformer).__name__} has no self-attentions named blocks.N.attn1; expected "
            "diffusers' HunyuanDiT2DModel, for example the `transformer` of a HunyuanDiTPipeline"
        )
    attentions = {name: transformer.get_submodule(name) for name in names}
    turn_into(MultiViewHunyuanAttention, attentions)
    for attention in attentions.values():
        _join(attention, num_views)
    return transformer


def _join(attention: nn.Module, num_views: int) -> MultiViewHunyuanAttention:
    turn_into(MultiViewHunyuanAttention, {"attn1": attention})
    assert isinstance(attention, MultiViewHunyuanAttention)
    attention.num_views = num_views
    if isinstance(attention.processor, MultiViewHunyuanAttnProcessor):
        attention.set_processor(HunyuanAttnProcessor2_0())
    return attention
