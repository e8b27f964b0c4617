"""Overlap of long scenes, of scenes without depth, and of what is kept on disk."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cameo.correspondence.tracks import Tracks
from cameo.data import LazySource, MultiViewDataset, SceneCameras, Views, open_views, view_overlap
from cameo.data import overlap as module
from cameo.data.overlap import plausible_range, scene_overlap
from cameo.errors import DataError
from tests.helpers import posed_formats as formats


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAMEO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wall(count: int, step: float = 0.02, depth: float = 2.0) -> Views:
    """Cameras side by side before a wall at distance 2, of which each sees 2 units."""
    extrinsics = torch.eye(4).repeat(count, 1, 1)
    extrinsics[:, 0, 3] = -step * torch.arange(count)
    intrinsics = torch.tensor([[16.0, 0, 8], [0, 16, 8], [0, 0, 1]]).repeat(count, 1, 1)
    images = torch.zeros(count, 3, 16, 16, dtype=torch.uint8)
    return Views(images, torch.full((count, 1, 16, 16), depth), intrinsics, extrinsics, "wall")


class Pairs:
    """Counts the pairs of views that are compared."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, share = 0, module._Surfaces.share

        def counted(surfaces: module._Surfaces, points: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
            self.count += len(views)
            return share(surfaces, points, views)

        monkeypatch.setattr(module._Surfaces, "share", counted)


@pytest.mark.parametrize(("count", "step"), [(300, 0.001), (400, 0.02), (800, 0.02)])
def test_the_number_of_pairs_grows_with_the_views_and_not_with_their_square(
    count: int, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, views = Pairs(monkeypatch), wall(count, step)
    overlap = view_overlap(views, grid=4)
    assert pairs.count <= 2 * module.CANDIDATES * count
    compared = overlap > 0
    expected = 1 - step * (torch.arange(count)[:, None] - torch.arange(count)).abs() / 2
    torch.testing.assert_close(overlap[compared], expected[compared], rtol=0, atol=0.26)  # the raster is of 4 columns
    # Candidates are spread over all that overlap: near ones and far ones among them.
    found = expected[compared & ~torch.eye(count, dtype=torch.bool)]
    assert (found > 0.7).float().mean() > 0.15
    assert (compared.sum(1) > 30).all()
    if step == 0.001:
        assert found.min() < 0.9


def test_scenes_of_few_views_are_compared_completely(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = Pairs(monkeypatch)
    view_overlap(wall(module.COMPLETE), grid=4)
    assert pairs.count == module.COMPLETE**2


def test_candidates_agree_with_the_complete_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    views = formats.room_views(24)
    complete = view_overlap(views)
    monkeypatch.setattr(module, "COMPLETE", 8)
    monkeypatch.setattr(module, "CANDIDATES", 6)
    some = view_overlap(views)
    compared = some > 0
    assert torch.equal(some[compared], complete[compared])
    assert compared.sum() <= 2 * 6 * 24 + 24
    assert (compared & ~torch.eye(24, dtype=torch.bool)).any(1).sum() >= 20
    monkeypatch.setattr(module, "CANDIDATES", 24)
    missed = complete * (view_overlap(views) == 0)
    assert missed.max() < 0.1  # pairs that share less than nine points tell of


def test_depth_is_coarsened_where_a_scene_has_too_much_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    views = formats.room_views(6)
    exact = view_overlap(views)
    monkeypatch.setattr(module, "KEPT_PIXELS", 6 * 16 * 22)
    surfaces = module._Surfaces(
        SceneCameras(views.intrinsics, views.extrinsics, views.size, "room"), iter(views.depth), 16
    )
    assert surfaces.cell == 3
    assert surfaces.ranges.numel() <= 2 * 6 * 16 * 22
    coarse = view_overlap(views)
    assert (coarse - exact).min() >= 0  # a larger range of depth holds the smaller one
    assert (coarse - exact).mean() < 0.05


def test_the_range_of_a_cell_holds_the_pixels_around_each_of_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    height, width, cell = 10, 14, 4
    depth = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(0)) + 0.5
    depth[0, 0, 3, 5] = 0.0  # not measured
    views = wall(1)
    monkeypatch.setattr(module, "KEPT_PIXELS", 3 * 4)
    cameras = SceneCameras(views.intrinsics, views.extrinsics, (height, width), "wall")
    surfaces = module._Surfaces(cameras, iter(depth), 2)
    assert surfaces.cell == cell
    for row in range(3):
        for column in range(4):
            rows = slice(max(0, row * cell - 1), row * cell + cell + 1)
            columns = slice(max(0, column * cell - 1), column * cell + cell + 1)
            around = depth[0, 0, rows, columns]
            around = around[around > 0]
            assert surfaces.ranges[row * 4 + column].tolist() == [around.min().item(), around.max().item()]


def test_shared_tracks() -> None:
    views = wall(3, depth=0.0)
    # View 0 has points 1 2 3 4, view 1 has 3 4 and 4 again, view 2 has none.
    tracks = Tracks(
        point=torch.tensor([1, 2, 3, 4, 3, 4, 4]),
        view=torch.tensor([0, 0, 0, 0, 1, 1, 1]),
        xy=torch.ones(7, 2),
        num_views=3,
    )
    overlap = view_overlap(replace(views, tracks=tracks))
    assert overlap.tolist() == [[1.0, 0.5, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    measured = replace(views, tracks=tracks, depth=wall(3).depth)
    assert view_overlap(measured)[0, 2] > 0.9  # depth knows more than tracks


def orbit(angles: list[float], radius: float = 3.0) -> Views:
    """Cameras on a circle about the origin that look at it."""
    extrinsics = torch.eye(4).repeat(len(angles), 1, 1)
    for view, angle in enumerate(map(math.radians, angles)):
        turn = [[math.cos(angle), 0, -math.sin(angle)], [0, 1, 0], [math.sin(angle), 0, math.cos(angle)]]
        extrinsics[view, :3, :3] = torch.tensor(turn)
        extrinsics[view, 2, 3] = radius
    return replace(wall(len(angles), depth=0.0), extrinsics=extrinsics)


def test_without_depth_and_tracks_the_cameras_tell() -> None:
    views = orbit([0, 40, 90, 180])
    cameras = SceneCameras(views.intrinsics, views.extrinsics, views.size, "orbit")
    torch.testing.assert_close(plausible_range(cameras), torch.full((4,), 3.0), rtol=1e-4, atol=1e-4)
    overlap = view_overlap(views, grid=1)  # one point, which all cameras look at
    expected = [(1 + math.cos(math.radians(angle))) / 2 for angle in (40, 90, 180)]
    assert overlap[0, 1:].tolist() == pytest.approx(expected, abs=0.02)
    # Cameras side by side whose axes never meet: the share of the image alone, at three times their distance.
    apart = replace(wall(3, step=0.5, depth=0.0))
    assert plausible_range(SceneCameras(apart.intrinsics, apart.extrinsics, apart.size, "wall")).tolist() == [3, 3, 3]
    shares = view_overlap(apart)[0]
    assert 1 > shares[1] > shares[2] > 0.5


def test_samples_are_drawn_from_renders_without_depth(tmp_path: Path) -> None:
    opened = open_views(formats.write_zero123(tmp_path / "object", formats.room_views(8)), (24, 32))
    sample = MultiViewDataset(opened, num_views=3, min_overlap=0.1)[0]
    assert sample["images"].shape == (3, 3, 24, 32)
    assert not sample["depth"].any()


class Counted:
    """A lazy source that counts what is decoded."""

    def __init__(self, views: Views) -> None:
        self.whole, self.selected = views, 0

    def __len__(self) -> int:
        return 1

    def views(self, scene: int) -> Views:
        raise AssertionError("a lazy source is not decoded as a whole")

    def cameras(self, scene: int) -> SceneCameras:
        views = self.whole
        return SceneCameras(views.intrinsics, views.extrinsics, views.size, views.key)

    def select(self, scene: int, indices: list[int]) -> Views:
        self.selected += len(indices)
        return self.whole.select(indices)


def test_a_lazy_source_of_somebody_else_is_decoded_view_by_view() -> None:
    source = Counted(wall(12, 0.2))
    assert isinstance(source, LazySource)
    dataset = MultiViewDataset(source, num_views=2)
    assert torch.equal(dataset.overlap(0), view_overlap(source.whole))
    assert source.selected == 12
    dataset[0]
    dataset[1]
    assert source.selected == 12 + 4


def files_of(cache: Path) -> list[Path]:
    return sorted((cache / "overlaps").glob("*"))


def test_the_overlap_is_kept_and_changes_with_cameras_and_depth(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = formats.write_seven_scenes(tmp_path / "room", formats.room_views(5))
    measured = scene_overlap(open_views(folder, (24, 32)), 0)
    assert len(files_of(cache)) == 1
    pairs = Pairs(monkeypatch)
    assert torch.equal(scene_overlap(open_views(folder, (24, 32)), 0), measured)
    assert pairs.count == 0
    scene_overlap(open_views(folder, (12, 16)), 0)
    assert (pairs.count, len(files_of(cache))) == (25, 2)
    (folder / "frame-000001.color.png").write_bytes((folder / "frame-000002.color.png").read_bytes())
    scene_overlap(open_views(folder, (24, 32)), 0)
    assert len(files_of(cache)) == 2  # colors play no part
    depth = folder / "frame-000001.depth.png"
    stat = depth.stat()
    content = depth.read_bytes()
    depth.write_bytes((folder / "frame-000002.depth.png").read_bytes())
    import os

    os.utime(depth, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # content counts, not times
    changed = scene_overlap(open_views(folder, (24, 32)), 0)
    assert (len(files_of(cache)), torch.equal(changed, measured)) == (3, False)
    depth.write_bytes(content)
    pose = np.loadtxt(folder / "frame-000001.pose.txt")
    pose[0, 3] += 0.3
    np.savetxt(folder / "frame-000001.pose.txt", pose)
    scene_overlap(open_views(folder, (24, 32)), 0)
    assert len(files_of(cache)) == 4


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", None])
def test_a_damaged_file_is_measured_again(content: bytes | None, tmp_path: Path, cache: Path) -> None:
    opened = open_views(formats.write_seven_scenes(tmp_path / "room", formats.room_views()), (24, 32))
    measured = scene_overlap(opened, 0)
    (path,) = files_of(cache)
    if content is None:
        np.save(path, np.full((4, 4), 7.0, dtype=np.float32))  # no shares
    else:
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged .*the overlap is measured again"):
        assert torch.equal(scene_overlap(opened, 0), measured)
    assert torch.equal(scene_overlap(opened, 0), measured)


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_views(formats.write_seven_scenes(tmp_path / "room", formats.room_views()), (24, 32))
    (tmp_path / "file").touch()
    monkeypatch.setenv("CAMEO_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot keep the overlap .*set CAMEO_CACHE"):
        scene_overlap(opened, 0)


def test_a_scale_that_looks_wrong_is_told_each_time(tmp_path: Path, cache: Path) -> None:
    folder = formats.write_seven_scenes(tmp_path / "room", formats.room_views())
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"the largest depth of all frames is .* m with depth_scale=1e\+06"):
            scene_overlap(open_views(folder, (24, 32), depth_scale=1e6), 0)
    assert not files_of(cache)


def test_depth_that_is_missing_everywhere_is_an_error_once_the_overlap_is_measured(tmp_path: Path) -> None:
    from PIL import Image

    folder = formats.write_seven_scenes(tmp_path / "room", formats.room_views())
    for path in folder.glob("*.depth.png"):
        Image.fromarray(np.zeros((formats.HEIGHT, formats.WIDTH), dtype=np.uint16)).save(path)
    with pytest.raises(DataError, match="room: no frame has any depth measurement"):
        MultiViewDataset(open_views(folder), num_views=2)[0]
