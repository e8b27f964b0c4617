"""Explicit attention: a product of queries and keys whose multiple goes into a softmax.

Axes: A rows of the attention batch, K heads, L query tokens, M key tokens, D head dimension.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cameo.attention.kernels.call import HIDDEN_BELOW
from cameo.errors import CaptureError

__all__ = ["PRODUCTS", "Product", "measure_scale", "operands_of"]

PRODUCTS = {
    "bmm": ("input", "mat2"),
    "matmul": ("input", "other"),
    "baddbmm": ("input", "batch1", "batch2"),
    "einsum": ("equation", "operands"),
}
# Most rows, and about how many values, that are read to measure the scale of explicit attention.
SAMPLED_ROWS, SAMPLED_VALUES = 64, 2**22


@dataclass(frozen=True)
class Product:
    """Operands of a product `query @ key^T`, and shape and dtype of the result, which itself may be large."""

    query: Tensor
    key: Tensor
    shape: torch.Size
    dtype: torch.dtype


@torch.no_grad()
def measure_scale(layer: str, product: Product, logits: Tensor) -> tuple[float, Tensor | None]:
    """Return the factor between q.k and the logits that entered the softmax, and which keys these hide.

    The second is a mask of the shape of the logits, True where a query sees the key, or None where all are seen. Any
    other difference is refused: the logits are compared with q.k, computed again, since in-place operators may have
    changed the product.

    Raises:
        CaptureError: the logits are no multiple of q.k, or the multiple cannot be measured.
    """
    exact = torch.promote_types(product.query.dtype, torch.float32)
    query, key = (t.detach().reshape(-1, *t.shape[-2:]) for t in (product.query, product.key))
    length, dimension = key.shape[-2:]
    rows = query.shape[0] * query.shape[1]
    count = max(2, min(SAMPLED_ROWS, rows, SAMPLED_VALUES // (length * dimension)))
    picked = torch.linspace(0, rows - 1, count, dtype=torch.float64).round().long().to(query.device)
    queries = query.reshape(rows, dimension)[picked].to(exact)
    keys = key[picked // query.shape[1]].to(exact)
    given = logits.detach().reshape(rows, length)[picked].to(exact)
    seen = given > HIDDEN_BELOW
    products = (queries[:, None] * keys).sum(-1).where(seen, 0)
    given = given.where(seen, 0)
    squared_norm = products.square().sum()
    if not squared_norm:
        raise CaptureError(
            f"layer {layer!r}: all its logits are zero or hidden, so its scale cannot be measured; use the SDPA or "
            "xformers attention processor of the model (diffusers: model.set_attn_processor(AttnProcessor2_0())), or "
            "initialize the query projection"
        )
    scale = float((given * products).sum() / squared_norm)
    # Every rounding error is relative to |q| |k|, even where the product nearly cancels.
    epsilon = max(torch.finfo(kind).eps for kind in (product.dtype, logits.dtype, query.dtype))
    if query.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        epsilon = max(epsilon, 2**-10)
    magnitude = queries.norm(dim=-1)[:, None] * keys.norm(dim=-1) * abs(scale)
    close = (given - scale * products).abs() <= 8 * epsilon * magnitude
    if not (math.isfinite(scale) and bool(close.all())):
        raise CaptureError(
            f"layer {layer!r} changes its logits between product and softmax by more than a mask (bias or another "
            "function); only a constant factor can be supervised. Switch that off in the model, or supervise a layer "
            "without it"
        )
    visible = logits.detach() > HIDDEN_BELOW
    mask = None if bool(visible.all()) else visible
    # Rounded logits give the factor to their precision only, so a common factor within it is taken as exact.
    common = (dimension**-0.5, 1.0)
    return next((factor for factor in common if abs(scale / factor - 1) < 4 * epsilon), scale), mask


def operands_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return `(query [..., L, D], key [..., M, D])` of a batched product `query @ key^T`, if it is one.

    Example:
        >>> query, key = torch.zeros(2, 5, 8), torch.zeros(2, 7, 8)
        >>> [tuple(operand.shape) for operand in operands_of("einsum", ("... i d, ... j d -> ... i j", query, key), {})]
        [(2, 5, 8), (2, 7, 8)]
    """
    if name == "einsum":
        return _einsum_operands(*args)
    names = PRODUCTS[name]
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key = (given.get(operand) for operand in names[-2:])
    if not isinstance(query, Tensor) or not isinstance(key, Tensor):
        return None
    if query.ndim not in (3, 4, 5) or query.shape[:-2] != key.shape[:-2]:
        return None
    return query, key.transpose(-1, -2)


def _einsum_operands(equation: Any, *operands: Any) -> tuple[Tensor, Tensor] | None:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    inputs, _, output = _without_dots(equation.replace(" ", ""), operands[0].ndim).partition("->")
    left, _, right = inputs.partition(",")
    summed = [axis for axis in left if axis in right and axis not in output]
    batch, tokens = output[:-2], output[-2:]
    if len(summed) != 1 or not all(axis in left and axis in right for axis in batch) or len(tokens) != 2:
        return None
    if tokens[0] not in left or tokens[0] in right or tokens[1] not in right or tokens[1] in left:
        return None
    if len(left) != len(batch) + 2 or len(right) != len(batch) + 2 or len(batch) not in (1, 2, 3):
        return None
    query = operands[0].permute([left.index(axis) for axis in [*batch, tokens[0], summed[0]]])
    key = operands[1].permute([right.index(axis) for axis in [*batch, tokens[1], summed[0]]])
    return query, key


def _without_dots(equation: str, axes: int) -> str:
    """Write `...` out as axes of their own, upper-case, for a first operand of so many axes."""
    left = equation.partition(",")[0]
    count = axes - len(left.replace("...", ""))
    return equation.replace("...", string.ascii_uppercase[: max(0, count)])
