"""The Triton kernels of the alignment head in Triton's interpreter, against float64 autograd in plain torch."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special
from torch import Tensor

from cameo.correspondence.neighbors.triton_support import refusal
from cameo.errors import ShapeError

pytest.importorskip("triton", reason="Triton is not installed")

from cameo.alignment import triton_heads
from tests.helpers import triton_interpreter
from tests.helpers.triton_interpreter import Interpreter

SCALE = 0.3
# Relative to the float64 result, in the Euclidean norm; the interpreter rounds operands to TF32 as the GPU does.
# Largest seen 1.6e-6, for a gradient of the bias that is a small sum of large terms, where torch in float32 is 1.7e-6
# off.
TOLERANCE = 3e-6
FAST_TOLERANCE = 1e-5


def make_rows(count: int, columns: int, targets: int, *, excluded: bool) -> dict[str, Any]:
    """Rows with several targets each, the second row without any."""
    hidden = columns // 3
    first = torch.randint(0, hidden + 1, (count,))
    ranges = torch.stack([first, first + (torch.rand(count) * (hidden - first)).long()], dim=1)
    weights = torch.rand(count, targets) + 0.1
    weights[1] = 0
    weights[2, 1:] = 0
    index = torch.randint(hidden if excluded else 0, columns, (count, targets))
    return {"targets": index, "weights": weights, "excluded": ranges if excluded else None}


def make_head(heads: int, units: int) -> list[Tensor]:
    return [torch.randn(units, heads) / heads**0.5, torch.randn(units) * 0.3, torch.randn(units) / units**0.5]


def scores_of(logits: Tensor, parameters: list[Tensor], scale: float = SCALE) -> Tensor:
    weight_in, bias, weight_out = parameters
    return torch.einsum(
        "m,mrc->rc", weight_out, F.gelu(torch.einsum("mk,krc->mrc", weight_in, scale * logits) + bias[:, None, None])
    )


def losses_of(scores: Tensor, rows: dict[str, Any]) -> Tensor:
    """Losses [R] of scores [R, M]."""
    if rows["excluded"] is not None:
        column = torch.arange(scores.shape[1])
        scores = scores.masked_fill(
            (column >= rows["excluded"][:, :1]) & (column < rows["excluded"][:, 1:]), -torch.inf
        )
    distance = scores.logsumexp(dim=1, keepdim=True) - scores.gather(1, rows["targets"])
    weights = rows["weights"].to(scores.dtype)
    return torch.where(weights != 0, weights * distance, 0).sum(dim=1)


def expected_mlp(
    logits: Tensor, parameters: list[Tensor], rows: dict[str, Any], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Losses, and the gradients of logits and parameters, computed in `dtype`."""
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (logits, *parameters)]
    losses = losses_of(scores_of(leaves[0], leaves[1:]), rows)
    losses.sum().backward()
    return [losses.detach(), *(leaf.grad for leaf in leaves)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def run_mlp(
    interpreted: Interpreter, logits: Tensor, parameters: list[Tensor], rows: dict[str, Any], gelu: str = "exact"
) -> list[Tensor]:
    """Losses, and the gradients of logits and parameters."""
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    return list(interpreted(triton_interpreter.mlp_rows, logits, parameters, SCALE, rows, sums, gelu))


def check_mlp(
    interpreted: Interpreter, logits: Tensor, parameters: list[Tensor], rows: dict[str, Any], gelu: str = "exact"
) -> list[Tensor]:
    tolerance = TOLERANCE if gelu == "exact" else FAST_TOLERANCE
    found = run_mlp(interpreted, logits, parameters, rows, gelu)
    names = ("losses", "logits", "weight_in", "bias", "weight_out")
    for name, tensor, expected in zip(names, found, expected_mlp(logits, parameters, rows), strict=True):
        assert error(tensor, expected) <= tolerance, name
    return found


@pytest.mark.parametrize("heads", [1, 5, 8, 10, 20, 32])
def test_losses_and_gradients_match_float64(interpreted: Interpreter, heads: int) -> None:
    torch.manual_seed(heads)
    columns = 19 if heads <= 10 else 10
    logits = torch.randn(heads, 3, columns) * 5
    found = check_mlp(interpreted, logits, make_head(heads, 4 * heads), make_rows(3, columns, 2, excluded=True))
    assert found[0][1] == 0
    assert (found[1][:, 1] == 0).all()


@pytest.mark.parametrize(("heads", "units"), [(5, 3), (10, 23), (17, 96)])
def test_any_hidden_size(interpreted: Interpreter, heads: int, units: int) -> None:
    torch.manual_seed(units)
    check_mlp(interpreted, torch.randn(heads, 3, 10) * 5, make_head(heads, units), make_rows(3, 10, 3, excluded=False))


def test_many_hidden_units_are_shared_among_programs() -> None:
    assert triton_heads.HeadPlan(17, 96).groups == 2
    assert triton_heads.HeadPlan(20, 80).groups == 1


@pytest.mark.parametrize("columns", [1, 32, 70])
def test_any_number_of_columns(interpreted: Interpreter, columns: int) -> None:
    torch.manual_seed(columns)
    rows = make_rows(3, columns, 2, excluded=False)
    logits, head = torch.randn(5, 3, columns) * 5, make_head(5, 20)
    losses, gradient, *_ = run_mlp(interpreted, logits, head, rows)
    expected = expected_mlp(logits, head, rows)
    torch.testing.assert_close(losses.double(), expected[0], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [5, 10])
def test_half_precision_is_closer_than_the_dense_path(interpreted: Interpreter, heads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(heads)
    logits, parameters = (torch.randn(heads, 3, 19) * 5).to(dtype), make_head(heads, 4 * heads)
    rows = make_rows(3, 19, 2, excluded=True)
    found = run_mlp(interpreted, logits, parameters, rows)
    assert found[1].dtype == dtype
    true = expected_mlp(logits, parameters, rows)
    for tensor, dense, expected in zip(found, expected_mlp(logits, parameters, rows, dtype), true, strict=True):
        assert error(tensor, expected) <= error(dense, expected)
    # The loss is not stored in half precision, and the gradients of the weights keep the 11 bits of TF32.
    assert error(found[0], true[0]) <= TOLERANCE
    for tensor, expected in zip(found[2:], true[2:], strict=True):
        assert error(tensor, expected) <= 2**-11


def test_fast_gelu(interpreted: Interpreter) -> None:
    torch.manual_seed(0)
    logits, parameters, rows = torch.randn(5, 3, 19) * 5, make_head(5, 20), make_rows(3, 19, 2, excluded=True)
    fast = check_mlp(interpreted, logits, parameters, rows, "fast")
    exact = check_mlp(interpreted, logits, parameters, rows)
    assert not torch.equal(fast[0], exact[0])


def minimax(degree: int, limit: float = 5.5) -> np.polynomial.Polynomial:
    """P of x * P(x * x) ~ log2 of the odds of the normal distribution, of least error of the GELU on 0 to limit.

    Lawson's iteration: least squares, where each place weighs more the more it was off.
    """
    x = np.cos(np.linspace(0, np.pi / 2, 2001)[:-1]) * limit
    target = (special.log_ndtr(-x) - special.log_ndtr(x)) / np.log(2) / x
    slope = x * x * special.ndtr(x) * special.ndtr(-x) * np.log(2)
    basis = np.polynomial.chebyshev.chebvander(2 * x**2 / limit**2 - 1, degree)
    importance = np.ones_like(x)
    for _ in range(60):
        factor = np.sqrt(importance) * slope
        coefficients = np.linalg.lstsq(basis * factor[:, None], target * factor, rcond=None)[0]
        importance *= np.abs((basis @ coefficients - target) * slope)
        importance /= importance.sum()
    series = np.polynomial.Chebyshev(coefficients, domain=[0, limit**2])
    return series.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1])


@pytest.mark.parametrize(("fast", "degree", "stated"), [(False, 7, 6e-7), (True, 5, 1.2e-6)])
def test_gelu_has_the_stated_error(interpreted: Interpreter, fast: bool, degree: int, stated: float) -> None:
    x = torch.linspace(-12, 12, 1 << 17)
    found = interpreted(triton_interpreter.gelu, x, fast).double()
    true = x.double() * torch.from_numpy(special.ndtr(x.double().numpy()))
    # Not compared with torch's GELU, whose error depends on the processor: between 3.7e-7 and 1.2e-6 were seen.
    assert float((found - true).abs().max()) <= stated
    # The coefficients are those of the best polynomial: the same function up to the rounding of float32.
    square = np.minimum(x.double().numpy() ** 2, 5.5**2)
    fitted = x.double().numpy() * special.expit(-np.log(2) * x.double().numpy() * minimax(degree)(square))
    assert np.abs(found.numpy() - fitted).max() <= 8e-7


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    ("copies", "columns", "dtype"), [(1, 21, torch.float32), (3, 1100, torch.float32), (2, 40, torch.bfloat16)]
)
def test_softmax_rows(interpreted: Interpreter, copies: int, columns: int, dtype: torch.dtype, gradients: bool) -> None:
    torch.manual_seed(columns)
    count = 37 if columns < 100 else 3
    logits, rows = (torch.randn(copies, count, columns) * 5).to(dtype), make_rows(count, columns, 3, excluded=True)
    leaf = logits.double().requires_grad_()
    expected = sum(losses_of(SCALE * part, rows) for part in leaf) / copies
    expected.sum().backward()
    losses, gradient = interpreted(triton_interpreter.softmax_rows, logits, SCALE, rows, gradients)
    assert error(losses, expected.detach()) <= TOLERANCE
    if gradients:
        assert error(gradient, leaf.grad) <= {torch.float32: TOLERANCE, torch.bfloat16: 2**-8}[dtype]
    else:
        assert torch.equal(gradient, logits)


def test_losses_alone_leave_the_logits(interpreted: Interpreter) -> None:
    torch.manual_seed(0)
    logits, parameters, rows = torch.randn(5, 3, 10), make_head(5, 20), make_rows(3, 10, 2, excluded=False)
    losses, after = interpreted(triton_interpreter.mlp_rows, logits, parameters, SCALE, rows, None, "exact")
    assert error(losses, expected_mlp(logits, parameters, rows)[0]) <= TOLERANCE
    assert torch.equal(after, logits)


def test_rows_without_a_weight_may_hold_anything(interpreted: Interpreter) -> None:
    torch.manual_seed(0)
    logits, parameters, rows = torch.randn(5, 3, 10), make_head(5, 20), make_rows(3, 10, 2, excluded=False)
    expected = expected_mlp(logits, parameters, rows)
    logits[:, 1] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(4)[:10]
    for found, wanted in zip(run_mlp(interpreted, logits, parameters, rows), expected, strict=True):
        assert error(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_number_in_a_supervised_row_shows(interpreted: Interpreter, value: float) -> None:
    torch.manual_seed(0)
    logits, parameters, rows = torch.randn(5, 3, 10), make_head(5, 20), make_rows(3, 10, 2, excluded=False)
    logits[2, 0, 4] = value
    losses, _ = interpreted(triton_interpreter.mlp_rows, logits, parameters, SCALE, rows, None, "exact")
    assert losses.isfinite().tolist() == [False, True, True]
    single = torch.randn(1, 3, 10)
    single[0, 0, rows["targets"][0, 0]] = value
    losses, _ = interpreted(triton_interpreter.softmax_rows, single, SCALE, rows, True)
    assert losses.isfinite().tolist() == [False, True, True]


def test_the_default_dtype_does_not_matter(interpreted: Interpreter) -> None:
    torch.manual_seed(0)
    logits, parameters = torch.randn(5, 6, 21), make_head(5, 20)
    rows = make_rows(6, 21, 2, excluded=True)
    results = []
    for default in (torch.bfloat16, torch.float32):
        interpreted(torch.set_default_dtype, default)
        try:
            sums = [torch.zeros_like(one) for one in parameters]
            results.append(interpreted(triton_interpreter.mlp_rows, logits, parameters, SCALE, rows, sums, "exact"))
            results[-1] += (interpreted(triton_interpreter.softmax_rows, logits, SCALE, rows, True)[0],)
        finally:
            interpreted(torch.set_default_dtype, torch.float32)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_rows(interpreted: Interpreter) -> None:
    rows = {"targets": torch.zeros(0, 1, dtype=torch.int64), "weights": torch.zeros(0, 1), "excluded": None}
    losses, _, *sums = run_mlp(interpreted, torch.zeros(5, 0, 11), make_head(5, 20), rows)
    assert losses.shape == (0,)
    assert not any(total.any() for total in sums)
    losses, _ = interpreted(triton_interpreter.softmax_rows, torch.zeros(1, 0, 11), SCALE, rows, True)
    assert losses.shape == (0,)


def test_the_same_bits_on_every_run(interpreted: Interpreter) -> None:
    torch.manual_seed(0)
    logits, parameters, rows = torch.randn(5, 14, 19), make_head(5, 20), make_rows(14, 19, 2, excluded=True)
    first = run_mlp(interpreted, logits, parameters, rows)
    # Gradients are added to the given tensors, so a second call gives exactly twice as much.
    second = interpreted(triton_interpreter.mlp_rows, logits, parameters, SCALE, rows, first[2:], "exact")
    for one, other, times in zip(first, second, (1, 1, 2, 2, 2), strict=True):
        assert torch.equal(times * one, other)


def test_the_gradients_of_several_portions_are_added_once(interpreted: Interpreter) -> None:
    torch.manual_seed(0)
    logits, parameters, rows = torch.randn(5, 14, 19), make_head(5, 20), make_rows(14, 19, 2, excluded=True)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    found = interpreted(triton_interpreter.mlp_rows_in_parts, logits, parameters, SCALE, rows, sums, [9, 1, 4])
    for one, other in zip(found, expected_mlp(logits, parameters, rows), strict=True):
        assert error(one, other) < 1e-6


def test_rows_do_not_depend_on_where_they_stand(interpreted: Interpreter) -> None:
    torch.manual_seed(0)
    logits, parameters, rows = torch.randn(5, 14, 19), make_head(5, 20), make_rows(14, 19, 2, excluded=True)
    losses, gradient, *_ = run_mlp(interpreted, logits, parameters, rows)
    part = {name: tensor[9:] for name, tensor in rows.items()}
    part_losses, part_gradient, *_ = run_mlp(interpreted, logits[:, 9:].contiguous(), parameters, part)
    # Rows that stand elsewhere fall into other tiles, where the interpreter's matrix product, which is NumPy's, may sum
    # in another order: the same to rounding, not to the bit.
    assert error(part_losses, losses[9:]) <= TOLERANCE
    assert error(part_gradient, gradient[:, 9:]) <= TOLERANCE


def test_wrong_arguments() -> None:
    head, rows = make_head(5, 20), make_rows(3, 11, 2, excluded=False)
    rest = (SCALE, rows["targets"], rows["weights"], None, None)
    with pytest.raises(ValueError, match=r"unknown gelu 'tanh': Known: exact, fast"):
        triton_heads.mlp_rows(torch.zeros(5, 3, 11), *head, *rest, "tanh")
    with pytest.raises(ShapeError, match=r"logits: expected \[K, R, M\] with K from 1 to 32, got \[33, 3, 11\]"):
        triton_heads.mlp_rows(torch.zeros(33, 3, 11), *make_head(33, 20), *rest)
    with pytest.raises(ShapeError, match=r"logits: expected \[K, R, M\], contiguous"):
        triton_heads.mlp_rows(torch.zeros(5, 11, 3).mT, *head, *rest)
    with pytest.raises(ShapeError, match=r"weight_in: expected \[m, K\] = \[20, 4\], contiguous, got \[20, 5\]"):
        triton_heads.mlp_rows(torch.zeros(4, 3, 11), *head, *rest)
    with pytest.raises(ValueError, match=r"logits: expected float32, bfloat16 or float16, got torch\.float64"):
        triton_heads.softmax_rows(torch.zeros(1, 3, 11).double(), SCALE, rows["targets"], rows["weights"], None, False)
    with pytest.raises(ShapeError, match=r"weights: expected \[R, T\] = \[3, 2\]"):
        triton_heads.softmax_rows(torch.zeros(1, 3, 11), SCALE, rows["targets"], rows["weights"][:2], None, False)


def test_refusals_give_the_reason(interpreted: Interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, float32 = torch.device("cpu"), torch.device("cuda", 0), torch.float32
    assert "need a CUDA device" in str(refusal(cpu, float32, 8, 1))
    assert interpreted(triton_interpreter.refusal, cpu, float32, 32, 1) is None
    monkeypatch.setattr("cameo.correspondence.neighbors.triton_support._capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert "compute capability 7.5" in str(refusal(cuda, float32, 8, 1))
    monkeypatch.setattr("cameo.correspondence.neighbors.triton_support._capability", lambda device: (8, 0))
    assert refusal(cuda, torch.bfloat16, 8, 0) is None
    assert "torch.float64" in str(refusal(cuda, torch.float64, 8, 1))
    assert "at most 32" in str(refusal(cuda, float32, 33, 1))
    assert "depth=2" in str(refusal(cuda, float32, 8, 2))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in str(refusal(cuda, float32, 8, 1))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton is not installed" in str(refusal(cuda, float32, 8, 1))


def test_import_without_triton_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cameo.alignment.triton_heads", "cameo.alignment.triton_head_kernels"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="pip install triton"):
        importlib.import_module("cameo.alignment.triton_heads")
