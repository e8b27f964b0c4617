"""The Triton kernels on the CPU, in a process of their own: Triton must know when it is imported that it interprets."""

from __future__ import annotations

import concurrent.futures
import io
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter

from cameo.alignment import triton_heads
from cameo.alignment.triton_head_kernels import normal_cdf
from cameo.correspondence.neighbors import triton_support


class Interpreter:
    """Calls functions of this module in the other process; tensors are handed over as files are written."""

    def __init__(self, pool: concurrent.futures.ProcessPoolExecutor) -> None:
        self._pool = pool

    def __call__(self, function: Any, *arguments: object) -> Any:
        return _read(self._pool.submit(_call, function, _written(arguments)).result())


@contextmanager
def interpreter() -> Iterator[Interpreter]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_start) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(os.getpid).result()
        yield Interpreter(pool)


def mlp_rows(
    logits: torch.Tensor,
    parameters: list[torch.Tensor],
    scale: float,
    rows: dict[str, Any],
    sums: list[torch.Tensor] | None,
    gelu: str,
) -> tuple[torch.Tensor, ...]:
    """Losses, and what logits and the gradients of the parameters hold afterwards."""
    losses = triton_heads.mlp_rows(
        logits,
        *parameters,
        scale,
        rows["targets"],
        rows["weights"],
        rows["excluded"],
        None if sums is None else tuple(sums),
        gelu,
    )
    return losses, logits, *(sums or ())


def mlp_rows_in_parts(
    logits: torch.Tensor,
    parameters: list[torch.Tensor],
    scale: float,
    rows: dict[str, Any],
    sums: list[torch.Tensor],
    counts: list[int],
) -> tuple[torch.Tensor, ...]:
    """As `mlp_rows`, so many rows at a time, whose gradients of the parameters are added once, after the last ones."""
    heads, units = logits.shape[0], len(parameters[1])
    partial = triton_heads.PartialSums(heads, units, logits.device)
    gradients = sums[0], sums[1], sums[2]
    losses, after = [], []
    for start, count in zip([0, *torch.tensor(counts).cumsum(0).tolist()], counts, strict=False):
        part = slice(start, start + count)
        after.append(logits[:, part].contiguous())
        arguments = [None if rows[name] is None else rows[name][part] for name in ("targets", "weights", "excluded")]
        losses.append(triton_heads.mlp_rows(after[-1], *parameters, scale, *arguments, gradients, partial=partial))
    assert not any(total.any() for total in sums), "added before the last rows"
    partial.add_to(gradients, parameters[2], scale)
    return torch.cat(losses), torch.cat(after, dim=1), *sums


def softmax_rows(
    logits: torch.Tensor, scale: float, rows: dict[str, Any], gradients: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    losses = triton_heads.softmax_rows(logits, scale, rows["targets"], rows["weights"], rows["excluded"], gradients)
    return losses, logits


def refusal(*arguments: Any) -> str | None:
    return triton_support.refusal(*arguments)


def gelu(x: torch.Tensor, fast: bool) -> torch.Tensor:
    """The GELU of the kernels."""
    out = torch.empty_like(x)
    _gelu_kernel[(1,)](x, out, FAST=fast, SIZE=x.numel())
    return out


@triton.jit
def _gelu_kernel(source, into, FAST: tl.constexpr, SIZE: tl.constexpr):  # noqa: N803
    place = tl.arange(0, SIZE)
    x = tl.load(source + place)
    tl.store(into + place, x * normal_cdf(x, x * x, FAST, True))


def _start() -> None:
    """Let the interpreter replace Triton's language once per launch; it does so at every call of a helper."""
    torch.set_num_threads(1)
    replace, launch = triton_interpreter._patch_lang, triton_interpreter.GridExecutor.__call__
    replaced: set[int] = set()

    def replace_once(function: Any) -> Any:
        language = id(function.__globals__)
        if language in replaced:
            return None
        replaced.add(language)
        return replace(function)

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> None:
        replaced.clear()
        launch(self, *arguments, **options)

    triton_interpreter._patch_lang, triton_interpreter.GridExecutor.__call__ = replace_once, launch_anew
    convert = triton_interpreter._convert_float

    def convert_to_nearest(given: np.ndarray, source: Any, into: Any, mode: Any) -> np.ndarray:
        """Round to bfloat16 as GPUs do; the interpreter cuts digits off."""
        if (source, into) == (tl.float32, tl.bfloat16):
            given = torch.from_numpy(np.ascontiguousarray(given).view(np.float32)).bfloat16().float().numpy()
        return convert(given, source, into, mode)

    triton_interpreter._convert_float = convert_to_nearest


def _call(function: Any, written: bytes) -> bytes:
    return _written(function(*_read(written)))


def _written(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _read(written: bytes) -> Any:
    return torch.load(io.BytesIO(written), weights_only=True)
