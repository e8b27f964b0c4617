"""Matches from depth in one kernel: equal to the plain form in Triton's interpreter, and compiled without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cameo.correspondence import matching
from tests.helpers.compiled_kernels import registers_and_stack
from tests.helpers.memory import memory_of

triton = pytest.importorskip("triton", reason="Triton is not installed")

GRIDS = {"one grid": ((8, 8),) * 4, "several grids": ((8, 8), (4, 6), (8, 8), (5, 5))}


def match_by_triton(depth: Tensor, intrinsics: Tensor, extrinsics: Tensor, grids: list[list[int]]) -> list[Tensor]:
    """Runs in the process of the interpreter."""
    from cameo.correspondence import triton_depth

    return list(triton_depth.match_depth(depth, intrinsics, extrinsics, tuple(map(tuple, grids)), 0.02))


@pytest.fixture
def views(rooms: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Two rooms of four views with holes, seen through a skewed lens from far off the origin."""
    depth = rooms["depth"].float().clone()
    depth[torch.rand(depth.shape, generator=torch.Generator().manual_seed(0)) < 0.05] = 0
    depth[0, 1, 0, 20:40, 10:30] = math.inf
    depth[1, 0, 0, :, 40:] = math.nan
    intrinsics = rooms["intrinsics"].float().clone()
    intrinsics[..., 0, 1] = 0.7
    shift = torch.eye(4, dtype=torch.float64)
    shift[:3, 3] = torch.tensor([1e4, -2e4, 3e4])
    return depth, intrinsics, rooms["extrinsics"].double() @ shift


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_the_kernel_equals_the_plain_form(interpreted, views, grids):
    count = views[0].shape[1]
    grids = (grids * count)[:count]
    index, distance = interpreted(match_by_triton, *views, [list(grid) for grid in grids])
    expected_index, expected_distance = matching.match_depth(*views, grids, 0.02)
    assert (expected_index >= 0).sum() > 300
    assert torch.equal(index, expected_index)
    assert torch.equal(distance.isinf(), expected_distance.isinf())
    known = expected_distance.isfinite()
    # Where a point's depth is that of the surface, the distance is the rounding of coordinates of up to 10.
    torch.testing.assert_close(distance[known], expected_distance[known], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_the_kernel_compiles_without_spills(capability):
    from cameo.correspondence import triton_depth

    pointers = dict.fromkeys(("depth", "intrinsics", "extrinsics", "distance"), "*fp32")
    numbers = dict.fromkeys(("views", "tokens", "height", "width"), "i32")
    kinds = {**pointers, "grids": "*i64", "index": "*i64", **numbers, "tolerance": "fp32"}
    kernel = triton_depth.depth_kernel
    kinds = {name: kinds[name] for name in kernel.arg_names if name in kinds}
    constants = {"BLOCK": triton_depth.BLOCK}
    registers, stack = registers_and_stack(kernel, kinds, constants, capability, triton_depth.WARPS)
    assert stack == 0
    assert registers <= 128


def test_some_key_views_at_a_time_give_the_same_matches(views, monkeypatch):
    grids = GRIDS["several grids"]
    grids = (grids * views[0].shape[1])[: views[0].shape[1]]
    expected = matching.match_depth(*views, grids, 0.02)
    parts = []
    match = matching._match_key_views

    def counting(*arguments):
        parts.append(arguments[0].shape[:2])
        return match(*arguments)

    monkeypatch.setattr(matching, "_match_key_views", counting)
    for workspace in (1, matching.DEPTH_BYTES * 64 * len(grids) * 2):
        parts.clear()
        monkeypatch.setattr(matching, "WORKSPACE_BYTES", workspace)
        index, distance = matching.match_depth(*views, grids, 0.02)
        assert len(parts) > 1
        assert torch.equal(index, expected[0])
        # Products of other sizes sum in another order: coordinates of up to 10 are rounded otherwise.
        torch.testing.assert_close(distance, expected[1], rtol=1e-5, atol=1e-5)


def test_the_workspace_is_bounded():
    """Of 12 views of 24 x 24 tokens at once it would be 48 MB."""
    depth = torch.full((1, 12, 1, 96, 96), 2.0)
    intrinsics = torch.tensor([[96.0, 0, 48], [0, 96, 48], [0, 0, 1]]).expand(1, 12, 3, 3)
    extrinsics = torch.eye(4).repeat(1, 12, 1, 1)
    extrinsics[0, :, 0, 3] = torch.arange(12) * -0.1
    results: list[Tensor] = []

    def run() -> None:
        results.extend(matching.match_depth(depth, intrinsics, extrinsics, ((24, 24),) * 12, 0.02))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "WORKSPACE_BYTES", 8 << 20)
        peak, held = memory_of(run)
    assert peak - held <= 8 << 20
