"""A folder of matches with a changed bit is refused, or the matches that are read are those that were written."""

from __future__ import annotations

import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from cameo.correspondence import Correspondence
from cameo.data.matches import MatchReader, MatchWriter
from cameo.data.shards import INDEX_NAME, MATCHES, Shard, ShardKind, finish_share, is_finished, shard_files
from cameo.errors import DataError
from cameo.latents.store import LATENTS

GRIDS = ((2, 3), (2, 4))


def read(folder: Path) -> list[Correspondence | None]:
    """What a training reads of the folder."""
    assert is_finished(folder, "plan")
    reader = MatchReader(folder)
    token_grids = (GRIDS[0], GRIDS[1])
    return [reader.read(scene, views, token_grids, distances=True) for scene in (0, 1) for views in ([3, 5], [8, 3])]


def with_two_grids(folder: Path) -> Path:
    """Matches among views of both grids, so that a sample has records in two tables."""
    with MatchWriter(folder, {}) as writer:
        for first, second in ((0, 1), (1, 0)):
            for scene in (0, 1):
                shape = tuple(GRIDS[place][0] * GRIDS[place][1] for place in (first, second))
                index = np.arange(shape[0]) % shape[1] - 1
                for views in ([3, 5], [8, 3]):
                    pair = GRIDS[first], GRIDS[second]
                    place = (views[first], views[second])
                    writer.add(scene, *place, pair, index, np.ones(shape[0]), np.ones(shape[0]) / 2)
    assert not finish_share(folder, {"resolution": 64}, "plan")
    return folder


def same(found: Correspondence | None, expected: Correspondence | None) -> bool:
    if found is None or expected is None:
        return found is expected
    names = ("index", "match_weight", "distance")
    return all(torch.equal(getattr(found, name), getattr(expected, name)) for name in names)


def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    folder = with_two_grids(tmp_path)
    expected = read(folder)
    assert all(match is not None and (match.index >= 0).any() for match in expected)
    chance, messages, harmless = random.Random(0), list[str](), 0
    for path in (*shard_files(folder), folder / INDEX_NAME):
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else len(whole)
        bits = [chance.randrange(8 * len(whole)) for _ in range(100)] + [
            chance.randrange(8 * header) for _ in range(100)
        ]
        for bit in bits:
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            try:
                found = read(folder)
            except DataError as error:
                messages.append(str(error))
            else:
                assert all(map(same, found, expected)), f"bit {bit} of {path.name} changed the matches"
                harmless += 1
        path.write_bytes(whole)
    assert len(messages) > 10 * harmless
    assert all(re.search(r"(matches-\S+|matches.json).*(damaged|is gone|version)", message) for message in messages)
    assert all(map(same, read(folder), expected))


@pytest.mark.parametrize("kind", ["index", "distance", "weight", "sum", "pairs"])
def test_every_table_is_covered(kind: str, tmp_path: Path) -> None:
    folder = with_two_grids(tmp_path)
    (path,) = shard_files(folder)
    table = next(rows for name, rows in MatchReader(folder).shards[0].tensors.items() if name.startswith(kind))
    whole = path.read_bytes()
    for bit in range(0, 8 * table.row_bytes, 5):  # of the first record
        changed = bytearray(whole)
        changed[table.offset + bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(DataError, match=rf"{path.name}: damaged \(the checksum of .* differs\)"):
            read(folder)


def test_shards_without_checksums_are_those_of_the_first_version_alone(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "matches-000-00000.safetensors"
    views = {"views": torch.zeros(1, 3, dtype=torch.int64)}
    save_file(views, path, metadata={"version": "1", "settings": "{}"})
    with pytest.warns(UserWarning, match=r"without checksums, so damage in them is not seen; run .*precompute"):
        assert len(MatchReader(tmp_path)) == 0
    save_file(views, path, metadata={"version": "2", "settings": "{}"})
    with pytest.raises(DataError, match=r"damaged \(has no checksums\)"):
        MatchReader(tmp_path)


@pytest.mark.parametrize("kind", [MATCHES, LATENTS], ids=lambda kind: kind.content)
def test_what_is_written_today_is_read_without_a_warning(kind: ShardKind, tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    Shard.write(path, {"views": torch.zeros(1, 3, dtype=torch.int64)}, {}, kind)
    with warnings.catch_warnings(action="error"):
        assert Shard.open(path, kind).checksums
