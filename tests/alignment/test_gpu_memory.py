"""What the loss holds on a GPU, counted on tensors without contents: the allocator of an H200 counted the same."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.alignment.gates import GRADIENT_FACTOR, WORKSPACE
from cameo.alignment import heads, rows, supervision, sweep
from cameo.alignment.heads import HeadWeights
from cameo.estimate.tracking import Tracker

pytest.importorskip("triton")

from cameo.alignment import triton_heads, triton_rows

KERNELS = {
    triton_heads: [
        "add_partial_kernel",
        "gradient_kernel",
        "pack_weights_kernel",
        "_tuned_scores_kernel",
        "softmax_kernel",
    ],
    triton_rows: ["add_to_queries_kernel"],
}
META = torch.device("meta")
HEADS, WIDTH = 10, 64


class NoKernel:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: None


class OnDevice(Tracker):
    """Counts what is on the device, and not what the host plans with."""

    def see(self, tensor: Tensor, kind: str | None = None) -> None:
        if tensor.device == META:
            super().see(tensor, kind)


@pytest.fixture
def large_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, NoKernel())
    monkeypatch.setattr(triton_heads, "_processors", lambda device: 132)
    monkeypatch.setattr(heads, "device_bytes", lambda device: 150 * 10**9)
    monkeypatch.setattr(sweep, "multiplies_wide", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    for module in (rows, supervision):
        monkeypatch.setattr(module, "sent_to", lambda device, tensor: tensor.to(device))


@pytest.mark.usefixtures("large_gpu")
@pytest.mark.parametrize("normalize", ["per_view", "all_views"])
@pytest.mark.parametrize(("side", "views", "batch"), [(32, 4, 3), (64, 4, 3), (32, 21, 1), (16, 4, 3)])
def test_the_peak_stays_within_what_is_allowed(side: int, views: int, batch: int, normalize: str) -> None:
    tokens, units = side * side, 4 * HEADS
    query = torch.empty(batch, HEADS, views, tokens, WIDTH, dtype=torch.bfloat16, device=META)
    key = torch.empty_like(query)
    index = torch.empty(batch, views, views, tokens, dtype=torch.int64, device=META)
    head = [torch.empty(*shape, device=META) for shape in ((units, HEADS), (units,), (units,))]
    # Not as many rows in every group, as portions that grow would show a buffer that is replaced.
    full = tokens * (views - 1) if normalize == "per_view" else tokens
    counts = [full * (60 + 7 * group % 21) // 100 for group in range(batch * views)]
    with OnDevice() as tracker:
        tracker.see_all([query, key, index, *head], "inputs")
        before = tracker.held
        found = sweep.sweep(
            query,
            key,
            index,
            torch.empty(index.shape, device=META),
            HeadWeights("mlp", head[:2], head[2]),
            token_grids=[(side, side)] * views,
            normalize=normalize,
            softness=0.0,
            scale=0.125,
            implementation="triton",
            gelu="exact",
            gradients=True,
            counts=[*counts, 0],
        )
    assert found.query is not None
    gradients = 2 * query.numel() * query.element_size()
    assert tracker.peak - before <= GRADIENT_FACTOR * gradients + WORKSPACE["cuda"]
