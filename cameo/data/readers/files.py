"""Files of a data set: text and JSON as people write them, and paths that stay inside of their folder."""

from __future__ import annotations

import importlib
import io
import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, BinaryIO

import numpy as np

from cameo.errors import DataError
from cameo.files import open_plain

__all__ = [
    "StoredFile",
    "inside",
    "load_arrays",
    "number",
    "optional_package",
    "read_json",
    "read_numbers",
    "read_text",
    "subfolders",
]

Array = np.ndarray
# As many as a picture of 16,384 x 16,384 pixels has.
MOST_NUMBERS = 1 << 28
BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


@dataclass(frozen=True)
class StoredFile:
    """A file on disk, or a member of a tar, which is a part of a file.

    - `path`: the file on disk; `member`: name within it, empty for a file of its own.
    - `offset`, `length`: where the member lies, in bytes; not used without `member`.

    Example:
        >>> print(StoredFile(Path("rooms.tar"), "kitchen.000.png", 512, 80))
        rooms.tar: kitchen.000.png
    """

    path: Path
    member: str = ""
    offset: int = 0
    length: int = 0

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else str(self.path)

    @property
    def suffix(self) -> str:
        """Its ending in lower case, such as ".png"."""
        return PurePosixPath(self.member or self.path.name).suffix.lower()

    def open(self) -> BinaryIO:
        """Open it for reading; `OSError` where that fails."""
        if not self.member:
            return open_plain(self.path)
        with open_plain(self.path) as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.length))

    def read(self) -> bytes:
        """Return its content; `DataError` where it cannot be read."""
        try:
            with self.open() as file:
                return file.read()
        except OSError as error:
            raise DataError(f"{self}: cannot be read ({error})") from error


def optional_package(name: str, *, needed_for: str) -> Any:
    """Import a package that not everybody needs.

    Example:
        >>> optional_package("no_such_package", needed_for="a.xyz")
        Traceback (most recent call last):
        ...
        cameo.errors.DataError: a.xyz: needs the package no_such_package; pip install "cameo-diffusion[readers]"
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f'{needed_for}: needs the package {name}; pip install "cameo-diffusion[readers]"') from error


def inside(folder: Path, name: object, *, stated_in: object) -> Path:
    """Return the path of a file that a data set names; it must stay in the folder, also if links are followed.

    Example:
        >>> inside(Path("scene"), "../../secret.png", stated_in="transforms.json")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        cameo.errors.DataError: transforms.json: names '../../secret.png', which leaves the folder scene; put ...
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DataError(f"{stated_in}: expected the name of a file, got {name!r}; write its path relative to {folder}")
    plain = PurePosixPath(name.replace("\\", "/"))
    path = folder / plain
    leaves = plain.is_absolute() or PureWindowsPath(name).drive or ".." in plain.parts
    if leaves or not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"{stated_in}: names {name!r}, which leaves the folder {folder}; put the file into the folder and write "
            "its path relative to it, or copy what a link points to"
        )
    return path


def load_arrays(file: StoredFile) -> Array | dict[str, Array]:
    """Read a `.npy` or `.npz` file without running what is pickled in it; an `.npz` as arrays by name.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "depth.npy"
        >>> np.save(path, np.ones((2, 3)))
        >>> load_arrays(StoredFile(path)).shape
        (2, 3)

    Raises:
        DataError: where it cannot be read, holds Python objects, or an array of more than 2 ** 28 numbers, which a
            compressed file of a few kilobytes can hold.
    """
    try:
        with file.open() as stream:
            if not zipfile.is_zipfile(stream):
                stream.seek(0)
                return _load_array(stream)
            with zipfile.ZipFile(stream) as archive:
                arrays = {}
                for name in archive.namelist():
                    with archive.open(name) as member:
                        arrays[name.removesuffix(".npy")] = _load_array(member)
                return arrays
    except Exception as error:  # zipfile and numpy raise whatever they trip over
        raise DataError(
            f"{file}: cannot be read as a NumPy file ({error}); write it with numpy.save, without objects"
        ) from error


def _load_array(stream: IO[bytes]) -> Array:
    """Read an array whose header asks for a sensible amount of memory."""
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, in_columns, kind = header(stream)
    count = math.prod(shape)
    if kind.hasobject:
        raise ValueError("it holds Python objects, which could run code")
    if count > MOST_NUMBERS:
        raise ValueError(f"it holds an array of {count:,} numbers; expected at most {MOST_NUMBERS:,}")
    content = stream.read(count * kind.itemsize)
    if len(content) != count * kind.itemsize:
        raise ValueError(f"it is cut short: {len(content)} of {count * kind.itemsize} bytes")
    return np.frombuffer(content, kind).reshape(shape, order="F" if in_columns else "C").copy()


def read_text(path: Path | StoredFile) -> str:
    """Read text in UTF-8, or in UTF-16 with a byte order mark, which is removed.

    Raises `DataError` that names the file where it is absent or in another encoding.
    """
    content = (path if isinstance(path, StoredFile) else StoredFile(path)).read()
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected a text file in UTF-8 ({error}); save it as UTF-8") from error


def read_numbers(path: Path) -> Array:
    """Read a table of numbers that are separated by blanks, commas or semicolons; `#` starts a comment.

    Raises `DataError` that names the file and line where a word is no number or the lines differ in length.
    """
    rows: list[list[float]] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split("#")[0].replace(",", " ").replace(";", " ").split()
        if not words:
            continue
        try:
            rows.append([float(word) for word in words])
        except ValueError as error:
            raise DataError(f"{path}, line {number}: expected numbers ({error})") from error
        if len(rows[-1]) != len(rows[0]):
            raise DataError(f"{path}, line {number}: expected {len(rows[0])} numbers as before, got {len(rows[-1])}")
    return np.array(rows, dtype=float).reshape(len(rows), -1) if rows else np.zeros((0, 0))


def read_json(path: Path | StoredFile) -> Any:
    """Read JSON; `DataError` that names the file, and the line where it breaks off."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected JSON ({error}); the file may be cut short") from error


def number(value: object, *, named: str, stated_in: object) -> float:
    """Return a finite number that a file states; a text, a list, NaN and infinity are refused."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{stated_in}: {named}: expected a finite number, got {value!r}")
    return float(value)


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder in name order, without hidden ones and links that leave it."""
    root = folder.resolve()
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX"))]
    return sorted(path for path in found if not path.is_symlink() or path.resolve().is_relative_to(root))
