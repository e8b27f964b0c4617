"""The chunked implementation against the readable reference, for portions of any size."""

from __future__ import annotations

import cProfile
import itertools
import pstats
from typing import Any

import pytest
import torch
from torch import Tensor

from cameo.alignment import AlignmentHead, alignment_loss, heads, rows, supervision_weights, sweep
from cameo.alignment.rows import plan_rows
from cameo.alignment.supervision import Window
from cameo.correspondence import Correspondence
from tests.helpers.alignment_inputs import PADDED, dense_from_logits, dense_loss, gradients, make_head, make_inputs
from tests.helpers.memory import memory_of

# Pairs at once, pairs whose hidden units are held at once, keys at once.
PORTIONS = {"as it is": None, "row by row": (1, 1, 5), "some rows": (40, 13, 7), "side by side": (4000, 30, 6)}


@pytest.fixture(params=PORTIONS)
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if PORTIONS[request.param] is not None:
        products, hidden, keys = PORTIONS[request.param]
        monkeypatch.setattr(sweep, "CPU_PRODUCTS", products)
        monkeypatch.setattr(heads, "CPU_HIDDEN", hidden)
        monkeypatch.setattr(sweep, "KEYS_AT_ONCE", keys)
        monkeypatch.setattr(rows, "LEAST_ROWS", 1)
    return request.param


def both(query: Tensor, key: Tensor, match: Correspondence, head: AlignmentHead, **options: Any) -> list[tuple]:
    """Pairs `(chunked, reference)` of the loss and of each gradient."""
    found = []
    for implementation in ("chunked", "reference"):
        loss = alignment_loss(query, key, match, head, implementation=implementation, **options)
        found.append((loss, *gradients(loss, query, key, head)))
    return list(zip(*found, strict=True))


MODES: list[dict[str, Any]] = [
    {},
    {"softness": 0.8, "reduction": "sum"},
    {"normalize": "all_views"},
    {"normalize": "all_views", "softness": 0.8},
    {"reduction": "released", "num_reference_views": 1, "softness": 1.5},
]
HEADS = [
    {},
    {"depth": 0},
    {"depth": 2, "expansion": 2},
    {"depth": 3, "expansion": 1},
    {"kind": "mean"},
    {"kind": "none"},
]


@pytest.mark.parametrize("token_grids", [((2, 3),) * 4, PADDED], ids=["one grid", "four grids"])
@pytest.mark.parametrize("settings", HEADS, ids=str)
def test_equals_the_reference(cut: str, token_grids: tuple[tuple[int, int], ...], settings: dict[str, Any]) -> None:
    for seed, options in enumerate(MODES):
        query, key, match = make_inputs(token_grids=token_grids, weighted=bool(seed % 2), seed=seed)
        for got, expected in both(query, key, match, make_head(**settings), scale=0.7, **options):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13, msg=f"{options}: {got} {expected}")


@pytest.mark.parametrize("settings", HEADS, ids=str)
def test_one_token_per_view_equals_the_reference(cut: str, settings: dict[str, Any]) -> None:
    query, key, match = make_inputs(batch=12, token_grids=((1, 1),) * 5)
    for got, expected in both(query, key, match, make_head(**settings), normalize="all_views"):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_the_cuts_do_what_they_say(cut: str) -> None:
    _, _, match = make_inputs(token_grids=PADDED, batch=3)
    weights = supervision_weights(match)
    pairs = sweep.CPU_PRODUCTS
    plan = list(
        plan_rows(
            match.index,
            weights,
            PADDED,
            normalize="per_view",
            softness=0,
            pairs=pairs,
            most_pairs=pairs,
            most_tokens=pairs,
        )
    )
    assert sum(int((part.weights > 0).sum()) for part in plan) == int(match.matched.sum())
    shapes = [part.queries.shape for part in plan]
    assert all(
        shape.numel() * part.keys <= pairs or shape.numel() == 1 for part, shape in zip(plan, shapes, strict=True)
    )
    if cut == "row by row":
        assert all(shape.numel() == 1 for shape in shapes)
    if cut in ("side by side", "as it is"):
        assert max(shape[0] for shape in shapes) > 1


@pytest.mark.parametrize("normalize", ["per_view", "all_views"])
def test_soft_targets_are_a_gaussian_on_the_token_grid(normalize: str) -> None:
    """Against dense targets by the definition, one match after the other."""
    softness, token_grids = 0.8, ((3, 4), (2, 3), (3, 4))
    query, key, match = make_inputs(batch=1, token_grids=token_grids, weighted=True, visible=0.3)
    head, expected, total = make_head(), torch.zeros((), dtype=torch.float64), 0.0
    assert match.match_weight is not None
    for b, i, j, x in match.matched.nonzero().tolist():
        height, width = token_grids[j]
        row, column = divmod(match.index[b, i, j, x].item(), width)
        shares = {}
        for r, c in itertools.product(range(height), range(width)):
            squared = (r - row) ** 2 + (c - column) ** 2
            if squared <= (3 * softness) ** 2:
                shares[r * width + c] = torch.tensor(-squared / (2 * softness**2)).double().exp().item()
        weight = match.match_weight[b, i, j, x].item()
        total += weight
        for token, share in shares.items():
            single = torch.full_like(match.index, -1)
            single[b, i, j, x] = token
            part = dense_loss(query, key, Correspondence(single, token_grids), head, 0.5, normalize)
            expected = expected + weight * share / sum(shares.values()) * part
    for implementation in ("reference", "chunked"):
        options = {"scale": 0.5, "normalize": normalize, "softness": softness, "implementation": implementation}
        got = alignment_loss(query, key, match, head, **options)
        torch.testing.assert_close(got, expected / total, rtol=1e-11, atol=0)


def test_a_narrow_gaussian_is_one_token() -> None:
    query, key, match = make_inputs()
    head = make_head()
    assert alignment_loss(query, key, match, head, softness=0.3) == alignment_loss(query, key, match, head)
    assert len(Window([(4, 4)], 0.34).offsets) == 5


def test_single_precision_stays_within_its_bounds() -> None:
    query, key, match = make_inputs(batch=1, heads=10, token_grids=((12, 12),) * 3, dim=64, seed=3)
    head = make_head(heads=10)
    exact = both(query, key, match, head)
    query32, key32 = (tensor.detach().float().requires_grad_() for tensor in (query, key))
    loss = alignment_loss(query32, key32, match, head.float(), implementation="chunked")
    for (_, expected), got in zip(exact, (loss, *gradients(loss, query32, key32, head)), strict=True):
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error < 1e-5


def test_half_precision_is_no_worse_than_a_dense_path_in_half_precision() -> None:
    """The dense path rounds its logits; this one rounds inputs and gradients only. Compares error, angle and bias."""
    query, key, match = make_inputs(batch=1, heads=8, token_grids=((8, 8),) * 3, dim=40, seed=4, dtype=torch.bfloat16)
    head = make_head(heads=8)
    exact_query, exact_key = (tensor.detach().double().requires_grad_() for tensor in (query, key))
    loss = alignment_loss(exact_query, exact_key, match, head, implementation="reference")
    expected = gradients(loss, exact_query, exact_key, head)
    head = head.float()

    def errors(got: tuple[Tensor, ...]) -> list[Tensor]:
        return [(one.double() - other).norm() / other.norm() for one, other in zip(got, expected, strict=True)]

    loss = alignment_loss(query, key, match, head, implementation="chunked")
    ours = gradients(loss, query, key, head)
    product = torch.einsum(
        "bkixd,bkjyd->kbixjy", query, key
    )  # rounded to bfloat16, as a kernel without a fused softmax
    dense = dense_from_logits(product.float() * 40**-0.5, match, head)
    theirs = gradients(dense, query, key, head)
    for name, mine, other in zip(("query", "key", "w1", "b1", "w2"), errors(ours), errors(theirs), strict=True):
        assert mine <= other * 1.02, name
    for mine, other in zip(ours, expected, strict=True):
        mine, flat = mine.double().flatten(), other.flatten()
        assert torch.cosine_similarity(mine, flat, dim=0) > 0.9999
        # Rounding must not make the gradients longer or shorter on average.
        assert abs((mine @ flat) / (flat @ flat) - 1) < 1e-3


def test_the_workspace_is_bounded_and_the_gradient_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of torch's allocations beyond the inputs is that of the two gradients and the workspace."""
    monkeypatch.setattr(heads, "WORKSPACE_BYTES", 8 << 20)
    for side in (8, 24):
        query, key, match = make_inputs(batch=1, heads=5, token_grids=((side, side),) * 4, dim=32, dtype=torch.float32)
        head = make_head(heads=5).float()
        peak, _ = memory_of(lambda: gradients(alignment_loss(query, key, match, head), query, key, head))  # noqa: B023
        kept = query.nbytes + key.nbytes
        assert peak <= 1.25 * kept + (8 << 20)


@pytest.mark.parametrize("normalize", ["per_view", "all_views"])
def test_one_match_per_view_does_not_bring_all_keys_together(monkeypatch: pytest.MonkeyPatch, normalize: str) -> None:
    """Many groups of one row each have few pairs and many keys."""
    monkeypatch.setattr(heads, "WORKSPACE_BYTES", 1 << 20)
    query, key, match = make_inputs(batch=16, heads=5, token_grids=((8, 8),) * 4, dim=32, dtype=torch.float32)
    match.index[..., 1:] = -1
    head = make_head(heads=5).float()

    def run() -> None:
        gradients(alignment_loss(query, key, match, head, normalize=normalize), query, key, head)

    assert memory_of(run)[0] <= 1.25 * (query.nbytes + key.nbytes) + (1 << 20)


def test_planning_many_small_groups_takes_time_in_proportion() -> None:
    def calls(samples: int) -> int:
        _, _, match = make_inputs(batch=samples, token_grids=((1, 1),) * 3, visible=1.0)
        options = {"normalize": "all_views", "softness": 0, "pairs": 1 << 30, "most_pairs": 1 << 30}
        with cProfile.Profile() as profile:
            (rows,) = plan_rows(
                match.index, supervision_weights(match), match.token_grids, most_tokens=1 << 30, **options
            )
        assert len(rows.samples) == samples
        return pstats.Stats(profile).total_calls

    assert calls(400) < 6 * calls(100)


def test_strides_do_not_matter() -> None:
    query, key, match = make_inputs()
    head = make_head()
    packed = torch.stack([query, key]).detach().permute(0, 3, 1, 4, 5, 2).contiguous().permute(0, 2, 5, 1, 3, 4)
    assert packed.stride() != torch.stack([query, key]).stride()
    other_query, other_key = (one.requires_grad_() for one in packed.detach().unbind())
    for options in ({}, {"normalize": "all_views"}):
        got = alignment_loss(other_query, other_key, match, head, implementation="chunked", **options)
        expected = alignment_loss(query, key, match, head, implementation="chunked", **options)
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
        for pair in zip(
            gradients(got, other_query, other_key, head), gradients(expected, query, key, head), strict=True
        ):
            torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-15)


def test_the_same_numbers_again() -> None:
    query, key, match = make_inputs(dtype=torch.float32)
    head = make_head().float()
    first, second = (alignment_loss(query, key, match, head) for _ in range(2))
    assert torch.equal(first, second)
    for one, other in zip(gradients(first, query, key, head), gradients(second, query, key, head), strict=True):
        assert torch.equal(one, other)


class _Louder(AlignmentHead):
    def forward(self, logits: Tensor) -> Tensor:
        return 2 * super().forward(logits)


def test_a_head_of_another_class_takes_the_reference() -> None:
    query, key, match = make_inputs(heads=2)
    head = _Louder(2, kind="mean")
    plain = alignment_loss(query, key, match, AlignmentHead(2, kind="mean"), scale=1.0)
    assert alignment_loss(query, key, match, head, scale=0.5).item() == pytest.approx(plain.item())
    with pytest.raises(ValueError, match=r"chunked.*_Louder.*auto"):
        alignment_loss(query, key, match, head, implementation="chunked")


def test_a_weight_that_learns_takes_the_reference() -> None:
    query, key, match = make_inputs(weighted=True)
    assert match.match_weight is not None
    match.match_weight.requires_grad_()
    (gradient,) = torch.autograd.grad(alignment_loss(query, key, match, make_head()), match.match_weight)
    assert gradient.any()
    with pytest.raises(ValueError, match=r"chunked.*correspondence\.match_weight.*auto"):
        alignment_loss(query, key, match, make_head(), implementation="chunked")
    with torch.no_grad():
        alignment_loss(query, key, match, make_head(), implementation="chunked")


def test_transforms_of_torch_take_the_reference() -> None:
    query, key, match = make_inputs()
    head, source = make_head(), query.detach()

    def loss(query: Tensor, implementation: str = "auto") -> Tensor:
        return alignment_loss(query, key.detach(), match, head, implementation=implementation)

    (expected,) = torch.autograd.grad(loss(query), query)
    torch.testing.assert_close(torch.func.grad(loss)(source), expected, rtol=1e-10, atol=1e-14)
    _, slope = torch.func.jvp(loss, (source,), (source,))
    torch.testing.assert_close(slope, (expected * source).sum(), rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match=r"chunked.*torch\.func.*auto"):
        torch.func.grad(loss)(source, "chunked")


@pytest.mark.parametrize("settings", HEADS, ids=str)
def test_a_batch_without_samples_has_a_gradient(settings: dict[str, Any]) -> None:
    query, key, match = make_inputs(batch=0)
    for got, expected in both(query, key, match, make_head(**settings)):
        assert torch.equal(got, expected)


def test_triton_without_a_gpu_is_refused_with_the_reason() -> None:
    query, key, match = make_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"implementation='triton' cannot serve: .*CUDA device.*auto"):
        alignment_loss(query, key, match, make_head().float(), implementation="triton")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "chunk"}, "chunked"),
        ({"gelu": "tanh"}, "exact"),
        ({"softness": -1.0}, "softness: expected a finite number of tokens >= 0, got -1.0"),
        ({"softness": float("inf")}, "softness"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    query, key, match = make_inputs()
    with pytest.raises(ValueError, match=message):
        alignment_loss(query, key, match, make_head(), **options)
