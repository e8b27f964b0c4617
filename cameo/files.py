"""Files that are written completely or not at all, and that survive a power failure; and how others' files are read."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from filelock import BaseFileLock, FileLock, Timeout

__all__ = [
    "flush",
    "move_into_place",
    "only_writer",
    "open_plain",
    "parse_object",
    "release_lock",
    "write_atomically",
]

# What a path may be that is no plain file, by the test that finds it.
KINDS = {
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISDIR: "a folder",
}


def open_plain(path: str | Path) -> BinaryIO:
    """Open a file for reading, without waiting for one that is no plain file, such as a named pipe.

    Example:
        >>> import tempfile
        >>> open_plain(tempfile.gettempdir())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        OSError: ...: is a folder; expected a plain file

    Raises:
        OSError: if there is no such file, or it is a folder, a named pipe, a socket or a device.
    """
    _check_plain(path, Path(path).stat().st_mode)  # a socket, and on Windows a folder, cannot even be opened
    # A pipe that is exchanged for the file in the meantime does not block either.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115 - pathlib has no opener
    try:
        _check_plain(path, os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def _check_plain(path: str | Path, mode: int) -> None:
    for is_kind, name in KINDS.items():
        if is_kind(mode):
            raise OSError(f"{path}: is {name}; expected a plain file")


def parse_object(content: bytes) -> dict[str, Any]:
    """Read a JSON object as every reader would: no key is given twice, and every number is finite.

    Example:
        >>> parse_object(b'{"r": 4}')
        {'r': 4}
        >>> parse_object(b'{"r": 4, "r": 8}')
        Traceback (most recent call last):
        ...
        ValueError: the key 'r' is given twice

    Raises:
        ValueError: if it is not UTF-8, not JSON, not an object, holds NaN or an infinite number, or is nested deeper
            than Python reads.
    """
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_not_finite, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"is not text in UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")  # noqa: TRY004 - of a file's content
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {name!r} is given twice")
        values[name] = value
    return values


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"holds {text}; expected finite numbers")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        _not_finite(text)
    return number


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file of which a reader sees the old content or the new content, and never a part of either.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "new folder" / "table.md"
        >>> write_atomically(path, "| a |")
        >>> path.read_text(), [file.name for file in path.parent.iterdir()]
        ('| a |', ['table.md'])

    The content goes to a temporary file `.NAME.*.tmp` in the same folder, which is renamed once it is on the disk.

    Args:
        path: the file; missing folders are created.
        content: bytes, or text that is encoded as UTF-8.

    Raises:
        OSError: if the file cannot be written. The old content is still there then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        move_into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def move_into_place(finished: Path, path: Path) -> None:
    """Rename a finished file or folder to its final name, after its content is on the disk.

    A file that has the name already is replaced. A rename alone may reach the disk before the content does, so that
    a power failure leaves an empty file under the new name.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "part").mkdir()
        >>> _ = (folder / "part" / "state.json").write_text("{}")
        >>> move_into_place(folder / "part", folder / "checkpoint-1")
        >>> [str(file.relative_to(folder)) for file in sorted(folder.rglob("*"))]
        ['checkpoint-1', 'checkpoint-1/state.json']

    Args:
        finished: what was written, on the same file system as `path`.
        path: its final name; the folder around it exists.

    Raises:
        OSError: if the content cannot be written to the disk, or `path` is a folder that is not empty.
    """
    for entry in (*finished.rglob("*"), finished):
        flush(entry)
    finished.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk.

    Example:
        >>> import tempfile
        >>> flush(Path(tempfile.mkdtemp()))

    Raises:
        OSError: if they cannot be written to the disk.
    """
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    # Windows flushes only files that are open for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def only_writer(path: str | Path, *, wait: bool) -> Iterator[bool]:
    """Let one of several processes write a file, on one machine or on all that share the drive.

    Yields whether this process may write it during the `with` block. The others wait or are told no; once it is theirs
    they should look whether the file is there by now. A process that is killed leaves no lock. On a drive that has no
    locks, or cannot be written to, nobody is kept from it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "scene"
        >>> with only_writer(path, wait=False) as first, only_writer(path, wait=False) as second:
        ...     first, second
        (True, False)

    Args:
        path: the file; missing folders are created.
        wait: whether to wait until it is this process's turn.
    """
    lock = FileLock(Path(path).with_name(f".{Path(path).name}.lock"))
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError):
        yield True
        return
    try:
        yield True
    finally:
        release_lock(lock)


def release_lock(lock: BaseFileLock) -> None:
    """Remove the file of a lock that this process holds, and release it."""
    try:
        if os.name != "nt":  # Windows removes no open file, and filelock removes it there itself
            # While it is still locked: another process that has opened it sees that it is gone, and takes a new one.
            Path(lock.lock_file).unlink(missing_ok=True)
    finally:  # also on a drive that can no longer be written to
        lock.release()
