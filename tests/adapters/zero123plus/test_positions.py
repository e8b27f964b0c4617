"""The map of positions of Zero123++: anew in each tile, a constant per view, the reference in cells of a tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cameo.adapters.common.positions import get_position, sincos
from cameo.adapters.zero123plus.denoiser import TilePositionMap, set_tile_position, view_code
from cameo.backbone import get_backbone
from cameo.errors import ShapeError
from tests.helpers.zero123plus_models import batch, pipeline

CHANNELS, TILE = 16, 4


def tile(canvas: Tensor, view: int, side: int) -> Tensor:
    """Views 1 to 6 lie row by row in three rows of two."""
    row, column = divmod(view - 1, 2)
    return canvas[:, row * side : (row + 1) * side, column * side : (column + 1) * side]


def test_each_tile_has_the_map_of_a_view_and_its_own_constant() -> None:
    built = TilePositionMap(TILE)
    canvas, one_view = built.build(CHANNELS, 3 * TILE, 2 * TILE), sincos(torch.arange(TILE), torch.arange(TILE), 16)
    for view in range(1, 7):
        expected = one_view + view_code(view, CHANNELS)[:, None, None]
        torch.testing.assert_close(tile(canvas, view, TILE), expected, rtol=0, atol=1e-14)


def test_the_reference_has_the_coordinates_of_a_tile() -> None:
    """Of 2 x 2 fine cells in a coarse one the mean of the coordinates is that of the coarse one."""
    built, code = TilePositionMap(TILE), view_code(0, CHANNELS)[:, None, None]
    found = built.build(CHANNELS, 2 * TILE, 2 * TILE) - code
    fine = torch.tensor([-0.25, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25], dtype=torch.float64)
    torch.testing.assert_close(found, sincos(fine, fine, CHANNELS), rtol=0, atol=1e-14)
    same = built.build(CHANNELS, TILE, TILE) - code
    torch.testing.assert_close(same, sincos(torch.arange(TILE), torch.arange(TILE), CHANNELS), rtol=0, atol=1e-14)


def test_another_image_size_covers_the_same_coordinates() -> None:
    """Twice as fine a canvas has between its cells those of the size that the U-Net was made for."""
    built = TilePositionMap(TILE)
    coarse, fine = built.build(CHANNELS, 12, 8), built.build(CHANNELS, 24, 16)
    code = view_code(2, CHANNELS)[:, None, None]
    first, second = tile(coarse, 2, 4) - code, tile(fine, 2, 8) - code
    slow = [3, 7, 11, 15]  # channels of the longest waves, in which the map is all but linear
    means = torch.nn.functional.avg_pool2d(second[slow][None], 2)[0]
    torch.testing.assert_close(means, first[slow], rtol=0, atol=1e-6)


def test_no_two_places_have_the_same_vector() -> None:
    built = TilePositionMap(8)
    vectors = torch.cat([built.build(32, 24, 16).flatten(1), built.build(32, 8, 8).flatten(1)], dim=1).T
    distances = torch.cdist(vectors, vectors) + 100 * torch.eye(len(vectors))
    neighbors = torch.cdist(*[sincos(torch.tensor([0, 1]), torch.tensor([0]), 32)[:, i].T for i in (0, 1)])
    assert distances.min() > 0.8 * neighbors  # nothing is closer than two neighboring cells of one tile


def test_the_unet_adds_it_in_both_passes() -> None:
    unet = pipeline().unet
    seen = []
    unet.conv_in.register_forward_hook(
        lambda conv, args, output: seen.append(output - conv._conv_forward(args[0], conv.weight, conv.bias))
    )
    args, kwargs = get_backbone("zero123plus").example_inputs(unet)
    unet(*args, **kwargs)
    assert [tuple(one.shape[-2:]) for one in seen] == [(12, 12), (24, 16)]
    built = TilePositionMap(8)
    for one in seen:
        expected = built.build(*one.shape[-3:]).float()
        torch.testing.assert_close(one[0], expected, rtol=0, atol=1e-5)


def test_a_view_of_another_aspect_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"sample: expected \[B, C, 3h, 2h\] or \[B, C, h, h\], got"):
        TilePositionMap(8).build(16, 24, 32)


@pytest.mark.parametrize("size", [32, 64])
def test_trains_at_the_size_of_the_preset_and_another(size: int) -> None:
    built, given = pipeline(), batch(samples=1)
    given["images"] = torch.nn.functional.interpolate(given["images"][0], (size, size))[None]
    inputs = built.training_inputs(given)
    built.denoising_loss(built.unet(*inputs.args, **inputs.kwargs), inputs).mean().backward()
    assert built.unet.conv_in.weight.grad.abs().sum() > 0


def test_the_unet_in_the_published_wrapper_gets_it() -> None:
    wrapper = torch.nn.Module()
    wrapper.unet = pipeline().unet
    adapter = get_backbone("zero123plus")
    assert adapter.position(wrapper) == "sincos"
    set_tile_position(wrapper, "none")
    assert get_position(wrapper.unet) == adapter.position(wrapper) == "none"
