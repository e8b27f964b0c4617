"""Folders of safetensors shards that several processes fill: the shards, their index, and who has finished."""

from __future__ import annotations

import json
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cameo.errors import DataError
from cameo.files import open_plain, parse_object, write_atomically

__all__ = [
    "INDEX_NAME",
    "MATCHES",
    "Shard",
    "ShardKind",
    "check_settings",
    "check_writable",
    "finish_share",
    "is_finished",
    "missing_shards",
    "shard_files",
]

# To be raised whenever the same settings give other matches or other files.
FORMAT_VERSION = 2
INDEX_NAME = "matches.json"
RECIPE = "cameo precompute"
TYPES = {"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "F16": np.float16, "F32": np.float32}
# numpy has no bfloat16; its bits come as integers.
TYPES["BF16"] = np.int16


@dataclass(frozen=True)
class ShardKind:
    """What shards hold, for their version and for the messages about them.

    Attributes:
        content: name of what they hold.
        version: of their format.
        repair: what to do with a shard that is damaged.
        renew: what to do with one of another version.
        before_checksums: version of the last files without checksums, which are read without them; later files that
            have none are refused.
    """

    content: str
    version: int
    repair: str
    renew: str
    before_checksums: int


MATCHES = ShardKind(
    "matches",
    FORMAT_VERSION,
    repair=f"remove the file and run {RECIPE} again, which computes what is missing",
    renew=f"run {RECIPE} into another folder",
    before_checksums=1,
)


@dataclass(frozen=True)
class _Rows:
    """Position of the rows of a tensor in its file."""

    offset: int
    shape: tuple[int, ...]
    kind: np.dtype

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:])) * self.kind.itemsize


@dataclass(frozen=True)
class Shard:
    """A safetensors file whose rows are read on demand.

    It is not memory-mapped, since a mapped file that is truncated crashes the process; and it is not kept open, since a
    data worker would share the open file with its parent.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "matches-000-00000.safetensors"
        >>> Shard.write(path, {"index": np.arange(6).reshape(3, 2)}, {"resolution": 64})
        >>> shard = Shard.open(path)
        >>> shard.settings, list(shard.rows([("index", 2), ("index", 0)]))
        ({'resolution': 64}, [array([4, 5]), array([0, 1])])
    """

    path: Path
    settings: dict[str, Any]
    tensors: dict[str, _Rows]
    kind: ShardKind = MATCHES
    checksums: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def write(
        path: Path,
        tensors: Mapping[str, np.ndarray | Tensor],
        settings: Mapping[str, Any],
        kind: ShardKind = MATCHES,
    ) -> None:
        """Write a shard, whole or not at all.

        Raises:
            DataError: if it cannot be written.
        """
        from safetensors.torch import save

        metadata = {"version": str(kind.version), "settings": json.dumps(dict(settings), sort_keys=True)}
        try:
            content = {name: torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}
            write_atomically(path, _with_checksums(save(content, metadata=metadata)))
        except OSError as error:
            raise _unwritable(path, error, kind) from error

    @classmethod
    def open(cls, path: Path, kind: ShardKind = MATCHES) -> Shard:
        """Read the header of a shard.

        Raises:
            DataError: if the file is damaged or of another version.
        """
        try:
            with open_plain(path) as file:
                length = int.from_bytes(file.read(8), "little")
                size = path.stat().st_size
                if not 0 < length <= size - 8:
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                header = parse_object(file.read(length))
            checksums = _checksums_in(header)
            metadata = header.pop("__metadata__")
            tensors, end = {}, 0
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                rows = _Rows(8 + length + start, tuple(entry["shape"]), np.dtype(TYPES[entry["dtype"]]))
                if stop - start != int(np.prod(rows.shape)) * rows.kind.itemsize:
                    raise ValueError(f"{name} of {stop - start} bytes for the shape {list(rows.shape)}")
                tensors[name], end = rows, max(end, stop)
            if 8 + length + end != size:
                raise ValueError(f"expected {8 + length + end} bytes, got {size}")
            version, settings = metadata["version"], json.loads(metadata["settings"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path, error, kind) from error
        _check_version(path, version, kind)
        if not checksums:
            if str(version) != str(kind.before_checksums):
                raise damaged(path, "has no checksums", kind)
            warnings.warn(
                f"{path.parent}: holds files of an earlier release, without checksums, so damage in them is not seen; "
                f"{kind.renew}",
                stacklevel=2,
            )
        return cls(path, settings, tensors, kind, checksums)

    def rows(self, wanted: Iterable[tuple[str, int]]) -> list[np.ndarray]:
        """Read rows, each given by the name of its tensor and its number.

        Raises:
            DataError: if the file is missing, or ends before one of the rows.
        """
        try:
            with open_plain(self.path) as file:
                contents = []
                for name, row in wanted:
                    table = self.tensors[name]
                    file.seek(table.offset + row * table.row_bytes)
                    content = file.read(table.row_bytes)
                    if len(content) != table.row_bytes:
                        raise ValueError(f"ends within row {row} of {name}")
                    contents.append(np.frombuffer(content, table.kind).reshape(table.shape[1:]))
                return contents
        except (OSError, ValueError) as error:
            raise damaged(self.path, error, self.kind) from error

    def whole(self, name: str) -> np.ndarray:
        """Read all rows of a tensor.

        Raises:
            DataError: if the file is missing or cut short, or the tensor has another checksum than its header says.
        """
        table = self.tensors[name]
        try:
            count = int(np.prod(table.shape))
            with open_plain(self.path) as file:
                file.seek(table.offset)
                content = file.read(count * table.kind.itemsize)
            values = np.frombuffer(content, table.kind, count).reshape(table.shape)
            if zlib.crc32(content) != self.checksums.get(name, zlib.crc32(content)):
                raise ValueError(f"the checksum of {name} differs")
            return values
        except (OSError, ValueError) as error:
            raise damaged(self.path, error, self.kind) from error


def _with_checksums(content: bytes) -> bytes:
    """Add the checksum of each tensor, and one of the header itself, to the header of safetensors."""
    length = int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8 : 8 + length]), content[8 + length :]
    sums = {
        name: zlib.crc32(tensors[slice(*entry["data_offsets"])]) for name, entry in header.items() if "shape" in entry
    }
    header["__metadata__"]["checksums"] = json.dumps(sums, sort_keys=True)
    header["__metadata__"]["header"] = str(_header_checksum(header))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + tensors


def _header_checksum(header: Mapping[str, Any]) -> int:
    """Return the checksum of a header without itself, the order of its keys and its blanks."""
    metadata = {name: value for name, value in header["__metadata__"].items() if name != "header"}
    return zlib.crc32(json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode())


def _checksums_in(header: Mapping[str, Any]) -> dict[str, int]:
    """Return the checksums of the tensors by name, none of a file of an earlier version.

    Raises:
        ValueError: if the checksum of the header itself differs.
    """
    metadata = header["__metadata__"]
    if "header" not in metadata:
        return {}
    if metadata["header"] != str(_header_checksum(header)):
        raise ValueError("the checksum of its header differs")
    return {str(name): int(value) for name, value in json.loads(metadata.get("checksums", "{}")).items()}


def check_writable(folder: Path, kind: ShardKind = MATCHES) -> None:
    """Create a folder if there is none, and open a file in it, so that a wrong folder is refused at once.

    Raises:
        DataError: if that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error, kind) from error


def _unwritable(path: Path, reason: OSError, kind: ShardKind) -> DataError:
    return DataError(
        f"{path}: cannot write the {kind.content} ({reason}); choose a folder with room and write access. Finished "
        "shards are kept, and a second run goes on from them"
    )


def damaged(path: Path, reason: object, kind: ShardKind = MATCHES) -> DataError:
    """Build the error for a shard that cannot be used."""
    return DataError(f"{path}: damaged ({reason}); {kind.repair}")


def shard_files(folder: str | Path) -> list[Path]:
    """Return the shards of a folder, or none if there is no such folder."""
    return sorted(Path(folder).glob("matches-*.safetensors"))


def check_settings(folder: str | Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare the settings of a folder with those of a run.

    Raises:
        DataError: that names the first setting that differs, its values and the cure.
    """
    wanted = json.loads(json.dumps(dict(expected)))  # as they come back from a file: without tuples
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise DataError(
                f"precomputed_correspondence={folder}: was made with other settings: expected {name}="
                f"{wanted.get(name)}, got {name}={found.get(name)}. Restore the setting, or run {RECIPE} with the new "
                "one into another folder"
            )


def missing_shards(folder: str | Path) -> list[str]:
    """Return the shards in the index of a folder that are missing or have another size."""
    path = Path(folder) / INDEX_NAME
    if not path.exists():
        return []
    sizes = {path.name: path.stat().st_size for path in shard_files(folder)}
    return [name for name, size in _read_index(path)["shards"].items() if sizes.get(name) != size]


def is_finished(folder: str | Path, plan: str) -> bool:
    """Return whether all processes have written their share of a plan, and no shard is missing."""
    path = Path(folder) / INDEX_NAME
    return path.exists() and plan in _read_index(path)["finished"] and not missing_shards(folder)


def finish_share(
    folder: str | Path, settings: Mapping[str, Any], plan: str, *, process: int = 0, num_processes: int = 1
) -> list[int]:
    """Record that a process has written its share of a plan; the last one writes the index.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> finish_share(folder, {}, "plan", process=1, num_processes=2), is_finished(folder, "plan")
        ([0], False)
        >>> finish_share(folder, {}, "plan", process=0, num_processes=2), is_finished(folder, "plan")
        ([], True)

    Returns:
        Numbers of the processes that have not finished yet.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    markers = [folder / f".finished-{plan}-{number:03d}-of-{num_processes:03d}" for number in range(num_processes)]
    write_atomically(markers[process], "")
    waiting = [number for number, marker in enumerate(markers) if not marker.exists()]
    if waiting and not is_finished(folder, plan):  # finished: another process has just removed the markers
        return waiting
    if not waiting:
        # If shards are missing, plans that were finished before are no longer complete.
        finished = _read_index(path)["finished"] if path.exists() and not missing_shards(folder) else []
        index = {
            "version": FORMAT_VERSION,
            "settings": dict(settings),
            "finished": sorted({*finished, plan}),
            "shards": {shard.name: shard.stat().st_size for shard in shard_files(folder)},
        }
        index["checksum"] = _index_checksum(index)
        write_atomically(path, json.dumps(index, indent=1) + "\n")
    for marker in markers:
        marker.unlink(missing_ok=True)
    return []


def _read_index(path: Path) -> dict[str, Any]:
    try:
        with open_plain(path) as file:
            content = parse_object(file.read())
        version, index = content["version"], {name: content[name] for name in ("settings", "finished", "shards")}
        is_checked = str(version) != str(MATCHES.before_checksums)
        if is_checked and content["checksum"] != _index_checksum(content):
            raise ValueError("its checksum differs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); remove the file and run {RECIPE} again") from error
    _check_version(path, version, MATCHES)
    return index


def _index_checksum(index: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps({name: index[name] for name in index if name != "checksum"}, sort_keys=True).encode())


def _check_version(path: Path, version: object, kind: ShardKind) -> None:
    if str(version) not in (str(kind.version), str(kind.before_checksums)):
        raise DataError(f"{path}: expected version {kind.version} of the format, got {version}; {kind.renew}")
