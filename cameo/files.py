"""Files that are written completely or not at all, and that survive a power failure once they are written."""

from __future__ import annotations

import os
import threading
from pathlib import Path

__all__ = ["flush", "move_into_place", "write_atomically"]


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
