"""One layer cut to self-view attention where it masks its attention, or has text of open length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from cameo import TokenLayout
from cameo.attention import KernelInputs
from cameo.attention.capture import AttentionLayer
from cameo.errors import CaptureError
from cameo.probing.ablation import self_view_only
from tests.helpers.attention_kernels import install_xformers
from tests.helpers.kernel_packages import install_flash

SAMPLES, VIEWS, GRID, HEADS, DIMENSION, TEXT = 2, 3, (2, 3), 2, 8, 4
TOKENS = GRID[0] * GRID[1]
LENGTH = TEXT + VIEWS * TOKENS
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
OF_VIEWS = torch.arange(VIEWS).repeat_interleave(TOKENS)
NO_VIEW = torch.full((TEXT,), -1)
FIRST, LAST = TokenLayout("b (t + v h w)", t=None), TokenLayout("b (v h w + t)", t=None)


class Model(nn.Module):
    """A layer that gets queries, keys and values `[A, K, L, D]`, and a mask that its kernel makes use of."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.layer.forward = attend

    def forward(self, *call: Tensor) -> Tensor:
        return self.layer(*call)


def random_call(length: int = LENGTH, rows: int = SAMPLES) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, rows, HEADS, length, DIMENSION, generator=torch.Generator().manual_seed(0))
    return query, key, value


def token_by_token(call: tuple[Tensor, ...], views: Tensor, kept: Tensor) -> Tensor:
    """Attention in float64, for each query over the keys that it sees. `views` `[A, L]`, `kept` `[A, L, L]`."""
    query, key, value = (tensor.double() for tensor in call)
    output = torch.zeros_like(query)
    for row, token in torch.cartesian_prod(*map(torch.arange, query.shape[::2])).tolist():
        view, other = views[row, token], views[row]
        seen = kept[row, token] & ((other == view) | (other == -1) | (view == -1))
        logits = torch.einsum("kd,kmd->km", query[row, :, token], key[row][:, seen]) * DIMENSION**-0.5
        output[row, :, token] = torch.einsum("km,kmd->kd", logits.softmax(-1), value[row][:, seen])
    return output


def check(
    attend: Attend, layout: TokenLayout, call: tuple[Tensor, ...], views: Tensor, kept: Tensor, **options: Any
) -> None:
    model, views = Model(attend), views.expand(len(call[0]), -1)
    kept = kept.expand(len(call[0]), call[0].shape[2], -1)
    layer = AttentionLayer(0, "layer", HEADS, layout, **options)
    whole = model(*call, kept)
    with self_view_only(model, layer, (GRID,) * VIEWS), torch.no_grad():
        cut = model(*call, kept)
    seen = kept.any(dim=-1)[:, None, :, None]  # what a query that sees nothing returns means nothing
    torch.testing.assert_close((cut * seen).double(), token_by_token(call, views, kept) * seen, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(cut * seen, whole * seen, atol=1e-3)
    assert torch.equal(model(*call, kept), whole)


def sdpa(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, kept[:, None])


def sdpa_rows(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    rows = (rearrange(x, "a k l d -> (a k) l d") for x in (q, k, v))
    mask = repeat(torch.zeros(kept.shape).masked_fill(~kept, -torch.inf), "a l m -> (a k) l m", k=HEADS)
    return rearrange(F.scaled_dot_product_attention(*rows, attn_mask=mask), "(a k) l d -> a k l d", k=HEADS)


def explicit(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    logits = q @ k.mT * DIMENSION**-0.5 + torch.zeros(kept.shape).masked_fill(~kept, -10000.0)[:, None]
    return logits.softmax(-1) @ v


def multihead(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """The projections are those that leave queries, keys and values as they are."""
    module = nn.MultiheadAttention(HEADS * DIMENSION, HEADS, bias=False, batch_first=True)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(HEADS * DIMENSION).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(HEADS * DIMENSION))
    mask = (~kept).repeat_interleave(HEADS, dim=0)
    output = module(*(rearrange(x, "a k l d -> a l (k d)") for x in (q, k, v)), attn_mask=mask)[0]
    return rearrange(output, "a l (k d) -> a k l d", k=HEADS)


def xformers(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    import xformers.ops

    bias = torch.zeros(kept.shape).masked_fill(~kept, -torch.inf)[:, None].expand(-1, HEADS, -1, -1)
    return xformers.ops.memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), bias).transpose(1, 2)


def dispatched(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=kept[:, None]).transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(a: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return kept[a, query, key]

    return flex_attention(q, k, v, block_mask=create_block_mask(seen, len(q), None, LENGTH, LENGTH, device="cpu"))


KERNELS = [sdpa, sdpa_rows, explicit, multihead, xformers, dispatched, flex]


def padded_text(where: slice) -> Tensor:
    kept = torch.ones(SAMPLES, 1, LENGTH, dtype=torch.bool)
    kept[1, :, where] = False
    return kept.expand(-1, LENGTH, -1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_the_mask_stays_and_text_of_open_length_is_seen(kernel: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    install_xformers(monkeypatch)
    views = torch.cat([OF_VIEWS, NO_VIEW])
    check(kernel, LAST, random_call(), views, padded_text(slice(-2, None)))
    some = torch.rand(SAMPLES, LENGTH, LENGTH, generator=torch.Generator().manual_seed(4)) < 0.7
    check(kernel, LAST, random_call(), views, some | torch.eye(LENGTH, dtype=torch.bool))


@pytest.mark.parametrize("kernel", [sdpa, sdpa_rows, explicit, multihead], ids=lambda kernel: kernel.__name__)
def test_views_that_follow_on_texts_of_unequal_length(kernel: Attend) -> None:
    """Lumina 2: the first sample has two tokens of text less, and two of padding at its end."""
    views = torch.stack([torch.cat([NO_VIEW[2:], OF_VIEWS, NO_VIEW[:2]]), torch.cat([NO_VIEW, OF_VIEWS])])
    kept = torch.ones(SAMPLES, LENGTH, LENGTH, dtype=torch.bool)
    kept[0, :, -2:] = False
    check(kernel, FIRST, random_call(), views, kept)
    check(kernel, FIRST, random_call(), torch.cat([NO_VIEW, OF_VIEWS]), kept[1:].expand(SAMPLES, -1, -1))


def test_open_text_without_a_mask() -> None:
    for layout, views in ((FIRST, [NO_VIEW, OF_VIEWS]), (LAST, [OF_VIEWS, NO_VIEW])):
        kept = torch.ones(1, LENGTH, LENGTH, dtype=torch.bool)
        check(lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v), layout, random_call(), torch.cat(views), kept)


def test_samples_that_attend_one_by_one() -> None:
    """Mochi: each sample without its padding."""
    lengths = LENGTH - 2, LENGTH

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        whole = torch.zeros_like(q)
        for i, end in enumerate(lengths):
            part = (t[i : i + 1, :, :end].clone() for t in (q, k, v))
            whole[i, :, :end] = F.scaled_dot_product_attention(*part)[0]
        return whole

    kept = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    both = kept[:, :, None] & kept[:, None]
    check(attend, LAST, random_call(), torch.cat([OF_VIEWS, NO_VIEW]), both)


@pytest.mark.parametrize("packaged", [False, True])
def test_causal_attention(packaged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_torch(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def of_flash(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)

    if packaged:
        install_flash(monkeypatch)
        from flash_attn import flash_attn_func
    kept = torch.ones(1, VIEWS * TOKENS, VIEWS * TOKENS, dtype=torch.bool).tril()
    call = random_call(VIEWS * TOKENS)
    check(of_flash if packaged else of_torch, TokenLayout("b (v h w)"), call, OF_VIEWS, kept)


def test_keys_that_heads_share() -> None:
    query, key, value = random_call()
    call = query, key[:, :1], value[:, :1]

    def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, kept[:, None], enable_gqa=True)

    model, kept = Model(attend), padded_text(slice(-2, None))
    with self_view_only(model, AttentionLayer(0, "layer", HEADS, LAST), (GRID,) * VIEWS):
        cut = model(*call, kept)
    shared = query, *(x.expand(-1, HEADS, -1, -1) for x in call[1:])
    views = torch.cat([OF_VIEWS, NO_VIEW]).expand(SAMPLES, -1)
    torch.testing.assert_close(cut.double(), token_by_token(shared, views, kept), rtol=1e-5, atol=1e-6)


def test_views_that_are_kept_apart() -> None:
    """Three frames of one camera after another; each row is one of two cameras."""
    layout, views = TokenLayout("(b v) (f h w)", f=VIEWS), OF_VIEWS
    model, call = Model(sdpa), random_call(VIEWS * TOKENS)
    kept = torch.ones(SAMPLES, VIEWS * TOKENS, VIEWS * TOKENS, dtype=torch.bool)
    with self_view_only(model, AttentionLayer(0, "layer", HEADS, layout), (GRID,) * 2 * VIEWS):
        cut = model(*call, kept)
    expected = token_by_token(call, views.expand(SAMPLES, -1), kept)
    torch.testing.assert_close(cut.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (AttentionLayer(0, "layer", HEADS, TokenLayout("b (v h w)", reference_keys=1)), "would see nothing"),
        (
            AttentionLayer(0, "layer", HEADS, LAST, kernel_inputs=KernelInputs(":q", ":k")),
            r'cannot be cut; switch the model to .*set_attention_backend\("native"\)',
        ),
    ],
)
def test_what_cannot_be_cut_says_so_before_the_forward(layer: AttentionLayer, message: str) -> None:
    with pytest.raises(CaptureError, match=message), self_view_only(Model(sdpa), layer, (GRID,) * VIEWS):
        pass


def test_too_few_tokens_beside_text_of_open_length() -> None:
    model, call = Model(lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v)), random_call(VIEWS * TOKENS - 1)
    with (
        pytest.raises(CaptureError, match=r"expected 18 queries and 18 keys .* got 17 and 17"),
        self_view_only(model, AttentionLayer(0, "layer", HEADS, LAST), (GRID,) * VIEWS),
    ):
        model(*call, call[0])
