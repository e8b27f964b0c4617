"""Scores of a scene that is computed by hand, pairs of views, registration, and the offset of colors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cameo.data import Views
from cameo.inspection.epipolar import score_tracks
from cameo.inspection.readings import AS_GIVEN, Reading
from cameo.inspection.registration import register, with_moved_depth
from cameo.inspection.residual import token_error
from cameo.inspection.scenes import InspectedScene, choose_pairs, inspected_scenes
from cameo.inspection.scores import match_pairs, score
from tests.helpers import data_faults as faults


def inspected(views: Views, grid: int = 8) -> InspectedScene:
    (scene,) = inspected_scenes(views, scenes=1, pairs=15, token_grid=(grid, grid), neighbors=True)
    return scene


def test_a_wall_with_a_nearer_half() -> None:
    """Two cameras at one place; the left half of the second view is at half the depth of the first."""
    depth = torch.full((2, 1, 16, 16), 2.0)
    depth[1, ..., :8] = 1.0
    cameras = torch.tensor([[16.0, 0, 8], [0, 16, 8], [0, 0, 1]]).repeat(2, 1, 1), torch.eye(4).repeat(2, 1, 1)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = score([inspected(Views(images, depth, *cameras, "wall"), grid=4)], AS_GIVEN)
    # From the first view to the second, 8 of 16 tokens lie behind the nearer half; back, these lie in front.
    assert found.measured.sum().item() == 32
    assert found.compared.sum().item() == 32
    assert found.visible.sum().item() == 16
    assert found.in_front.sum().item() == 8
    assert found.in_front.tolist() == [[0, 0, 0, 0], [4, 0, 4, 0]]
    assert (found.matched_share, found.in_front_share) == (0.5, 0.25)


def test_equal_images_agree_in_color_and_other_images_do_not(room: Views) -> None:
    same = replace(room, extrinsics=room.extrinsics[:1].repeat(6, 1, 1), depth=room.depth[:1].repeat(6, 1, 1, 1))
    same = replace(same, images=room.images[:1].repeat(6, 1, 1, 1))
    assert score([inspected(same)], AS_GIVEN).color_ratio == pytest.approx(0.0, abs=1e-5)
    assert score([inspected(replace(same, images=room.images))], AS_GIVEN).color_ratio > 0.6


def test_images_without_contrast_say_nothing(room: Views) -> None:
    found = score([inspected(replace(room, images=torch.full_like(room.images, 128)))], AS_GIVEN)
    assert found.color_ratio != found.color_ratio  # NaN
    assert found.agreement.abs().max() == 0
    assert found.matched_share > 0.3


def test_a_late_field_is_taken_from_the_frame_that_it_belongs_to(room: Views) -> None:
    right = score([inspected(room)], AS_GIVEN)
    for name, field in (("poses", "extrinsics"), ("depth", "depth"), ("images", "images")):
        found = score([inspected(faults.late(room, field, 2))], Reading(late=name, shift=2))
        assert torch.equal(found.visible, right.visible), name
        torch.testing.assert_close(found.agreement, right.agreement)


def test_distance_along_the_ray_is_read_as_depth(room: Views) -> None:
    right = score([inspected(room)], AS_GIVEN)
    found = score([inspected(faults.along_rays(room))], Reading(ray_length=True))
    # Surfaces between pixels are interpolated along the ray, so a few tokens at edges differ.
    assert abs(found.matched_share - right.matched_share) < 0.02
    assert score([inspected(faults.along_rays(room))], AS_GIVEN).matched_share < 0.5 * right.matched_share


def test_pairs_are_spread_over_gaps_and_places() -> None:
    pairs = choose_pairs(200, 40)
    gaps = (pairs[:, 1] - pairs[:, 0]).unique().tolist()
    assert gaps == [1, 2, 4, 8, 16, 32, 64, 128]
    assert len(pairs) == 40
    assert pairs.min() == 0
    assert pairs.max() == 199
    assert choose_pairs(1, 5).shape == (0, 2)


@pytest.mark.parametrize("columns", [-2, 3])
def test_moved_depth_is_found_and_moved_back(columns: int, room: Views) -> None:
    right = register([inspected(room)])
    assert right.known
    assert not right.is_moved
    assert right.offset == 0
    depth = room.depth.roll(columns, -1)
    scene = inspected(replace(room, depth=depth))
    found = register([scene])
    assert found.is_moved
    assert (found.zoom, found.shift[1]) == (1.0, 0.0)
    assert found.shift[0] == pytest.approx(-columns / 48, abs=0.01)
    assert ("right" if columns > 0 else "left") in found.words
    back = with_moved_depth(scene, found).views.depth
    inner = slice(6, -6)
    share = (back[..., inner] == room.depth[..., inner]).float().mean()
    assert share > 0.97  # the shift is found to a pixel, and depth is picked and not averaged


def test_no_edges_of_depth_tell_nothing() -> None:
    assert not register([inspected(faults.flat_wall())]).known


def test_the_offset_of_colors_is_told_in_tokens(room: Views) -> None:
    scene = inspected(room, grid=24)  # two pixels per token
    matched = match_pairs(scene, AS_GIVEN)
    assert token_error([scene], [matched]) <= 0.5
    shifted = replace(matched, xy=matched.xy + torch.tensor([2.0, 0.0]))
    assert token_error([scene], [shifted]) >= 1.0


def test_tracks_of_a_known_pair() -> None:
    """A camera that moves along x: epipolar lines are rows, and a sighting two pixels below its row is two off."""
    extrinsics = torch.eye(4).repeat(2, 1, 1)
    extrinsics[1, 0, 3] = -1.0
    intrinsics = torch.tensor([[16.0, 0, 8], [0, 16, 8], [0, 0, 1]]).repeat(2, 1, 1)
    views = Views(torch.zeros(2, 3, 16, 16), torch.ones(2, 1, 16, 16), intrinsics, extrinsics, "plane")
    # Points 4 units away, which the second camera sees 16 / 4 = 4 pixels further left.
    first = torch.cartesian_prod(torch.arange(5.0, 15.0), torch.tensor([4.0, 9.0]))
    second = first - torch.tensor([4.0, 0.0])
    numbers = torch.arange(len(first))

    def scored(second: torch.Tensor, extrinsics: torch.Tensor) -> tuple[float, float]:
        tracks = faults.Tracks(
            numbers.repeat(2), torch.tensor([0, 1]).repeat_interleave(20), torch.cat([first, second]), 2
        )
        found = score_tracks([inspected(replace(views, tracks=tracks, extrinsics=extrinsics))], AS_GIVEN)
        return found.error.item(), found.fit.item()

    assert scored(second, extrinsics) == (pytest.approx(0.0, abs=1e-6), 1.0)
    # Sampson's distance shares the error between both views: 2 / sqrt(2) pixels, with tokens of 2 pixels.
    assert scored(second + torch.tensor([0.0, 2.0]), extrinsics)[0] == pytest.approx(2**-0.5, rel=1e-5)
    # The other way round the lines are the same, but the points lie behind the cameras.
    assert scored(second, torch.linalg.inv(extrinsics)) == (pytest.approx(0.0, abs=1e-6), 0.0)
