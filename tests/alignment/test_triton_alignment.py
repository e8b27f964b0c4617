"""The alignment loss through the Triton kernels, in Triton's interpreter on the CPU, against the readable reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cameo.alignment import AlignmentHead, alignment_loss
from cameo.correspondence import Correspondence
from tests.helpers.alignment_inputs import PADDED, dense_from_logits, gradients, make_head, make_inputs

pytest.importorskip("triton", reason="Triton is not installed")

from tests.helpers.triton_interpreter import Interpreter

CELLS = ((1, 1),) * 4
CASES: list[dict[str, Any]] = [
    {},
    {"softness": 0.8},
    {"normalize": "all_views"},
    {"normalize": "all_views", "softness": 0.8},
    {"reduction": "released", "num_reference_views": 1},
    {"reduction": "sum", "normalize": "all_views", "token_grids": CELLS},
]
HEADS = [{}, {"depth": 0}, {"kind": "mean"}, {"kind": "none"}]


def triton_loss(
    tensors: dict[str, Tensor],
    token_grids: list[list[int]],
    head: dict[str, Any],
    weights: dict[str, Tensor],
    options: Any,
) -> list[Tensor]:
    """Loss and gradients; runs in the other process."""
    query, key = (tensors[name].requires_grad_() for name in ("query", "key"))
    grids = tuple((height, width) for height, width in token_grids)
    match = Correspondence(tensors["index"], grids, tensors["weight"], tensors["distance"])
    module = AlignmentHead(query.shape[1], **head)
    module.load_state_dict(weights)
    loss = alignment_loss(query, key, match, module, implementation="triton", **options)
    return [loss.detach(), *gradients(loss, query, key, module)]


def run(
    interpreted: Interpreter, query: Tensor, key: Tensor, match: Correspondence, head: AlignmentHead, **options: Any
) -> list[Tensor]:
    tensors = {"query": query.detach(), "key": key.detach(), "index": match.index}
    tensors |= {"weight": match.match_weight, "distance": match.distance}
    settings = {name: getattr(head, name) for name in ("kind", "depth", "expansion")}
    token_grids = [list(size) for size in match.token_grids]
    return interpreted(triton_loss, tensors, token_grids, settings, head.state_dict(), options)


def exactly(query: Tensor, key: Tensor, match: Correspondence, head: AlignmentHead, **options: Any) -> list[Tensor]:
    """The reference in float64, for the rounded inputs."""
    query, key = (tensor.detach().double().requires_grad_() for tensor in (query, key))
    head = AlignmentHead(head.num_heads, head.kind, head.depth, head.expansion).double()
    loss = alignment_loss(query, key, match, head, implementation="reference", **options)
    return [loss.detach(), *gradients(loss, query, key, head)]


def errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    pairs = zip(got, expected, strict=True)
    return [((one.double() - other).norm() / other.norm()).item() for one, other in pairs]


def make_float_head(heads: int, **settings: Any) -> AlignmentHead:
    return make_head(heads, **settings).float()


@pytest.mark.parametrize("settings", HEADS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_single_precision_equals_the_reference(
    interpreted: Interpreter, settings: dict[str, Any], case: dict[str, Any]
) -> None:
    options = dict(case)
    token_grids = options.pop("token_grids", PADDED)
    query, key, match = make_inputs(batch=1, token_grids=token_grids, dtype=torch.float32, weighted=True, dim=8)
    head = make_float_head(3, **settings)
    torch.manual_seed(7)  # the head that `exactly` draws
    expected = exactly(query, key, match, head, **options)
    assert max(errors(run(interpreted, query, key, match, head, **options), expected)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", HEADS, ids=str)
def test_half_precision_is_no_worse_than_the_dense_path(
    interpreted: Interpreter, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    """The dense path has logits of the same precision, and the same head in float32 above them.

    The kernels multiply half-precision logits in TF32, which is as precise as float16 itself.
    """
    query, key, match = make_inputs(batch=1, heads=5, token_grids=((4, 4),) * 3, dtype=dtype, dim=40)
    head = make_float_head(5, **settings)
    torch.manual_seed(7)
    expected = exactly(query, key, match, head)
    product = torch.einsum("bkixd,bkjyd->kbixjy", query, key)
    dense = dense_from_logits(product.float() * 40**-0.5, match, head)
    theirs = errors([dense.detach(), *gradients(dense, query, key, head)], expected)
    got = run(interpreted, query, key, match, head)
    ours = errors(got, expected)
    # The error of one loss varies by chance, so its bound is the rounding of the logits.
    assert ours[0] <= max(theirs[0], torch.finfo(dtype).eps)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine <= max(1.1 * other, torch.finfo(torch.float16).eps)
    for mine, other in zip(got[1:], expected[1:], strict=True):
        mine, flat = mine.double().flatten(), other.flatten()
        assert torch.cosine_similarity(mine, flat, dim=0) > 0.999
        assert abs((mine @ flat) / (flat @ flat) - 1) < torch.finfo(dtype).eps


def test_many_rows_of_little_weight_keep_their_gradient_in_float16(interpreted: Interpreter) -> None:
    query, key, match = make_inputs(batch=1, heads=2, token_grids=((4, 4),) * 3, dtype=torch.float16, weighted=True)
    head = make_float_head(2)
    assert match.match_weight is not None
    light = Correspondence(match.index, match.token_grids, match.match_weight * 1e-9)
    got = run(interpreted, query, key, light, head, reduction="sum")
    expected = run(interpreted, query, key, match, head, reduction="sum")
    for one, other in zip(got[3:], expected[3:], strict=True):
        torch.testing.assert_close(one * 1e9, other, rtol=1e-3, atol=1e-6)


def test_the_fast_gelu_is_a_named_option_within_its_bound(interpreted: Interpreter) -> None:
    query, key, match = make_inputs(batch=1, dtype=torch.float32)
    head = make_float_head(3)
    torch.manual_seed(7)
    expected = exactly(query, key, match, head)
    fast, exact = (run(interpreted, query, key, match, head, gelu=gelu) for gelu in ("fast", "exact"))
    assert any(not torch.equal(one, other) for one, other in zip(fast, exact, strict=True))
    assert max(errors(fast, expected)) < 1e-5


def test_the_same_bits_again(interpreted: Interpreter) -> None:
    query, key, match = make_inputs(dtype=torch.bfloat16)
    first, second = (run(interpreted, query, key, match, make_float_head(3)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_deep_head_is_refused_with_the_reason(interpreted: Interpreter) -> None:
    query, key, match = make_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="depth=2; the Triton kernels take one hidden layer at most"):
        run(interpreted, query, key, match, make_float_head(3, depth=2))
