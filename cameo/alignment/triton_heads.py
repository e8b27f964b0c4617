"""The alignment head in Triton: the losses of some rows, and their logits overwritten with the gradient.

Axes: K heads, R rows (supervised queries), M columns (keys), T targets per row, m hidden units of the head.

A head with a hidden layer runs as three kernels over the flat list of R * M pairs, so that no tile is wasted on short
rows: the first computes the score of every pair; the second takes the softmax of every row and turns the scores into
their gradient; the third computes the gradient of every pair and sums the gradient of the weights in registers. The
partial sums of the programs are added in a fixed order, after the last rows, and nothing is atomic, so results are the
same bits on every run, whichever tuned configuration is chosen. Speed does not depend on how the pairs are cut into
rows, so neither does the tuning.

All matrix products run on tensor cores in TF32 with float32 sums. Weights, float32 logits and their gradients are
split into two TF32 parts and multiplied in three products, which keeps 21 bits; half-precision logits fit into one
part. A row of ones is appended to the logits, so that the bias is one more column of weight_in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cameo.choices import GELUS
from cameo.correspondence.neighbors.triton_support import (
    DTYPES,
    INSTALL_TRITON,
    MAX_HEADS,
    allow_products_over_eight,
    interpreted,
    refusal,
)
from cameo.errors import ShapeError, unknown_name

try:
    import triton

    from cameo.alignment.triton_head_kernels import (
        add_partial_kernel,
        gradient_kernel,
        pack_weights_kernel,
        scores_kernel,
        softmax_kernel,
    )
except ImportError as error:
    raise ImportError(f"cameo.alignment.triton_heads needs Triton: {INSTALL_TRITON}") from error

__all__ = [
    "GELUS",
    "HeadPlan",
    "PartialSums",
    "mlp_rows",
    "pack_weights",
    "refusal",
    "softmax_rows",
    "softmax_tile",
]

# Number of unrolled chunks of hidden units, and of pipeline stages; all choices give the same bits.
SCORES_CONFIGURATIONS = ((8, 1), (1, 1), (8, 3))
GRADIENT_OPTIONS = {"num_warps": 1, "num_stages": 1}


if triton.__version__.startswith(("3.6.", "3.7.")):
    allow_products_over_eight()

# A kernel that Triton interprets cannot contain assembly and is not tuned.
_INTERPRETED = interpreted()
# One warp computes 32 pairs at a time: threads exchange values within the warp only, and no product is computed twice.
TILE = 32
_TILES_PER_PROGRAM = 8
# Divisible by 8 and by 12, the numbers of programs that share a multiprocessor, so that all rounds are full.
_PROGRAMS_PER_PROCESSOR = 24
_PARTIAL_BYTES = 12 << 20
_SUMMED_AT_ONCE = 32
# Number of registers of one thread that may hold sums of weight gradients.
_SUM_REGISTERS = 100
_SOFTMAX_TILE = 1024
_TIMED_CALLS = 10


class HeadPlan:
    """How a head of K heads and m hidden units is cut into what the kernels compute.

    Example:
        >>> plan = HeadPlan(heads=10, units=40)
        >>> plan.padded_heads, plan.chunks, plan.groups
        (16, 5, 1)

    Attributes:
        padded_heads: 8, 16, 32 or 64, at least K + 1: the heads and the row of ones.
        group_chunks: chunks of 8 hidden units whose weight gradients one program sums.
        groups: number of programs that share the hidden units; with one, a single sweep gives all gradients.
        chunks: group_chunks * groups, at least m / 8.
    """

    def __init__(self, heads: int, units: int) -> None:
        self.padded_heads = max(8, triton.next_power_of_2(heads + 1))
        needed = -(-units // 8)
        most = max(1, _SUM_REGISTERS // (self.padded_heads // 4 + 2))
        self.groups = -(-needed // most)
        self.group_chunks = -(-needed // self.groups)
        self.chunks = self.group_chunks * self.groups


def _quantiles_of_time(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
    """Quantiles of the duration of a kernel in milliseconds; unlike Triton's measure this allocates nothing large."""
    call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_TIMED_CALLS)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(end) for start, end in events])
    return torch.quantile(times, torch.tensor(quantiles)).tolist()


# The configuration is chosen on the first call with a head's size and dtype, and kept on disk.
_tuned_scores_kernel = triton.autotune(
    [
        triton.Config({"UNROLL": unroll}, num_warps=1, num_stages=stages)
        for unroll, stages in SCORES_CONFIGURATIONS[: 1 if _INTERPRETED else None]
    ],
    key=["HEADS", "CHUNKS"],
    do_bench=_quantiles_of_time,
    cache_results=True,
)(scores_kernel)


def pack_weights(weight_in: Tensor, bias: Tensor, weight_out: Tensor, scale: float) -> Tensor:
    """Bring the weights of a head into the form in which the kernels read them, once for all rows; as in `mlp_rows`."""
    units, heads = weight_in.shape
    plan = HeadPlan(heads, units)
    packed = torch.empty(4, plan.chunks, 8 * plan.padded_heads, dtype=torch.float32, device=weight_in.device)
    shape = {"HEADS": heads, "WIDTH": plan.padded_heads, "CHUNKS": plan.chunks}
    with torch.cuda.device_of(weight_in):
        pack_weights_kernel[(plan.chunks,)](weight_in, bias, weight_out, packed, scale, units, **shape, num_warps=1)
    return packed


class PartialSums:
    """The gradients of a head's weights as each program sums them, over the rows of any number of calls.

    Example:
        >>> sums = PartialSums(10, 40, logits.device)                                      # doctest: +SKIP
        >>> for portion in portions:                                                       # doctest: +SKIP
        ...     mlp_rows(portion, *weights, 0.125, *rows, gradients, partial=sums)
        >>> sums.add_to(gradients, weight_out, 0.125)                                      # doctest: +SKIP

    Attributes:
        values: float32 [programs, chunks, padded heads + 1, 8], see `gradient_kernel`.
    """

    def __init__(self, heads: int, units: int, device: torch.device) -> None:
        self.shape, plan = (heads, units), HeadPlan(heads, units)
        program_bytes = plan.chunks * (plan.padded_heads + 1) * 8 * 4
        at_once = _processors(device) * _PROGRAMS_PER_PROCESSOR
        programs = max(1, min(at_once // plan.groups, _PARTIAL_BYTES // program_bytes) // _SUMMED_AT_ONCE)
        shape = (programs * _SUMMED_AT_ONCE, plan.chunks, plan.padded_heads + 1, 8)
        self.values = torch.zeros(shape, dtype=torch.float32, device=device)

    def add_to(self, gradients: tuple[Tensor, Tensor, Tensor], weight_out: Tensor, scale: float) -> None:
        """Add the sums of all programs to the gradients of weight_in, bias and weight_out; as in `mlp_rows`."""
        heads, units = self.shape
        _, chunks, rows, _ = self.values.shape
        shape = {"HEADS": heads, "WIDTH": rows - 1, "CHUNKS": chunks}
        summed = self.values.unflatten(0, (_SUMMED_AT_ONCE, -1)).sum(dim=1)
        with torch.cuda.device_of(summed):
            add_partial_kernel[(units,)](
                summed, weight_out, *gradients, scale, **shape, PROGRAMS=_SUMMED_AT_ONCE, num_warps=1
            )


def mlp_rows(
    logits: Tensor,
    weight_in: Tensor,
    bias: Tensor,
    weight_out: Tensor,
    scale: float,
    targets: Tensor,
    weights: Tensor,
    excluded: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor] | None,
    gelu: str = "exact",
    *,
    packed: Tensor | None = None,
    partial: PartialSums | None = None,
) -> Tensor:
    """Losses [R] of rows whose heads are joined by one hidden layer; the host does not wait for the device.

    Example:
        >>> logits = torch.randn(8, 100, 256, device="cuda")               # doctest: +SKIP
        >>> losses = mlp_rows(                                             # doctest: +SKIP
        ...     logits, weight_in, bias, weight_out, 0.125, targets, weights, None, gradients=None
        ... )

    For every row, with s = weight_out . gelu(weight_in @ (scale * logits) + bias) [M],

        loss = sum_t weights[t] * (logsumexp(s over the columns seen) - s[targets[t]])

    A row whose weights are all 0 has loss 0 and gradient 0, whatever its logits are. NaN or infinite logits of
    another row give a loss that is not finite.

    Args:
        logits: [K, R, M] contiguous, float32, bfloat16 or float16, products of queries and keys, K from 1 to 32;
            overwritten with the gradient of losses.sum() if `gradients` is given.
        weight_in: [m, K] float32.
        bias: [m] float32.
        weight_out: [m] float32.
        scale: the factor of q.k in the layer.
        targets: [R, T] int64, the column of each target, 0 to M - 1 and outside `excluded`.
        weights: [R, T] float32, the weight of each target, at least 0; 0 = no target.
        excluded: [R, 2] int64, half-open range of columns that a row does not see, or None.
        gradients: three float32 tensors like weight_in, bias and weight_out that the gradients are added to, or
            None for losses only.
        gelu: "exact", at most 6e-7 from the true GELU for inputs between -12 and 12, where torch in float32 is up to
            1.2e-6 off, depending on the processor; or "fast", at most 1.2e-6 off and 6 % fewer instructions.
        packed: what `pack_weights` made of this head and scale; None packs it here.
        partial: takes the gradients of the weights until `PartialSums.add_to` is called, which serves several calls at
            once; None adds them to `gradients` here.

    Raises:
        ShapeError: a tensor has another shape or is not contiguous.
        ValueError: `gelu` is unknown, or a tensor has another dtype.

    Source: the loss of arXiv 2512.03045.
    """
    if gelu not in GELUS:
        raise unknown_name("gelu", gelu, GELUS)
    _check_rows(logits, targets, weights, excluded)
    heads, rows, columns = logits.shape
    units = len(bias)
    if not 1 <= heads <= MAX_HEADS:
        raise ShapeError("logits", expected=f"[K, R, M] with K from 1 to {MAX_HEADS}", got=logits.shape)
    _check_weights("", (weight_in, bias, weight_out), heads, units)
    if gradients is not None:
        _check_weights("gradients of ", gradients, heads, units)
    float32: dict[str, Any] = {"dtype": torch.float32, "device": logits.device}  # not torch's default dtype
    pairs = rows * columns
    if pairs == 0:
        return torch.zeros(rows, **float32)
    losses = torch.empty(rows, **float32)
    plan = HeadPlan(heads, units)
    shape = {"HEADS": heads, "WIDTH": plan.padded_heads, "CHUNKS": plan.chunks}
    options = {
        "FAST": gelu == "fast",
        "SPLIT": logits.dtype == torch.float32,
        "INTERPRETED": _INTERPRETED,
        "TILE": TILE,
    }
    programs = -(-pairs // (TILE * _TILES_PER_PROGRAM))
    at_once = _processors(logits.device) * _PROGRAMS_PER_PROCESSOR
    sums = partial or PartialSums(heads, units, logits.device) if gradients is not None else None
    with torch.cuda.device_of(logits):
        if packed is None:
            packed = pack_weights(weight_in, bias, weight_out, scale)
        scores = torch.empty(1, rows, columns, **float32)
        _tuned_scores_kernel[(min(programs, at_once),)](
            logits, packed, weight_out, scores, pairs, units, **shape, **options
        )
        _launch_softmax(scores, 1.0, targets, weights, excluded, gradients is not None, losses)
        if sums is None or gradients is None:
            return losses
        summing = min(programs, len(sums.values))
        # With several groups the gradient of the weights comes first, because that of the logits overwrites the logits.
        sweeps = [(True, True)] if plan.groups == 1 else [(False, True), (True, False)]
        for for_logits, for_weights in sweeps:
            grid = (summing, plan.groups) if for_weights else (min(programs, at_once), 1)
            gradient_kernel[grid](
                logits,
                packed,
                scores,
                sums.values,
                pairs,
                **shape,
                GROUP=plan.group_chunks,
                FOR_LOGITS=for_logits,
                FOR_WEIGHTS=for_weights,
                **options,
                **GRADIENT_OPTIONS,
            )
    if partial is None:
        sums.add_to(gradients, weight_out, scale)
    return losses


def softmax_rows(
    logits: Tensor, scale: float, targets: Tensor, weights: Tensor, excluded: Tensor | None, gradients: bool
) -> Tensor:
    """Losses [R] of rows whose heads are joined linearly or not at all, averaged over the first axis.

    Example:
        >>> losses = softmax_rows(logits, 0.125, targets, weights, None, gradients=True)   # doctest: +SKIP

    Args:
        logits: [C, R, M] contiguous, float32, bfloat16 or float16; the softmax is taken of scale * logits.
            Overwritten with the gradient of losses.sum() if `gradients`.
        scale: the factor of q.k in the layer.
        targets: see `mlp_rows`.
        weights: see `mlp_rows`.
        excluded: see `mlp_rows`.
        gradients: whether to compute the gradient.

    Raises:
        ShapeError: a tensor has another shape or is not contiguous.
        ValueError: a tensor has another dtype.
    """
    _check_rows(logits, targets, weights, excluded)
    if not logits.numel():
        return torch.zeros(logits.shape[1], dtype=torch.float32, device=logits.device)
    losses = torch.empty(logits.shape[1], dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _launch_softmax(logits, scale, targets, weights, excluded, gradients, losses)
    return losses


def softmax_tile(columns: int) -> tuple[int, int]:
    """Rows and columns that one program of the softmax holds at a time.

    Example:
        >>> softmax_tile(21), softmax_tile(5000)
        ((32, 32), (1, 1024))
    """
    width = min(max(triton.next_power_of_2(columns), 16), _SOFTMAX_TILE)
    return _SOFTMAX_TILE // width, width


def _launch_softmax(
    logits: Tensor,
    scale: float,
    targets: Tensor,
    weights: Tensor,
    excluded: Tensor | None,
    gradients: bool,
    losses: Tensor,
) -> None:
    copies, rows, columns = logits.shape
    tile_rows, tile_columns = softmax_tile(columns)
    softmax_kernel[(triton.cdiv(rows, tile_rows),)](
        logits,
        targets,
        weights,
        targets if excluded is None else excluded,
        losses,
        rows,
        columns,
        targets.shape[1],
        scale,
        COPIES=copies,
        EXCLUDES=excluded is not None,
        GRADIENT=gradients,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        num_warps=4,
    )


def _check_rows(logits: Tensor, targets: Tensor, weights: Tensor, excluded: Tensor | None) -> None:
    if logits.ndim != 3 or not logits.is_contiguous():
        raise ShapeError("logits", expected="[K, R, M], contiguous", got=logits.shape)
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits: expected float32, bfloat16 or float16, got {logits.dtype}")
    rows = logits.shape[1]
    if targets.ndim != 2:
        raise ShapeError("targets", expected="[R, T]", got=targets.shape)
    _check("targets", targets, "[R, T]", (rows, targets.shape[1]), torch.int64)
    _check("weights", weights, "[R, T]", (rows, targets.shape[1]), torch.float32)
    if excluded is not None:
        _check("excluded", excluded, "[R, 2]", (rows, 2), torch.int64)


def _check_weights(prefix: str, tensors: tuple[Tensor, Tensor, Tensor], heads: int, units: int) -> None:
    weight_in, bias, weight_out = tensors
    _check(f"{prefix}weight_in", weight_in, "[m, K]", (units, heads), torch.float32)
    _check(f"{prefix}bias", bias, "[m]", (units,), torch.float32)
    _check(f"{prefix}weight_out", weight_out, "[m]", (units,), torch.float32)


def _check(name: str, tensor: Tensor, axes: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or not tensor.is_contiguous():
        raise ShapeError(name, expected=f"{axes} = {list(shape)}, contiguous", got=tensor.shape)
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {tensor.dtype}")


@functools.cache
def _processors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
