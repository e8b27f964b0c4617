"""Nearest neighbors: matrix products and the Triton kernels against coordinate differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cameo.correspondence.neighbors import nearest
from cameo.correspondence.neighbors.nearest import match_tokens, nearest_by_differences, nearest_by_products
from tests.helpers.compiled_kernels import registers_and_stack
from tests.helpers.memory import memory_of


def surface(batch: int, views: int, side: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Tokens ``[B, V, N, 3]`` of a bumpy surface that the views see from different places, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    line = torch.linspace(-1, 1, side, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    shift = torch.rand(batch, views, 1, 1, generator=generator, dtype=torch.float64)
    x = x + shift
    points = torch.stack([x, y + shift / 2, (3 * x).sin() / 3 + (2 * y).cos() / 5], dim=-1).flatten(2, 3)
    return (points + 0.01 * torch.randn(points.shape, generator=generator, dtype=torch.float64)).to(dtype)


def with_holes(tokens: Tensor) -> Tensor:
    """Missing tokens, duplicates across blocks and views, one outlier, and a view without any measurement."""
    tokens = tokens.clone()
    tokens[0, 0, 3] = math.nan
    tokens[:, 1, 4:6] = math.inf
    tokens[0, 0, 7] = tokens[0, 0, 20]
    tokens[0, 1, 2] = tokens[0, 1, -1] = tokens[0, 2, 9] = tokens[0, 0, 7]
    tokens[0, 2, 1, 2] = 1e4
    tokens[-1, 2] = -math.inf
    return tokens


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "views", "side"), [(2, 3, 5), (3, 4, 8), (2, 3, 15), (1, 3, 32)])
def test_products_equal_differences(batch, views, side, dtype):
    tokens = with_holes(surface(batch, views, side, dtype))
    assert_same(nearest_by_products(tokens), nearest_by_differences(tokens))


@pytest.mark.parametrize("offset", [10.0, 1e3, 1e5])
def test_products_are_exact_far_from_the_origin(offset):
    tokens = surface(1, 3, 24, torch.float32) + offset * torch.tensor([1.0, -2.0, 3.0])
    assert_same(nearest_by_products(tokens), nearest_by_differences(tokens))


@pytest.mark.parametrize("scale", [1e-24, 1e-20, 1e17, 1e25])
def test_products_are_exact_where_squares_leave_the_range(scale):
    tokens = surface(1, 3, 12, torch.float32) * scale
    assert_same(nearest_by_products(tokens), nearest_by_differences(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_settle_ties_everywhere(dtype):
    generator = torch.Generator().manual_seed(1)
    lattice = torch.randint(0, 4, (2, 3, 200, 3), generator=generator).to(dtype)
    assert_same(nearest_by_products(lattice), nearest_by_differences(lattice))
    assert_same(nearest_by_products(lattice / 3), nearest_by_differences(lattice / 3))
    constant = torch.zeros(1, 2, 100, 3, dtype=dtype)
    index, distance = nearest_by_products(constant)
    assert index[0, 0, 1].tolist() == [0] * 100
    assert distance[0, 0, 1].tolist() == [0.0] * 100


def test_what_products_cannot_resolve_is_settled(monkeypatch):
    # Two clusters far apart, in which neighbors differ by less than the rounding of a product.
    tokens = torch.rand(1, 2, 256, 3, generator=torch.Generator().manual_seed(0)) / 50
    tokens[:, :, ::2, 0] += 100
    tokens[:, :, 1::2, 0] -= 100
    assert_same(nearest_by_products(tokens), nearest_by_differences(tokens))
    monkeypatch.setattr(nearest, "ROUNDING", 0)
    assert not torch.equal(nearest_by_products(tokens)[0], nearest_by_differences(tokens)[0])


@pytest.mark.parametrize("tile", [1, 1 << 12, 1 << 16])
@pytest.mark.parametrize("blocks", [1, 1 << 14])
def test_tiles_change_nothing(monkeypatch, tile, blocks):
    tokens = with_holes(surface(2, 3, 9, torch.float32))
    expected = nearest_by_differences(tokens)
    monkeypatch.setattr(nearest, "TILE_BYTES", tile)
    monkeypatch.setattr(nearest, "BLOCKS_BYTES", blocks)
    assert_same(nearest_by_products(tokens), expected)
    assert_same(nearest_by_differences(tokens), expected)


def test_nothing_to_find():
    for tokens in (torch.zeros(2, 1, 9, 3), torch.zeros(0, 3, 9, 3), torch.full((1, 2, 9, 3), math.nan)):
        index, distance = nearest_by_products(tokens)
        assert (index == -1).all()
        assert distance.isinf().all()


@pytest.mark.parametrize("side", [32, 64])
def test_the_workspace_is_bounded(side):
    tokens, results = surface(1, 4, side, torch.float32), []
    peak, _ = memory_of(lambda: results.extend(match_tokens(tokens, (side,) * 4, 1.5)))
    assert 1 << 18 < peak - sum(result.nbytes for result in results) <= 8 * 10**6


def test_an_implementation_that_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="unknown implementation 'product': did you mean 'products'"):
        match_tokens(torch.zeros(1, 2, 4, 3), (2, 2), 1.5, implementation="product")
    with pytest.raises(ValueError, match="settles its near-ties on the CPU, got tokens on meta"):
        match_tokens(torch.zeros(1, 2, 4, 3, device="meta"), (2, 2), 1.5, implementation="products")
    with pytest.raises(
        ValueError, match="cannot serve this: the tensors are on cpu; the Triton kernels need a CUDA device"
    ):
        match_tokens(torch.zeros(1, 2, 4, 3), (2, 2), 1.5, implementation="triton")


def test_triton_equals_differences_in_the_interpreter(interpreted):
    for dtype, side, widths in ((torch.float32, 7, (7, 7, 7)), (torch.float64, 7, (7, 4, 7))):
        tokens = with_holes(surface(2, 3, side, dtype))
        tokens[:, 1, widths[1] ** 2 :] = math.nan
        index, distance = interpreted(match_tokens_by_triton, tokens, widths)
        expected = match_tokens(tokens, widths, 1.5, implementation="differences")
        assert torch.equal(index, expected[0])
        assert (index >= 0).sum() > 100
        # The interpreter takes the square root with NumPy, which may differ in the last bits.
        torch.testing.assert_close(distance, expected[1], rtol=4 * torch.finfo(dtype).eps, atol=0)


def match_tokens_by_triton(tokens: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Runs in the process of the interpreter."""
    return match_tokens(tokens, widths, 1.5, implementation="triton")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("kernel", "most_registers"), [("nearest_kernel", 128), ("cycle_kernel", 64)])
def test_triton_compiles_without_spills(kernel, most_registers, capability):
    pytest.importorskip("triton", reason="Triton is not installed")

    from cameo.correspondence.neighbors import triton_nearest

    kinds = {
        "nearest_kernel": {"points": "*fp32", "index": "*i32", "distance": "*fp32", "views": "i32", "tokens": "i32"},
        "cycle_kernel": {
            "nearest": "*i32",
            "kept": "*i64",
            "widths": "*i64",
            "views": "i32",
            "tokens": "i32",
            "squared_threshold": "fp32",
        },
    }[kernel]
    constants = {
        "nearest_kernel": {"QUERIES": triton_nearest.QUERY_BLOCK, "KEYS": triton_nearest.KEY_BLOCK},
        "cycle_kernel": {"BLOCK": triton_nearest.CYCLE_BLOCK},
    }[kernel]
    registers, stack = registers_and_stack(
        getattr(triton_nearest, kernel), kinds, constants, capability, triton_nearest.NEAREST_WARPS
    )
    assert stack == 0
    assert registers <= most_registers
