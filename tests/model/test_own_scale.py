"""Layers whose logits have a scale of their own: the loss is that of the attention as the layer computes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo import alignment_loss
from tests.helpers.models import CHANNELS, GRID, HEADS, SAMPLES, VIEWS, JointModel, frames, next_view, split_heads

WIDTH = CHANNELS // HEADS


class Scaled(nn.Module):
    """Attention with `scale=` given to the kernel, or written out, or with normalized queries and keys and scale 1."""

    def __init__(self, kind: str, scale: float) -> None:
        super().__init__()
        self.heads, self.kind, self.scale = HEADS, kind, scale
        self.to_q, self.to_k, self.to_v = (nn.Linear(CHANNELS, CHANNELS, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (split_heads(linear(x), HEADS) for linear in (self.to_q, self.to_k, self.to_v))
        if self.kind == "normalized":
            query, key = self.norm_q(query), self.norm_k(key)
        self.seen = query.detach(), key.detach()
        if self.kind == "written out":
            output = ((query * self.scale) @ key.transpose(-1, -2)).softmax(dim=-1) @ value
        else:
            output = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return rearrange(output, "a k l d -> a l (k d)")


@pytest.mark.parametrize("kind", ["kernel", "written out", "normalized"])
@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_the_loss_has_the_scale_of_the_layer(kind: str, scale: float) -> None:
    torch.manual_seed(0)
    base = JointModel()
    base.joint = Scaled(kind, scale)
    model = cameo.wrap(base, layer="joint", layout="b (v h w)", head="mean")
    match = next_view()
    model(frames(), num_frames=VIEWS, correspondence=match)
    assert base.joint.seen is not None
    query, key = (
        rearrange(tensor, "b k (v n) d -> b k v n d", v=VIEWS, n=GRID[0] * GRID[1]) for tensor in base.joint.seen
    )
    # The definition, pair by pair: cross-entropy of the mean of the heads' logits, as the layer scales them.
    expected = []
    for b in range(SAMPLES):
        for i in range(VIEWS):
            j = (i + 1) % VIEWS
            logits = (scale * query[b, :, i] @ key[b, :, j].transpose(-1, -2)).mean(dim=0)
            expected.append(F.cross_entropy(logits, match.index[b, i, j]))
    torch.testing.assert_close(model.alignment_loss.detach(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)
    usual = alignment_loss(query, key, match, model.alignment_heads[0])
    assert abs(float(usual) - float(model.alignment_loss.detach())) > 1e-4, "the usual scale would pass too"
