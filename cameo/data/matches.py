"""Matches on disk: written pair by pair into shards of bounded size, read sample by sample.

Axes: V views of a sample, N tokens of a view (row-major). A record is an ordered pair of views of a scene at their
token grids: for each token of the first view the token of the second that shows the same surface point, or -1. A
shard holds, for each pair of grids such as `32x32-20x20`,

- `pairs/32x32-20x20`: int32 `[P, 3]`, the scene and the two views;
- `index/32x32-20x20`: `[P, N]` in the smallest signed integer type that holds the second grid;
- `distance/32x32-20x20`: float32 `[P, N]`, only where it is asked for. Half precision would not do: the distances
  decide which view is nearest, and rounded ones tie;
- `weight/32x32-20x20`: float16 `[P, N]`, the match weights of tracks and matchers, which it holds exactly;
- `sum/32x32-20x20`: int32 `[P]`, the checksum of each record;

and `views`: int64 `[Q, 3]`, scene, view and the checksum of what its matches were computed from. The header holds a
checksum of itself and of each tensor; those that are read whole, `pairs` and `views`, are compared with it on opening,
and each record with its own when it is read.
"""

from __future__ import annotations

import time
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cameo.correspondence import Correspondence
from cameo.data.shards import RECIPE, Shard, check_settings, check_writable, damaged, missing_shards, shard_files
from cameo.errors import DataError
from cameo.geometry.grids import TokenGrids
from cameo.renamed import old_functions

__all__ = ["GridPair", "MatchReader", "MatchWriter", "TokenGrids", "view_checksum"]

if not TYPE_CHECKING:  # a type checker is to see the new names alone
    __getattr__ = old_functions(__name__)

# Bits of a key that hold a view; the scene has the rest of 63 bits.
VIEW_BITS = 20
SCENE_BITS = 63 - 2 * VIEW_BITS
# A shard that is not full is written after this many seconds, which bounds the work that is lost if the process is
# killed.
SHARD_SECONDS = 600

# The parts of a record, in the order of its checksum.
PARTS = ("index", "distance", "weight")

GridPair = tuple[tuple[int, int], tuple[int, int]]


def view_checksum(sample: Mapping[str, Any], view: int, kind: str = "depth") -> int:
    """Return a checksum of what decides a view's matches of a kind.

    It is the depth and the cameras, and a point map where there is one, for "depth" and "point_map"; the image and the
    cameras for "matcher"; and the sightings in the view for "tracks".

    Example:
        >>> sample = {"depth": torch.ones(2, 1, 4, 4), "intrinsics": torch.eye(3).repeat(2, 1, 1),
        ...           "extrinsics": torch.eye(4).repeat(2, 1, 1)}
        >>> view_checksum(sample, 0) == view_checksum(sample, 1)
        True
    """
    if kind == "tracks":
        tracks = sample.get("tracks")
        seen = None if tracks is None else tracks.view == view
        parts = [] if tracks is None else [tracks.point[seen], tracks.xy[seen].float()]
    else:
        names = ("images",) if kind == "matcher" else ("depth", "point_map")
        parts = [sample[name][view].float() for name in (*names, "intrinsics", "extrinsics") if name in sample]
    value = 0
    for part in parts:
        value = zlib.crc32(part.contiguous().numpy(), value)
    return value


def record_checksum(parts: Sequence[np.ndarray]) -> int:
    """Return the checksum of the matches, distances and weights of a pair of views, as they are stored.

    Example:
        >>> record_checksum([np.array([0, 2], dtype=np.int8)]) == record_checksum([np.array([1, 2], dtype=np.int8)])
        False
    """
    value = 0
    for part in parts:
        value = zlib.crc32(np.ascontiguousarray(part).data, value)
    return value


class MatchWriter:
    """Collects records and writes a shard whenever there are enough of them.

    Example:
        >>> import tempfile
        >>> folder, grids = tempfile.mkdtemp(), ((1, 2), (1, 2))
        >>> with MatchWriter(folder, {"correspondence": "depth"}) as writer:
        ...     writer.add(0, 3, 5, grids, np.array([-1, 0]))
        ...     writer.add(0, 5, 3, grids, np.array([1, -1]))
        >>> MatchReader(folder).read(0, [3, 5], grids).index[0, 0, 1]
        tensor([-1,  0])

    Existing shards are kept. Several processes may write to one folder, each with a `process` number of its own.
    `shard_bytes` bounds the size of a shard and the memory; records that wait for ten minutes are written too.

    Raises:
        DataError: if the folder cannot be created or takes no file.
    """

    def __init__(
        self, folder: str | Path, settings: Mapping[str, Any], *, process: int = 0, shard_bytes: int = 128 << 20
    ) -> None:
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes: expected at least 1, got {shard_bytes}")
        self.folder, self.settings = Path(folder), dict(settings)
        self.prefix, self.shard_bytes = f"matches-{process:03d}", shard_bytes
        check_writable(self.folder)
        for leftover in self.folder.glob(f".{self.prefix}-*.tmp"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        numbers = [int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"{self.prefix}-*.safetensors")]
        self._number = max(numbers, default=-1) + 1
        self.num_pairs = self.num_bytes = 0
        self._views: dict[tuple[int, int], int] = {}
        self._clear()

    def _clear(self) -> None:
        self._pairs: dict[GridPair, list[tuple[int, int, int]]] = defaultdict(list)
        self._index: dict[GridPair, list[np.ndarray]] = defaultdict(list)
        self._distance: dict[GridPair, list[np.ndarray]] = defaultdict(list)
        self._weight: dict[GridPair, list[np.ndarray]] = defaultdict(list)
        self._bytes, self._begun = 0, time.monotonic()

    def __enter__(self) -> MatchWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()

    def add_view(self, scene: int, view: int, checksum: int) -> None:
        """Record the checksum of a view, before its first pair."""
        self._views[scene, view] = checksum

    def add(
        self,
        scene: int,
        first: int,
        second: int,
        grids: GridPair,
        index: np.ndarray,
        distance: np.ndarray | None = None,
        weight: np.ndarray | None = None,
    ) -> None:
        """Add the matches `[N]` of an ordered pair of views, and their distances and weights where they are kept.

        Raises:
            DataError: if the shard that is full cannot be written.
            ValueError: if there are more scenes, or views of a scene, than the format holds.
        """
        for name, value, bits in (("scene", scene, SCENE_BITS), ("view", max(first, second), VIEW_BITS)):
            if value >> bits:
                raise ValueError(f"{name}: expected less than {1 << bits:,}, got {value:,}")
        integers = index.astype(_integer_type(grids[1]))
        size = 12 + integers.nbytes + (0 if distance is None else 4 * distance.size)
        size += 0 if weight is None else 2 * weight.size
        full = self._bytes + size > self.shard_bytes or time.monotonic() - self._begun > SHARD_SECONDS
        if self._bytes and full:
            self._write()
        self._pairs[grids].append((scene, first, second))
        self._index[grids].append(integers)
        if distance is not None:
            self._distance[grids].append(distance.astype(np.float32))
        if weight is not None:
            self._weight[grids].append(weight.astype(np.float16))
        self._bytes += size
        self.num_pairs += 1

    def flush(self) -> None:
        """Write the records that were added since the last shard."""
        if self._bytes:
            self._write()

    def _write(self) -> None:
        views = [(scene, view, checksum) for (scene, view), checksum in self._views.items()]
        tensors = {"views": np.array(views, dtype=np.int64).reshape(-1, 3)}
        for grids, pairs in self._pairs.items():
            name = _table_name(grids)
            tensors[f"pairs/{name}"] = np.array(pairs, dtype=np.int32)
            tensors[f"index/{name}"] = np.stack(self._index[grids])
            for kind, kept in (("distance", self._distance), ("weight", self._weight)):
                if kept[grids]:
                    tensors[f"{kind}/{name}"] = np.stack(kept[grids])
            parts = [tensors[f"{kind}/{name}"] for kind in PARTS if f"{kind}/{name}" in tensors]
            sums = [record_checksum(record) for record in zip(*parts, strict=True)]
            tensors[f"sum/{name}"] = np.array(sums, dtype=np.uint32).view(np.int32)
        path = self.folder / f"{self.prefix}-{self._number:05d}.safetensors"
        Shard.write(path, tensors, self.settings)
        self._number += 1
        self.num_bytes += path.stat().st_size
        # The next shard may hold more pairs of the latest scene.
        latest = views[-1][0] if views else None
        self._views = {view: checksum for view, checksum in self._views.items() if view[0] == latest}
        self._clear()


@dataclass(frozen=True)
class _Table:
    """All records of a pair of grids: sorted keys, and shard and row of each."""

    keys: np.ndarray
    shard: np.ndarray
    row: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[tuple[int, np.ndarray]]) -> _Table:
        """Join the keys of several shards, each with the number of its shard."""
        keys = np.concatenate([keys for _, keys in parts])
        shard = np.concatenate([np.full(len(keys), number, dtype=np.int32) for number, keys in parts])
        row = np.concatenate([np.arange(len(keys), dtype=np.int32) for _, keys in parts])
        order = np.argsort(keys, kind="stable")
        return cls(keys[order], shard[order], row[order])

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the position of each key, -1 where there is none."""
        at = np.searchsorted(self.keys, keys)
        return np.where(self.keys[np.minimum(at, len(self.keys) - 1)] == keys, at, -1)


class MatchReader:
    """Reads the matches of samples from a folder of shards.

    The list of pairs stays in memory, 16 bytes each; matches are read on demand. No file stays open, so data workers
    may be forked or spawned. `complete=False` accepts a folder that lacks shards, so that it can be filled.

    Raises:
        DataError: if the folder holds no shards, lacks one that its index names (unless `complete=False`), or a shard
            is damaged or was written with other settings than the first.
    """

    def __init__(self, folder: str | Path, *, complete: bool = True) -> None:
        self.folder = Path(folder)
        paths = shard_files(folder)
        if not paths:
            raise DataError(f"precomputed_correspondence={folder}: holds no matches; write them with {RECIPE}")
        if complete and (missing := missing_shards(folder)):
            raise DataError(
                f"precomputed_correspondence={folder}: {missing[0]} is gone or has another size than its index says "
                f"({len(missing)} such files). Remove what is left of them and run {RECIPE} again, which computes what "
                "is missing"
            )
        self.shards = [Shard.open(path) for path in paths]
        self.settings = self.shards[0].settings
        for shard in self.shards:
            check_settings(shard.path, shard.settings, self.settings)
        parts: dict[GridPair, list[tuple[int, np.ndarray]]] = defaultdict(list)
        for number, shard in enumerate(self.shards):
            for name in shard.tensors:
                if name.startswith("pairs/"):
                    scene, first, second = shard.whole(name).astype(np.int64).T
                    parts[_grids_of(name)].append((number, _pair_keys(scene, first, second)))
        self._tables = {grids: _Table.of(table) for grids, table in parts.items()}
        scene, view, checksum = np.concatenate([shard.whole("views") for shard in self.shards]).T
        self._view_keys, places = np.unique(_view_keys(scene, view), return_index=True)
        self._checksums = checksum[places]
        self._checked: set[int] = set()
        self._has_weights = any(name.startswith("weight/") for shard in self.shards for name in shard.tensors)

    @property
    def _source(self) -> str:
        """What the matches were computed from."""
        sources = {"tracks": "tracks", "matcher": "images or cameras"}
        return sources.get(self.settings.get("correspondence", "depth"), "depth or cameras")

    def __len__(self) -> int:
        return sum(len(table.keys) for table in self._tables.values())

    @property
    def grids(self) -> list[GridPair]:
        """Pairs of token grids of which there are matches."""
        return sorted(self._tables)

    def contains(self, scene: int, first: int, second: int, grids: GridPair) -> bool:
        """Tell whether there are matches of an ordered pair of views of a scene."""
        keys = np.array([_pair_keys(scene, first, second)], dtype=np.int64)
        return grids in self._tables and bool(self._tables[grids].find(keys) >= 0)

    def check_views(self, scene: int, views: Sequence[int], geometry: Mapping[str, Any], *, sample: object) -> None:
        """Compare the data of views with those that their matches were computed from; each view once.

        Args:
            scene: its number in the source.
            views: their numbers in the scene; views that are not in the folder are skipped.
            geometry: what `view_checksum` reads of these views, which lead the axes.
            sample: name of the sample in the message.

        Raises:
            DataError: if they differ.
        """
        for position, view in enumerate(views):
            key = int(_view_keys(scene, view))
            at = int(np.searchsorted(self._view_keys, key))
            if key in self._checked or at == len(self._view_keys) or self._view_keys[at] != key:
                continue
            checksum = view_checksum(geometry, position, self.settings.get("correspondence", "depth"))
            if self._checksums[at] != checksum:
                raise DataError(
                    f"precomputed_correspondence={self.folder}: view {view} of scene {scene} (sample {sample}) has "
                    f"other {self._source} than its matches were computed from: expected checksum "
                    f"{self._checksums[at]:08x}, got {checksum:08x}. Restore the data, or run {RECIPE} into another "
                    "folder"
                )
            self._checked.add(key)

    def read(
        self, scene: int, views: Sequence[int], token_grids: TokenGrids, *, distances: bool = False
    ) -> Correspondence | None:
        """Return the matches among views of a scene as a batch of one; None if the folder lacks one of the pairs.

        Args:
            scene: its number in the source.
            views: their numbers in the scene, V of them.
            token_grids: token grid `(h, w)` of each view.
            distances: whether to read the distances too.

        Raises:
            DataError: if a shard is damaged.
        """
        places = self._places(scene, views, token_grids)
        if places is None:
            return None
        shape = (1, len(views), len(views), max(height * width for height, width in token_grids))
        index = torch.full(shape, -1, dtype=torch.int64)
        distance = torch.full(shape, torch.inf) if distances else None
        weight = torch.zeros(shape) if self._has_weights else None
        for number, group in groupby(places, key=lambda place: place[0]):
            shard, pairs = self.shards[number], list(group)
            named = [(_table_name((token_grids[i], token_grids[j])), row) for _, row, i, j in pairs]
            # Also parts that are not asked for, since a record has one checksum; those of earlier releases have none.
            kinds = [kind for kind in (*PARTS, "sum") if f"{kind}/{named[0][0]}" in shard.tensors]
            rows = {kind: shard.rows([(f"{kind}/{name}", row) for name, row in named]) for kind in kinds}
            for place, (_, row, i, j) in enumerate(pairs):
                record = {kind: found[place] for kind, found in rows.items()}
                checksum = np.uint32(record_checksum([record[kind] for kind in PARTS if kind in record])).view(np.int32)
                if record.get("sum", checksum) != checksum:
                    raise damaged(shard.path, f"the checksum of record {row} of {named[place][0]} differs")
                for kind, whole in (("index", index), ("distance", distance), ("weight", weight)):
                    if whole is not None:
                        whole.numpy()[0, i, j, : len(record[kind])] = record[kind]
        try:
            return Correspondence(index, token_grids, weight, distance)
        except ValueError as error:
            raise damaged(self.shards[places[0][0]].path, error) from error

    def _places(
        self, scene: int, views: Sequence[int], token_grids: TokenGrids
    ) -> list[tuple[int, int, int, int]] | None:
        """Shard, row and the two positions in the sample of each pair, by shard; None if a pair is missing."""
        by_grids: dict[GridPair, list[tuple[int, int]]] = defaultdict(list)
        for i, j in permutations(range(len(views)), 2):
            by_grids[token_grids[i], token_grids[j]].append((i, j))
        numbers = np.array(views, dtype=np.int64)
        places = []
        for grids, pairs in by_grids.items():
            if grids not in self._tables:
                return None
            table, (first, second) = self._tables[grids], np.array(pairs).T
            positions = table.find(_pair_keys(scene, numbers[first], numbers[second]))
            if (positions < 0).any():
                return None
            records = zip(table.shard[positions].tolist(), table.row[positions].tolist(), pairs, strict=True)
            places += [(shard, row, i, j) for shard, row, (i, j) in records]
        return sorted(places)


def _pair_keys(scene: Any, first: Any, second: Any) -> Any:
    return (_view_keys(scene, first) << VIEW_BITS) | second


def _view_keys(scene: Any, view: Any) -> Any:
    return (scene << VIEW_BITS) | view


def _integer_type(grid: tuple[int, int]) -> type[np.signedinteger[Any]]:
    last = grid[0] * grid[1] - 1
    return next(kind for kind in (np.int8, np.int16, np.int32) if last <= np.iinfo(kind).max)


def _table_name(grids: GridPair) -> str:
    return "-".join(f"{height}x{width}" for height, width in grids)


def _grids_of(name: str) -> GridPair:
    first, second = (tuple(map(int, grid.split("x"))) for grid in name.partition("/")[2].split("-"))
    return (first[0], first[1]), (second[0], second[1])
