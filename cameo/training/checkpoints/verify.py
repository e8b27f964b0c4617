"""The state file of a checkpoint: it is written last, and holds the size and the checksum of every other file.

CRC32 finds what disks, copies and power failures damage. It is no protection against somebody who changes a file on
purpose; that nothing in a checkpoint can run code comes from its formats.
"""

from __future__ import annotations

import json
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cameo.errors import DataError
from cameo.training.checkpoints import earlier

__all__ = ["STATE_NAME", "check_checkpoint", "damage_of", "read_state", "write_state"]

STATE_NAME = "trainer_state.json"
PORTION = 1 << 22  # bytes that are read at a time

# Sizes and times of the files of checkpoints that this process has read whole and found undamaged.
_checked: dict[Path, tuple[tuple[Any, ...], ...]] = {}


def write_state(folder: str | Path, state: Mapping[str, Any]) -> None:
    """Write the state file of a checkpoint whose other files are all in its folder.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "weights.safetensors").write_bytes(b"1234")
        >>> write_state(folder, {"step": 2, "settings": {}})
        >>> check_checkpoint(folder)["files"]
        {'weights.safetensors': {'bytes': 4, 'crc32': '9be3e0a3'}}
        >>> _ = (folder / "weights.safetensors").write_bytes(b"1235")
        >>> damage_of(folder)
        'weights.safetensors: its checksum is not the one in trainer_state.json'

    Raises:
        OSError: if a file cannot be read or written.
    """
    folder = Path(folder)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": _checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / STATE_NAME
    }
    content: dict[str, Any] = json.loads(json.dumps({**state, "files": files}))
    content["crc32"] = _checksum_of_state(content)
    (folder / STATE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_state(folder: str | Path) -> dict[str, Any]:
    """Read the state file of a checkpoint, of this or an earlier release.

    Raises:
        DataError: if it is missing or damaged; names the file.
    """
    path = Path(folder) / STATE_NAME
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: {'is missing' if not path.exists() else f'cannot be read ({error})'}") from error
    if not isinstance(state, dict) or type(state.get("step")) is not int or not isinstance(state.get("settings"), dict):
        raise DataError(f"{path}: expected step and settings, as the state of a training has them")
    if "crc32" in state and state["crc32"] != _checksum_of_state(state):
        raise DataError(f"{path}: its checksum is not the one that it was written with")
    return state


def damage_of(folder: str | Path) -> str | None:
    """Say which file of a checkpoint is damaged or missing, and how; None if it can be resumed from."""
    try:
        check_checkpoint(folder)
    except DataError as error:
        return str(error).removeprefix(str(Path(folder))).lstrip("/\\")
    return None


def check_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Read a checkpoint whole, compare it with its state file, and return its state.

    A process reads a checkpoint only once, as long as no file gets another size or time. A checkpoint of an earlier
    release has no checksums; its files are opened instead.

    Raises:
        DataError: names the first file that is damaged, missing, or no plain file of this folder.
    """
    folder = Path(folder)
    state = read_state(folder)
    if "files" not in state and "crc32" not in state:
        earlier.check_readable(folder)
        return state
    files = state.get("files")
    if "crc32" not in state or not isinstance(files, dict) or not all(isinstance(one, dict) for one in files.values()):
        raise DataError(f"{folder / STATE_NAME}: has no checksums, or not its own")
    looks = tuple(_look(folder, name) for name in (STATE_NAME, *files))
    if _checked.get(folder.absolute()) == looks:
        return state
    for name, known in files.items():
        path = folder / name
        if path.stat().st_size != known.get("bytes"):
            raise DataError(f"{path}: has {path.stat().st_size} bytes, of {known.get('bytes')} that were written")
        try:
            found = _checksum(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        if found != known.get("crc32"):
            raise DataError(f"{path}: its checksum is not the one in {STATE_NAME}")
    _checked[folder.absolute()] = looks
    return state


def _look(folder: Path, name: str) -> tuple[Any, ...]:
    """What tells a file from an earlier one of its name; refuses what is no plain file within the folder."""
    path, parts = folder / name, PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
        raise DataError(f"{folder / STATE_NAME}: names {name!r}, which is outside the checkpoint")
    try:
        found = path.lstat()
    except OSError as error:
        raise DataError(f"{path}: is missing ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: is no plain file")
    return name, found.st_ino, found.st_size, found.st_mtime_ns


def _checksum(path: Path) -> str:
    value = 0
    with path.open("rb") as file:
        while portion := file.read(PORTION):
            value = zlib.crc32(portion, value)
    return f"{value:08x}"


def _checksum_of_state(state: Mapping[str, Any]) -> str:
    """CRC32 of all that a state file holds besides it, however it is laid out."""
    content = json.dumps({key: value for key, value in state.items() if key != "crc32"}, sort_keys=True)
    return f"{zlib.crc32(content.encode()):08x}"
