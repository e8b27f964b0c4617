"""RGB-D sequences: cropping and resizing keep geometry, missing depth stays missing, bad files are named."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cameo.data import RGBDSequence, Views
from cameo.errors import DataError, ShapeError
from cameo.geometry import project, unproject
from cameo.scenes.rooms import look_at

HEIGHT, WIDTH = 48, 64
CALIBRATION = np.array([[60.0, 0.0, 33.0], [0.0, 62.0, 25.0], [0.0, 0.0, 1.0]])
FRAMES = 10


def floor_frame(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colour, depth in metres and camera-to-world of a camera above the plane z = 0, painted by position."""
    extrinsics = look_at(np.array([[0.1 * index, -1.5, 1.5]]), np.array([[0.1 * index, 0.0, 0.0]]))[0]
    roll = np.radians(20.0)  # depth differs along rows and along columns
    turn = np.array([[np.cos(roll), -np.sin(roll), 0.0], [np.sin(roll), np.cos(roll), 0.0], [0.0, 0.0, 1.0]])
    extrinsics[:3] = turn @ extrinsics[:3]
    pose = np.linalg.inv(extrinsics)
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(CALIBRATION).T @ pose[:3, :3].T
    depth = -pose[2, 3] / rays[..., 2]
    points = pose[:3, 3] + rays * depth[..., None]
    color = np.stack([np.sin(points[..., 0] * 5), np.cos(points[..., 1] * 5), np.sin(points.sum(-1) * 2)], -1)
    return np.rint(127.5 + 120 * color).astype(np.uint8), depth, pose


@pytest.fixture
def seven_scenes(tmp_path: Path) -> Path:
    folder = tmp_path / "seven"
    folder.mkdir()
    np.savetxt(folder / "camera-intrinsics.txt", CALIBRATION)
    for index in range(FRAMES):
        color, depth, pose = floor_frame(index)
        stem = folder / f"frame-{index:06d}"
        Image.fromarray(color).save(f"{stem}.color.png")
        millimetres = np.rint(depth * 1000).astype(np.uint16)
        millimetres[0:6, 0:20], millimetres[0:6, 40:] = 0, 65535
        Image.fromarray(millimetres).save(f"{stem}.depth.png")
        np.savetxt(f"{stem}.pose.txt", pose)
    return folder


@pytest.fixture
def tum(tmp_path: Path) -> Path:
    from scipy.spatial.transform import Rotation

    folder = tmp_path / "rgbd_dataset_freiburg3_floor"
    lines: dict[str, list[str]] = {
        "rgb": ["# time file"],
        "depth": ["# time file"],
        "groundtruth": ["# pose"],
    }
    for name in ("rgb", "depth"):
        (folder / name).mkdir(parents=True)
    for index in range(FRAMES):
        color, depth, pose = floor_frame(index)
        time = 100.0 + index
        Image.fromarray(color).save(folder / "rgb" / f"{time:.6f}.png")
        Image.fromarray(np.rint(depth * 5000).astype(np.uint16)).save(folder / "depth" / f"{time:.6f}.png")
        lines["rgb"].append(f"{time:.6f} rgb/{time:.6f}.png")
        lines["depth"].append(f"{time + 0.004:.6f} depth/{time:.6f}.png")
        quaternion = Rotation.from_matrix(pose[:3, :3]).as_quat()
        numbers = " ".join(f"{value:.9f}" for value in (*pose[:3, 3], *quaternion))
        lines["groundtruth"].append(f"{time - 0.003:.6f} {numbers}")
        lines["groundtruth"].append(f"{time - 0.4:.6f} 9 9 9 0 0 0 1")
    for name, content in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
    return folder


def world_points(views: Views) -> torch.Tensor:
    return unproject(views.depth[None].double(), views.intrinsics[None].double(), views.extrinsics[None].double())[0]


@pytest.mark.parametrize("size", [(48, 64), (24, 32), (16, 16), (12, 30), (40, 16), (60, 80)])
def test_points_stay_where_they_are_after_crop_and_resize(seven_scenes: Path, size: tuple[int, int]) -> None:
    """Every measured pixel still unprojects onto the plane z = 0, to the same place up to half a pixel."""
    views = RGBDSequence(seven_scenes, size=size).views()
    assert views.images.shape == (FRAMES, 3, *size)
    points = world_points(views)
    measured = points.isfinite().all(1)
    # A source pixel spans up to 0.05 m of depth on the slanted plane; nearest sampling is off by half.
    tolerance = 0.002 if size == (48, 64) else 0.06
    assert points[:, 2][measured].abs().max() < tolerance
    # Halving puts each new centre on the border of two pixels; the later one is taken, half a pixel off.
    assert points[:, 2][measured].mean().abs() < (0.015 if size == (24, 32) else 0.01)


def test_colour_and_geometry_stay_aligned(seven_scenes: Path) -> None:
    """The colour painted at a world point is found at that point's projection."""
    views = RGBDSequence(seven_scenes, size=(24, 24)).views()
    points = world_points(views)[:, :, 8:]
    expected = torch.stack([(points[:, 0] * 5).sin(), (points[:, 1] * 5).cos(), (points.sum(1) * 2).sin()], dim=1)
    error = (views.images[:, :, 8:] - (127.5 + 120 * expected)).abs() / 255
    assert error.mean() < 0.03


def test_intrinsics_project_the_same_world_point(seven_scenes: Path) -> None:
    full = RGBDSequence(seven_scenes, size=(HEIGHT, WIDTH)).views()
    small = RGBDSequence(seven_scenes, size=(12, 12)).views()
    point = torch.tensor([0.3, 0.1, 0.0]).expand(1, FRAMES, 1, 3)
    there, _ = project(point, full.intrinsics[None], full.extrinsics[None])
    here, _ = project(point, small.intrinsics[None], small.extrinsics[None])
    # 64x48 loses 8 columns on each side and shrinks four times.
    torch.testing.assert_close(here, (there - torch.tensor([8.0, 0.0])) / 4, rtol=1e-5, atol=1e-4)


def test_missing_depth_stays_missing_and_is_never_averaged(seven_scenes: Path) -> None:
    path = seven_scenes / "frame-000000.depth.png"
    raw = np.zeros((HEIGHT, WIDTH), dtype=np.uint16)
    raw[:, ::2] = 1000
    raw[:, 1::4] = 65535
    Image.fromarray(raw).save(path)
    depth = RGBDSequence(seven_scenes, size=(24, 32)).views().depth[0, 0]
    # New column c covers source columns 2c and 2c + 1; its centre is the border, which belongs to 2c + 1.
    assert set(depth.unique().tolist()) == {0.0}
    raw[:, 1::2] = 2500
    Image.fromarray(raw).save(path)
    depth = RGBDSequence(seven_scenes, size=(24, 32)).views().depth[0, 0]
    assert set(depth.unique().tolist()) == {2.5}


def test_depth_of_another_size_shows_the_same_field_of_view(seven_scenes: Path) -> None:
    expected = RGBDSequence(seven_scenes, size=(48, 64)).views().depth
    for path in seven_scenes.glob("*.depth.png"):
        raw = np.array(Image.open(path))
        Image.fromarray(raw.repeat(2, 0).repeat(2, 1)).save(path)
    torch.testing.assert_close(RGBDSequence(seven_scenes, size=(48, 64)).views().depth, expected)
    for path in seven_scenes.glob("*.depth.png"):
        Image.fromarray(np.array(Image.open(path))[:, :80]).save(path)
    with pytest.raises(DataError, match=r"frame-000000.depth.png: depth of 80x96 has another aspect"):
        RGBDSequence(seven_scenes)


def test_tum_equals_the_same_frames_in_seven_scenes_layout(tum: Path, seven_scenes: Path) -> None:
    views = RGBDSequence(tum, size=(24, 32), intrinsics=torch.from_numpy(CALIBRATION)).views()
    other = RGBDSequence(seven_scenes, size=(24, 32)).views()
    torch.testing.assert_close(views.extrinsics, other.extrinsics, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(views.intrinsics, other.intrinsics)
    assert torch.equal(views.images, other.images)
    both = (views.depth > 0) & (other.depth > 0)
    torch.testing.assert_close(views.depth[both], other.depth[both], atol=1e-3, rtol=0)


def test_tum_association_tolerance_and_published_intrinsics(tum: Path) -> None:
    with pytest.raises(DataError, match=r"no depth image within 0.001 s"):
        RGBDSequence(tum, intrinsics=CALIBRATION, time_tolerance=0.001)
    with pytest.raises(DataError, match=r"principal point .* outside the 64x48 image"):
        RGBDSequence(tum)  # freiburg3's published calibration is for 640x480
    for path in (tum / "rgb").glob("*.png"):
        Image.open(path).resize((640, 480)).save(path)
    views = RGBDSequence(tum, size=(480, 640), stride=5).views()
    expected = torch.tensor([[535.4, 0.0, 320.6], [0.0, 539.2, 248.1], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(views.intrinsics[0], expected)


def test_held_out_frames_are_the_last_ones(seven_scenes: Path) -> None:
    train = RGBDSequence(seven_scenes, split="train", holdout=0.25)
    validation = RGBDSequence(seven_scenes, split="validation", holdout=0.25)
    everything = RGBDSequence(seven_scenes)
    assert train.frame_names + validation.frame_names == everything.frame_names
    assert len(validation.views()) == 3
    assert validation.views().key == "seven-validation"


def test_dropped_frames_are_counted_and_the_first_is_named(seven_scenes: Path) -> None:
    (seven_scenes / "frame-000003.depth.png").unlink()
    np.savetxt(seven_scenes / "frame-000005.pose.txt", np.full((4, 4), np.inf))
    np.savetxt(seven_scenes / "frame-000006.pose.txt", np.zeros((4, 4)))
    (seven_scenes / "frame-000007.pose.txt").write_text("lost tracking")
    with pytest.warns(UserWarning, match=r"4 of 10 frames left out; first: frame-000003 \(no depth file\)"):
        sequence = RGBDSequence(seven_scenes)
    assert len(sequence.views()) == 6
    for path in seven_scenes.glob("*.pose.txt"):
        path.write_text("nan " * 16)
    with pytest.raises(DataError, match=r"10 of 10 frames left out.*No usable frame is left"):
        RGBDSequence(seven_scenes)


@pytest.mark.parametrize("kind", ["color", "depth"])
def test_truncated_image_is_named(seven_scenes: Path, kind: str) -> None:
    path = seven_scenes / f"frame-000004.{kind}.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=rf"frame-000004.{kind}.png: cannot decode the (color|depth) image"):
        RGBDSequence(seven_scenes).views()


def test_depth_that_is_not_16_bit(seven_scenes: Path) -> None:
    Image.new("L", (WIDTH, HEIGHT), 7).save(seven_scenes / "frame-000000.depth.png")
    with pytest.raises(DataError, match=r"frame-000000.depth.png: expected a 16-bit gray depth image, got uint8"):
        RGBDSequence(seven_scenes)


def test_all_depth_missing(seven_scenes: Path) -> None:
    for path in seven_scenes.glob("*.depth.png"):
        Image.fromarray(np.zeros((HEIGHT, WIDTH), dtype=np.uint16)).save(path)
    with pytest.raises(DataError, match="no frame has any depth measurement"):
        RGBDSequence(seven_scenes).views()


def test_intrinsics_missing_wrong_or_given(seven_scenes: Path) -> None:
    path = seven_scenes / "camera-intrinsics.txt"
    path.write_text("1 2\n3 4\n")
    with pytest.raises(DataError, match=r"camera-intrinsics.txt: expected a 3x3 matrix in pixels, got 2x2"):
        RGBDSequence(seven_scenes)
    path.unlink()
    with pytest.raises(DataError, match=r"camera-intrinsics.txt not found\); pass intrinsics="):
        RGBDSequence(seven_scenes)
    given = RGBDSequence(seven_scenes, size=(48, 64), intrinsics=CALIBRATION.tolist()).views()
    torch.testing.assert_close(given.intrinsics[0], torch.from_numpy(CALIBRATION).float())
    with pytest.raises(ShapeError, match=r"intrinsics: expected \[3, 3\], got \[4, 4\]"):
        RGBDSequence(seven_scenes, intrinsics=torch.eye(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent", "absent: expected a folder with an RGB-D sequence, found nothing"),
        (lambda folder: folder, r"no RGB-D frames found; looked for frame-NNNNNN.*7scenes.*rgb.txt.*tum"),
    ],
)
def test_nothing_to_read(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(DataError, match=message):
        RGBDSequence(make(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "unknown split 'test'"),
        ({"layout": "7scene"}, "unknown layout '7scene': did you mean '7scenes'"),
        ({"holdout": 1.0}, "holdout: expected a share between 0 and 1"),
        ({"stride": 0}, "expected at least 1"),
        ({"depth_scale": 0.0}, "depth_scale: expected units per meter > 0"),
        ({"layout": "tum"}, "looked for rgb.txt, depth.txt and groundtruth.txt"),
    ],
)
def test_wrong_settings(seven_scenes: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RGBDSequence(seven_scenes, **options)  # type: ignore[arg-type]


def test_one_scene_only(seven_scenes: Path) -> None:
    sequence = RGBDSequence(seven_scenes)
    assert len(sequence) == 1
    with pytest.raises(IndexError, match="one scene"):
        sequence.views(1)


def test_real_sequence_agrees_with_its_poses(real_data: Callable[[str], Path]) -> None:
    """Colours reprojected with the true poses agree far better than with inverted or shuffled ones."""
    views = RGBDSequence(real_data("rgbd_room"), size=(60, 80), stride=10).views()
    assert (views.depth > 0).float().mean() > 0.8
    right = neighbour_error(views, views.extrinsics)
    assert right < 0.6 * neighbour_error(views, views.extrinsics.roll(7, 0))
    assert right < 0.6 * neighbour_error(views, torch.linalg.inv(views.extrinsics))


def neighbour_error(views: Views, extrinsics: torch.Tensor) -> float:
    """Mean absolute colour difference when view i is looked up at the points of view i + 1."""
    images, (height, width) = views.images.float() / 255, views.size
    points = unproject(views.depth[None, 1:], views.intrinsics[None, 1:], extrinsics[None, 1:])[0].flatten(2).mT
    xy, z = project(points.nan_to_num()[None], views.intrinsics[None, :-1], extrinsics[None, :-1])
    grid = 2 * xy[0] / torch.tensor([width, height]) - 1
    color = F.grid_sample(images[:-1], grid[:, None].nan_to_num(5.0), align_corners=False)[:, :, 0]
    visible = (grid.abs() < 1).all(-1) & (z[0] > 0) & points.isfinite().all(-1)
    return (color - images[1:].flatten(2)).abs().mean(1)[visible].mean().item()


@pytest.mark.parametrize(
    ("intrinsics", "message"),
    [
        ([[0.0, 0, 32], [0, 60, 24], [0, 0, 1]], "focal length that is not positive"),
        ([[60.0, 0, 32], [0, -60, 24], [0, 0, 1]], "focal length that is not positive"),
        ([[math.nan, 0, 32], [0, 60, 24], [0, 0, 1]], "non-finite"),
        ([[60.0, 0, 32], [0, 60, 24], [0, 0, 2]], "last row other than 0 0 1"),
        ([[0.9, 0, 0.5], [0, 1.2, 0.5], [0, 0, 1]], "normalized values .*multiply the first row by the width"),
    ],
)
def test_unusable_intrinsics_are_refused(seven_scenes: Path, intrinsics: list[list[float]], message: str) -> None:
    with pytest.raises(DataError, match=rf"seven: intrinsics: .*{message}"):
        RGBDSequence(seven_scenes, intrinsics=intrinsics)
    np.savetxt(seven_scenes / "camera-intrinsics.txt", np.array(intrinsics))
    with pytest.raises(DataError, match=message):
        RGBDSequence(seven_scenes)


@pytest.mark.parametrize(("place", "value"), [((3,), (5.0, 5.0, 5.0, 7.0)), ((0, 3), 1e300)])
def test_a_pose_that_is_none_is_left_out(seven_scenes: Path, place: tuple[int, ...], value: object) -> None:
    path = seven_scenes / "frame-000001.pose.txt"
    pose = np.loadtxt(path)
    pose[place] = value
    np.savetxt(path, pose)
    with pytest.warns(UserWarning, match=r"first: frame-000001 \(its pose is not a finite rigid 4x4 matrix"):
        assert "frame-000001" not in RGBDSequence(seven_scenes).frame_names


def test_depth_stored_in_metres_is_noticed(seven_scenes: Path) -> None:
    for path in seven_scenes.glob("*.depth.png"):
        Image.fromarray(np.full((HEIGHT, WIDTH), 2, dtype=np.uint16)).save(path)
    with pytest.warns(UserWarning, match=r"largest depth of all frames is 0\.002 m .*pass depth_scale=1"):
        RGBDSequence(seven_scenes).views()
    with warnings.catch_warnings(action="error"):
        RGBDSequence(seven_scenes, depth_scale=1).views()


def test_files_of_the_wrong_kind_are_named(seven_scenes: Path, tum: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tum / "rgb.txt").write_bytes(b"\xff\xfe1.0 rgb/0.png")
    with pytest.raises(DataError, match=r"rgb.txt: expected a text file"):
        RGBDSequence(tum)
    path = seven_scenes / "frame-000001.pose.txt"
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match=r"first: frame-000001 \(its pose"):
        RGBDSequence(seven_scenes)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)  # what is a bomb in earnest would take long to write
    with pytest.raises(DataError, match=r"frame-000000.color.png: cannot decode the color image .*decompression bomb"):
        RGBDSequence(seven_scenes)
