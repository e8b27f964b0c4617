"""Hunyuan-DiT as a multi-view model: the self-attentions of diffusers' transformer attend to all views of a sample.

The paper's third model. It has no adapter of its own, since no multi-view weights or camera conditioning were
released: join the views, then describe the layer to `cameo.wrap`.
"""

from __future__ import annotations

import re

from diffusers import HunyuanDiT2DModel
from diffusers.models.attention_processor import Attention, HunyuanAttnProcessor2_0
from einops import rearrange
from torch import Tensor

from cameo.errors import ShapeError

__all__ = ["MultiViewHunyuanAttnProcessor", "join_views"]

SELF_ATTENTION = re.compile(r"blocks\.\d+\.attn1\.processor")


class MultiViewHunyuanAttnProcessor:
    """Attention processor in which the tokens of `num_views` consecutive images attend to each other.

    The attention itself is diffusers' `HunyuanAttnProcessor2_0`: query and key are normalized, then rotated by the
    position in their own image, so a token meets the same cell of another view at distance zero. The number of views
    is a setting of the processor, because the transformer passes no arguments of the caller on to it.

    Example:
        >>> import torch
        >>> attention = Attention(query_dim=8, heads=2, dim_head=4, processor=MultiViewHunyuanAttnProcessor(3))
        >>> attention(torch.zeros(6, 16, 8)).shape  # two samples of three views
        torch.Size([6, 16, 8])

    Raises:
        ShapeError: in the forward, if `num_views` does not divide the batch.
    """

    def __init__(self, num_views: int) -> None:
        if not isinstance(num_views, int) or num_views < 1:
            raise ValueError(f"num_views: expected an integer of at least 1, got {num_views!r}")
        self.num_views = num_views
        self._attend = HunyuanAttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
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
            image_rotary_emb = cosine.repeat(self.num_views, 1), sine.repeat(self.num_views, 1)
        hidden_states = rearrange(hidden_states, "(b v) l c -> b (v l) c", v=self.num_views)
        hidden_states = self._attend(
            attn, hidden_states, encoder_hidden_states, attention_mask, temb, image_rotary_emb=image_rotary_emb
        )
        return rearrange(hidden_states, "b (v l) c -> (b v) l c", v=self.num_views)


def join_views(transformer: HunyuanDiT2DModel, num_views: int) -> HunyuanDiT2DModel:
    """Let every self-attention of `transformer` attend across views, in place; the weights stay as they are.

    Afterwards the batch is `(b v)`, the views of a sample in consecutive order. Call it again for another number of
    views; `set_default_attn_processor()` and `fuse_qkv_projections()` separate the views again.

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
        ValueError: if there are no self-attentions named `blocks.N.attn1`.

    Source: the layer is of arXiv 2512.03045, which does not say how views are joined or where counting starts; here
    it starts at 0, as in the authors' code for the U-Net.
    """
    processors = getattr(transformer, "attn_processors", {})
    joined = {name: MultiViewHunyuanAttnProcessor(num_views) for name in processors if SELF_ATTENTION.fullmatch(name)}
    if not joined:
        raise ValueError(
            f"transformer: {type(transformer).__name__} has no self-attentions named blocks.N.attn1; expected "
            "diffusers' HunyuanDiT2DModel, for example the `transformer` of a HunyuanDiTPipeline"
        )
    transformer.set_attn_processor(processors | joined)
    return transformer
