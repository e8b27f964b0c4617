"""What the loss holds on a GPU, counted on tensors without contents: the allocator of an H200 counted the same."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.alignment.gates import GRADIENT_FACTOR, WORKSPACE
from benchmarks.step.pretend_device import PretendDevice
from cameo.alignment import sweep
from cameo.alignment.heads import HeadWeights
from cameo.estimate.tracking import Tracker

pytest.importorskip("triton")

from benchmarks.step.counts import DIMENSION, HEADS, as_on_cuda

META = torch.device("meta")


class OnDevice(Tracker):
    """Counts what is on the device, and not what the host plans with."""

    def see(self, tensor: Tensor, kind: str | None = None) -> None:
        if tensor.device == META:
            super().see(tensor, kind)


@pytest.mark.parametrize("normalize", ["per_view", "all_views"])
@pytest.mark.parametrize(("side", "views", "batch"), [(32, 4, 3), (64, 4, 3), (32, 21, 1), (16, 4, 3)])
def test_the_peak_stays_within_what_is_allowed(side: int, views: int, batch: int, normalize: str) -> None:
    tokens, units = side * side, 4 * HEADS
    query = torch.empty(batch, HEADS, views, tokens, DIMENSION, dtype=torch.bfloat16, device=META)
    key = torch.empty_like(query)
    index = torch.empty(batch, views, views, tokens, dtype=torch.int64, device=META)
    head = [torch.empty(*shape, device=META) for shape in ((units, HEADS), (units,), (units,))]
    # More rows from group to group, as a buffer that is replaced by a larger one while it is held would show.
    full = tokens * (views - 1) if normalize == "per_view" else tokens
    counts = [full * (55 + 2 * group) // 100 for group in range(batch * views)]
    with as_on_cuda(mock.Mock(spec=PretendDevice)), OnDevice() as tracker:
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
