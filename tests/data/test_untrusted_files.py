"""Data of others: no file is waited for, nothing outside of the folder is read, and no small file fills the memory."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import signal
import socket
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cameo.data import open_views
from cameo.data.matches import MatchReader
from cameo.errors import DataError
from cameo.images.reading import read_image
from cameo.scenes.meshes import load_mesh
from cameo.settings import read_yaml
from tests.helpers.posed_formats import CALIBRATION, WRITERS, room_views

SECONDS = 20


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """A read that waits for a pipe ends here."""

    def late(*_: object) -> None:
        raise TimeoutError("waited for a file")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def listening(path: Path, outside: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket has at most a hundred characters
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def device(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path, outside: Path) -> None:
    path.mkdir()


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def read_all(place: Path) -> int:
    """Read every frame; returns their number."""
    # A folder in the layout of TUM holds no intrinsics.
    opened = open_views(place, (24, 32), intrinsics=CALIBRATION.tolist() if (place / "rgb.txt").exists() else None)
    frames = 0
    for scene in range(len(opened)):
        cameras = opened.cameras(scene)
        count = len(cameras.extrinsics)
        opened.select(scene, list(range(count)))
        frames += count
    return frames


@pytest.mark.parametrize("replace", [pipe, listening, device, folder, link])
@pytest.mark.parametrize("form", WRITERS)
def test_what_is_no_file_is_neither_read_nor_waited_for(
    form: str, replace: Callable[..., None], tmp_path: Path
) -> None:
    whole = WRITERS[form](tmp_path / "whole", room_views(3))
    with warnings.catch_warnings(action="ignore"):
        frames = read_all(whole)
    kinds = {path.suffix: path for path in sorted(whole.rglob("*")) if path.is_file()}
    for path in kinds.values():
        outside = tmp_path / f"outside{path.suffix}"
        path.rename(outside)
        try:
            replace(path, outside)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    found = read_all(whole)
                except DataError as error:
                    said = str(error)
                else:
                    said = " ".join(str(one.message) for one in caught)
                    assert found < frames, f"{path.relative_to(whole)} was read, or is not needed"
            assert said, f"{path.relative_to(whole)} was left out without a word"
        finally:
            (shutil.rmtree if path.is_dir() and not path.is_symlink() else Path.unlink)(path)
            outside.rename(path)


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    for form, write in WRITERS.items():
        stored = write(tmp_path / form.replace(" ", "_") / "whole", room_views(3))
        shown = tmp_path / f"linked {form}"
        shown.symlink_to(stored, target_is_directory=True)
        with warnings.catch_warnings(action="ignore"):
            assert read_all(shown) == read_all(stored) > 0


def other_places(place: Path) -> dict[str, Callable[[], Any]]:
    """What else opens a file whose name is given."""
    return {
        "image": lambda: read_image(place),
        "settings": lambda: read_yaml(place),
        "mesh": lambda: load_mesh(place, np.random.default_rng(0)),
    }


@pytest.mark.parametrize("replace", [pipe, listening, device, folder])
@pytest.mark.parametrize("what", ["image", "settings", "mesh"])
def test_named_files_that_are_no_files(what: str, replace: Callable[..., None], tmp_path: Path) -> None:
    place = tmp_path / "chair.obj"
    replace(place, tmp_path)
    with pytest.raises(DataError, match=r"chair.obj"):
        other_places(place)[what]()


@pytest.mark.parametrize("replace", [pipe, listening, device, folder])
@pytest.mark.parametrize("name", ["matches-000-00000.safetensors", "matches.json"])
def test_folders_of_matches(name: str, replace: Callable[..., None], tmp_path: Path) -> None:
    from cameo.data.matches import MatchWriter
    from cameo.data.shards import finish_share

    with MatchWriter(tmp_path, {}) as writer:
        writer.add(0, 0, 1, ((1, 2), (1, 2)), np.array([0, -1]))
    finish_share(tmp_path, {}, "plan")
    (tmp_path / name).unlink()
    replace(tmp_path / name, tmp_path)
    with pytest.raises(DataError, match=r"matches"):
        MatchReader(tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link.png", "pipe.png"])
def test_a_mesh_reads_no_texture_from_elsewhere(name: str, tmp_path: Path) -> None:
    inner = tmp_path / "mesh"
    inner.mkdir()
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "secret.png")
    (inner / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(inner / "pipe.png")
    (inner / "a.mtl").write_text(f"newmtl paint\nKd 1 0 0\nmap_Kd {name}\n")
    corners = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nvt 0 0\nvt 1 0\nvt 0 1\n"
    faces = "".join(f"f {a}/1 {b}/2 {c}/3\n" for a, b, c in ((1, 2, 3), (1, 2, 4), (1, 3, 4), (2, 3, 4)))
    (inner / "a.obj").write_text(f"mtllib a.mtl\n{corners}usemtl paint\n{faces}")
    opened: list[str] = []
    before = Image.open
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(action="ignore"),
        contextlib.suppress(DataError),
    ):
        patch.setattr(Image, "open", lambda *given, **options: opened.append(str(given)) or before(*given, **options))
        load_mesh(inner / "a.obj", np.random.default_rng(0))
    assert not opened, "the texture was read"


def test_members_of_a_tar_that_are_no_files(tmp_path: Path) -> None:
    place = WRITERS["webdataset"](tmp_path / "rooms", room_views(3))
    (path,) = place.glob("*.tar")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
        content = path.read_bytes()
        with tarfile.open(path, "a") as archive:
            member = tarfile.TarInfo("room.000.webp")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        with pytest.raises(DataError, match=r"room.000.webp is a link|store the file itself"):
            read_all(place)
        path.write_bytes(content)
    with tarfile.open(path, "a") as archive:  # nothing is unpacked, so a name that leaves the folder is a name
        member = tarfile.TarInfo("../../escaped.png")
        archive.addfile(member, io.BytesIO())
    assert read_all(place)
    assert not list(tmp_path.parent.rglob("escaped.png"))


def bomb_png(path: Path) -> None:
    """A PNG of a few kilobytes that decodes to 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    size = (40000).to_bytes(4, "big") * 2
    pixels = zlib.compress(bytes(1000))
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x00\x00\x00\x00")
    path.write_bytes(head + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def array_header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_bombs_are_named(tmp_path: Path) -> None:
    png = tmp_path / "bomb.png"
    bomb_png(png)
    with pytest.raises(DataError, match=r"bomb.png: cannot decode .*pixels"):
        read_image(png)
    place = WRITERS["zero123"](tmp_path / "cup", room_views(3))
    bomb_png(place / "000.png")
    with pytest.raises(DataError, match=r"000.png: .*pixels"):
        read_all(place)
    place = WRITERS["zero123"](tmp_path / "bowl", room_views(3))
    (place / "000.npy").write_bytes(array_header((1 << 20, 1 << 20)))
    with pytest.raises(DataError, match=r"000.npy: .*an array of 1,099,511,627,776 numbers"):
        read_all(place)
    place = WRITERS["co3d"](tmp_path / "co3d", room_views(3))
    (packed,) = place.rglob("*.jgz")
    packed.write_bytes(gzip.compress(b" " * (64 << 20)))
    with pytest.raises(DataError, match=r"jgz: .*unpacks to more than 200 times its size"):
        read_all(place)


@pytest.mark.parametrize("form", [np.array([{"a": 1}], dtype=object), "zip"])
def test_arrays_of_objects_are_not_unpickled(form: Any, tmp_path: Path) -> None:
    from cameo.data.readers.files import StoredFile, load_arrays

    path = tmp_path / "depth.npz"
    array = np.array([{"a": 1}], dtype=object)
    if isinstance(form, str):
        np.savez(path, depth=array)
    else:
        np.save(path.open("wb"), form, allow_pickle=True)
    with pytest.raises(DataError, match=r"depth.npz: .*Python objects"):
        load_arrays(StoredFile(path))


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    from cameo.data.readers.files import StoredFile, load_arrays

    first, second = np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(3, 2))
    np.savez_compressed(tmp_path / "both.npz", first=first, second=second)
    found = load_arrays(StoredFile(tmp_path / "both.npz"))
    assert isinstance(found, dict)
    assert np.array_equal(found["first"], first)
    assert np.array_equal(found["second"], second)
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("depth.npy", array_header((4, 4)) + bytes(8))
    with pytest.raises(DataError, match=r"cut.npz: .*cut short: 8 of 64 bytes"):
        load_arrays(StoredFile(tmp_path / "cut.npz"))
