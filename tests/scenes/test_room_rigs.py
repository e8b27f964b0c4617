"""Rigs in rooms: the poses that all scenes share, cameras that stand free, and the overlap with the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cameo.data import EmbeddedScenes, RoomRig, Views, view_overlap
from cameo.errors import DataError
from cameo.geometry import orbit_centre, project, spherical_angles
from cameo.scenes.rendering import TriangleScene
from cameo.scenes.room_rigs import rigged_room, view_overlaps
from cameo.scenes.rooms import bare_room, clearance, random_room

SIZE = (48, 64)
UP = torch.tensor([[0.0, 0.0, 1.0]])


def relative_angles(extrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Azimuth and elevation relative to view 0 in degrees, and distance, about the point that the cameras look at."""
    given = torch.from_numpy(extrinsics)[None]
    azimuth, elevation, distance = spherical_angles(given, orbit_centre(given), UP)
    turn = (azimuth - azimuth[:, :1] + 180) % 360 - 180
    return turn[0].numpy(), (elevation - elevation[:, :1])[0].numpy(), distance[0].numpy()


@pytest.mark.parametrize("make_room", [bare_room, random_room])
def test_all_rooms_share_the_poses_of_the_rig_and_nothing_else(make_room: object) -> None:
    rig = RoomRig.fan(7, distance=(1.0, 1.8))
    drawn = [rigged_room(rig, np.random.default_rng(seed), make_room, SIZE) for seed in range(6)]  # type: ignore[arg-type]
    for scene, intrinsics, extrinsics in drawn:
        turn, lift, distance = relative_angles(extrinsics)
        np.testing.assert_allclose(turn, [0, -24, -16, -8, 8, 16, 24], atol=1e-6)
        np.testing.assert_allclose(lift, [0, 6, -6, 6, -6, 6, -6], atol=1e-6)
        np.testing.assert_allclose(distance, distance[0])
        assert 1.0 <= distance[0] <= 1.8
        assert clearance(scene, intrinsics, extrinsics, SIZE) > 1
        focus = orbit_centre(torch.from_numpy(extrinsics)[None])
        xy, _ = project(
            focus.expand(1, 7, 1, 3), torch.from_numpy(intrinsics)[None], torch.from_numpy(extrinsics)[None]
        )
        np.testing.assert_allclose(xy[0, :, 0].numpy(), intrinsics[:, :2, 2], atol=1e-6)  # in the middle
        centers = -np.einsum("fji,fj->fi", extrinsics[:, :3, :3], extrinsics[:, :3, 3])
        assert not scene.occluded(centers, 0.99 * (focus.numpy() - centers)).any()
    assert np.std([relative_angles(extrinsics)[2][0] for *_, extrinsics in drawn]) > 0.1


def test_the_overlap_is_that_of_the_data_set_and_within_the_bounds(tmp_path: Path) -> None:
    rig = RoomRig.fan(3, azimuths=(0, -30, 30), overlap=(0.5, 0.7))
    for seed in range(4):
        scene, intrinsics, extrinsics = rigged_room(rig, np.random.default_rng(seed), bare_room, (64, 64))
        shares = view_overlaps(scene, intrinsics, extrinsics, (64, 64))
        assert shares[0] == 1
        assert ((shares[1:] >= 0.5) & (shares[1:] <= 0.7)).all()
    source = EmbeddedScenes(
        num_scenes=4, size=(64, 64), rig=rig, content="bare_rooms", cache_dir=tmp_path, progress=False
    )
    for scene in range(4):
        coarse = view_overlap(source.views(scene))[1:, 0]  # by depth images, which see less far behind edges
        assert ((coarse > 0.42) & (coarse < 0.78)).all()


def test_jitter_varies_the_targets_and_separation_keeps_them_apart() -> None:
    rig = RoomRig.fan(3, azimuths=(0, 0, 0), elevations=(0, 2, 2), jitter=(50, 10), separation=15)
    found = []
    for seed in range(12):
        extrinsics = rigged_room(rig, np.random.default_rng(seed), bare_room, (32, 32))[2]
        axes = extrinsics[:, 2, :3]
        angles = np.degrees(np.arccos(np.clip(axes @ axes.T, -1, 1)))
        assert angles[np.triu_indices(3, 1)].min() >= 15 - 1e-4
        turn, lift, _ = relative_angles(extrinsics)
        assert (np.abs(turn) <= 50).all()
        assert ((lift[1:] >= -8) & (lift[1:] <= 12)).all()
        found.append(turn[1:])
    assert np.std(found) > 15


def test_the_cameras_are_a_function_of_the_scene(tmp_path: Path) -> None:
    settings = {"num_scenes": 2, "size": (8, 8), "content": "bare_rooms", "progress": False}
    rig = RoomRig.fan(2)
    first = EmbeddedScenes(rig=rig, cache_dir=tmp_path / "a", **settings)  # type: ignore[arg-type]
    again = EmbeddedScenes(rig=rig, cache_dir=tmp_path / "b", **settings)  # type: ignore[arg-type]
    assert torch.equal(first.views(1).images, again.views(1).images)
    assert first.folder.name == again.folder.name
    others = [
        RoomRig.fan(2, distance=(1.2, 1.8)),
        RoomRig.fan(2, azimuths=(0, 23)),
        RoomRig.fan(2, jitter=(1, 0)),
        None,
    ]
    folders = {EmbeddedScenes(rig=other, cache_dir=tmp_path, **settings).folder.name for other in others}  # type: ignore[arg-type]
    assert len(folders | {first.folder.name}) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"azimuths": (0, 5)}, r"azimuths: expected one per view, 3, got 2: \[0, 5\]"),
        ({"azimuths": (10, 0, 5)}, r"azimuths: expected angles relative to view 0, whose own is 0, got 10.0"),
        ({"azimuths": (0, 5, 181)}, r"azimuths: expected degrees in \[-180, 180\]"),
        ({"elevations": (0, 5, 95)}, r"elevations: expected degrees in \[-90, 90\]"),
        ({"azimuths": (0, float("nan"), 5)}, r"azimuths: expected degrees"),
        ({"distance": (2, 1)}, r"distance: expected meters \[low, high\] with 0 < low <= high, got \[2, 1\]"),
        ({"jitter": (-1, 0)}, r"jitter: expected degrees .*, 0 or more, got \[-1, 0\]"),
        ({"separation": 180}, r"separation: expected degrees in \[0, 180\), got 180"),
        ({"overlap": (0.5, 0.4)}, r"overlap: expected shares"),
    ],
)
def test_angles_that_make_no_rig_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoomRig.fan(3, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="azimuths: expected 2 views or more, got 1"):
        RoomRig((0.0,), (0.0,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"distance": (9, 9)},
            r"no place for the camera rig in \d+ rooms: a camera outside of the room \(\d+ times\)\. ",
        ),
        (
            {"overlap": (0.99, 1.0)},
            r"another overlap with the reference \(\d+ times\).*; overlap found: 0\.\d+ to 0\.\d+",
        ),
        ({"jitter": (1, 1), "separation": 90}, r"cameras closer together than the separation \(\d+ times\)"),
    ],
)
def test_a_rig_without_a_place_says_what_is_in_the_way(
    options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cameo.scenes.room_rigs.ROOMS", 2)
    with pytest.raises(DataError, match=message):
        rigged_room(RoomRig.fan(3, **options), np.random.default_rng(0), bare_room, (32, 32))  # type: ignore[arg-type]


def test_a_rig_stands_where_it_belongs(tmp_path: Path) -> None:
    options = {"num_scenes": 1, "cache_dir": tmp_path, "progress": False}
    with pytest.raises(ValueError, match=r"RoomRig\(.*stands in a room, got content='objects'"):
        EmbeddedScenes(content="objects", rig=RoomRig.fan(3), **options)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"rig='mvdream': expected an object in the middle, .* or a cameo.data.RoomRig"
    ):
        EmbeddedScenes(content="rooms", rig="mvdream", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"views_per_scene: expected 3, the views of the rig, got 5"):
        EmbeddedScenes(rig=RoomRig.fan(3), views_per_scene=5, **options)  # type: ignore[arg-type]
    views: Views = EmbeddedScenes(rig=RoomRig.fan(3), size=(8, 8), **options).views(0)  # type: ignore[arg-type]
    assert len(views) == 3


def test_what_stands_in_front_of_a_surface_counts_as_not_shown() -> None:
    """A wall 4 m away with a screen at 2 m, seen from two places side by side: by hand."""

    def square(half: float, z: float) -> np.ndarray:
        a, b, c, d = ((x, y, z) for x, y in ((-half, -half), (half, -half), (half, half), (-half, half)))
        return np.array([[a, b, c], [a, c, d]])

    corners = np.concatenate([square(0.6, 2.0), square(9.0, 4.0)])
    scene = TriangleScene(corners, np.tile([0.0, 0.0, -1.0], (4, 3, 1)), lambda surface: surface.points * 0)
    intrinsics = np.tile([[16.0, 0, 16], [0, 16, 16], [0, 0, 1]], (2, 1, 1))  # 90 degrees: 8 m of the wall
    extrinsics = np.tile(np.eye(4), (2, 1, 1))
    extrinsics[1, 0, 3] = -2.0  # the second camera stands 2 m to the right
    # 12 x 12 rays, every 2/3 m of the wall from x = -5/3 m. Those of 3 columns are more than 4 m to the right, outside
    # of the first view. The screen, whole in the first view, hides x and y of -1.2 to 1.2 m of the wall: 4 rows,
    # in which the second view has the screen in its first 2 columns and the wall at x = -1/3, 1/3 and 1 m.
    rays = 144 - 3 * 12 - 3 * 4
    assert view_overlaps(scene, intrinsics, extrinsics, (32, 32)).tolist() == [1, pytest.approx(rays / 144)]
