"""Depth in every kind of file, in the same numbers; what is no measurement is 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import OpenEXR
import pytest
import tifffile
import torch
from PIL import Image

from cameo.data import open_views
from cameo.errors import DataError

HEIGHT, WIDTH = 6, 8
DEPTH = np.arange(1, HEIGHT * WIDTH + 1, dtype=np.float64).reshape(HEIGHT, WIDTH) / 16


def exr(path: Path, depth: np.ndarray, channel: str = "Z") -> None:
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {channel: np.ascontiguousarray(depth)}).write(str(path))


# Ending, writer, and numbers per unit.
FILES: dict[str, tuple[str, Callable[[Path], object], float]] = {
    "png": ("png", lambda path: Image.fromarray((DEPTH * 1000).astype(np.uint16)).save(path), 1000),
    "npy": ("npy", lambda path: np.save(path, DEPTH), 1),
    "npy of integers": ("npy", lambda path: np.save(path, (DEPTH * 16).astype(np.int32)), 16),
    "npy with an axis of one": ("npy", lambda path: np.save(path, DEPTH[None, :, :, None]), 1),
    "npz": ("npz", lambda path: np.savez_compressed(path, depth=DEPTH.astype(np.float32), mask=DEPTH > 1), 1),
    "npz of one array": ("npz", lambda path: np.savez(path, DEPTH), 1),
    "tiff of 16 bit": ("tiff", lambda path: Image.fromarray((DEPTH * 1000).astype(np.uint16)).save(path), 1000),
    "tif of float32": ("tif", lambda path: Image.fromarray(DEPTH.astype(np.float32)).save(path), 1),
    "tif of float64": ("tif", lambda path: tifffile.imwrite(path, DEPTH), 1),
    "tif of float16, packed": ("tif", lambda path: tifffile.imwrite(path, DEPTH.astype(np.float16), compression=8), 1),
    "exr": ("exr", lambda path: exr(path, DEPTH.astype(np.float32)), 1),
    "exr of half floats": ("exr", lambda path: exr(path, DEPTH.astype(np.float16), "V"), 1),
}


def scene(folder: Path, ending: str, write: Callable[[Path], object], per_unit: float) -> Path:
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.png")
    write(folder / f"depth.{ending}")
    frame = {"file_path": "a.png", "depth_file_path": f"depth.{ending}", "transform_matrix": np.eye(4).tolist()}
    content = {"fl_x": 9, "depth_unit_scale_factor": 1 / per_unit, "frames": [frame]}
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", FILES)
def test_depth_is_read_from_every_kind_of_file(name: str, tmp_path: Path) -> None:
    depth = open_views(scene(tmp_path, *FILES[name]), (HEIGHT, WIDTH)).views(0).depth[0, 0]
    # Numbers of the form n / 16 are exact in all of these, but for whole thousandths.
    torch.testing.assert_close(depth, torch.from_numpy(DEPTH).float(), rtol=0, atol=6e-4 if "1000" in name else 5.1e-4)


def test_the_setting_wins_over_the_file_and_millimeters_are_the_default(tmp_path: Path) -> None:
    folder = scene(tmp_path, *FILES["png"])
    given = open_views(folder, (HEIGHT, WIDTH), depth_scale=500).views(0).depth
    torch.testing.assert_close(given[0, 0, 0, :2], torch.tensor([0.124, 0.25]))  # 62 and 125 in the file
    path = folder / "transforms.json"
    path.write_text(path.read_text().replace("depth_unit_scale_factor", "another_key"))
    assert open_views(folder, (HEIGHT, WIDTH)).views(0).depth[0, 0, 0, 1].item() == pytest.approx(0.125)


def test_what_is_no_measurement_is_zero(tmp_path: Path) -> None:
    depth = DEPTH.copy()
    depth[0, :5] = np.nan, np.inf, -1.0, 0.0, 1e10  # renderers write 1e10 where a ray meets nothing
    read = open_views(scene(tmp_path, "npy", lambda path: np.save(path, depth), 1), (HEIGHT, WIDTH)).views(0).depth
    assert read[0, 0, 0, :6].tolist() == [0, 0, 0, 0, 0, 6 / 16]


@pytest.mark.parametrize(
    ("ending", "write", "message"),
    [
        ("png", lambda path: Image.new("RGB", (WIDTH, HEIGHT)).save(path), "expected a 16-bit gray depth image"),
        ("npy", lambda path: path.write_bytes(b"\x93NUMPY"), "depth.npy: cannot read the depth"),
        ("npy", lambda path: np.save(path, DEPTH.astype(str)), "depth.npy: expected depth as numbers"),
        ("npz", lambda path: np.savez(path, a=DEPTH, b=DEPTH), "one array or one that is named depth, got a, b"),
        ("tif", lambda path: path.write_bytes(b"II*\0"), "depth.tif: cannot decode the depth image"),
        ("tif", lambda path: Image.new("L", (WIDTH, HEIGHT)).save(path), "depth of 16 bit or more, got 8 bit"),
        ("exr", lambda path: path.write_bytes(b"v/1\1"), "depth.exr: cannot decode the depth image"),
        ("exr", lambda path: OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage},
                                          {"A": DEPTH.astype(np.float32), "B": DEPTH.astype(np.float32)}
                                          ).write(str(path)), "expected a channel Z, V, Y or R, got A, B"),
    ],
)  # fmt: skip
def test_unusable_depth_is_named(ending: str, write: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_views(scene(tmp_path, ending, write, 1))


@pytest.mark.parametrize(("ending", "package"), [("exr", "OpenEXR"), ("tif", "tifffile")])
def test_a_missing_package_is_named(ending: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    folder = scene(tmp_path, *FILES["exr" if ending == "exr" else "tif of float64"])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf'depth.{ending}: needs the package {package}; pip install "cameo-diff'):
        open_views(folder)
