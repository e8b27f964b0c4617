"""Files of matches: what is written, when, and what does not fit in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import cameo.data.matches
import cameo.data.shards
import cameo.training.precompute
from cameo.data.matches import MatchReader, MatchWriter
from cameo.data.shards import shard_files
from cameo.errors import DataError


@pytest.mark.parametrize(
    ("grid", "kind"),
    [((8, 16), torch.int8), ((12, 11), torch.int16), ((128, 256), torch.int16), ((200, 164), torch.int32)],
)
def test_integers_are_as_small_as_the_grid_allows(tmp_path: Path, grid: tuple[int, int], kind: torch.dtype) -> None:
    from safetensors.torch import load_file

    last = grid[0] * grid[1] - 1
    row = np.arange(last + 1) - 1
    with MatchWriter(tmp_path, {}) as writer:
        writer.add(7, 2, 0, (grid, grid), row[::-1])
        writer.add(7, 0, 2, (grid, grid), row)
    (path,) = shard_files(tmp_path)
    name = "x".join(map(str, grid))
    stored = load_file(path)[f"index/{name}-{name}"]
    assert stored.dtype == kind
    match = MatchReader(tmp_path).read(7, [0, 2], (grid, grid))
    assert match is not None
    assert match.index[0, 0, 1].tolist() == row.tolist()
    assert match.index[0, 1, 0].tolist() == row[::-1].tolist()


def test_what_waits_for_long_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MatchWriter(tmp_path, {}) as writer:
        writer.add(0, 0, 1, ((1, 2), (1, 2)), np.array([0, -1]))
        writer.add(0, 1, 0, ((1, 2), (1, 2)), np.array([0, -1]))
        assert not shard_files(tmp_path)
        monkeypatch.setattr(cameo.data.matches, "SHARD_SECONDS", -1)
        writer.add(0, 0, 2, ((1, 2), (1, 2)), np.array([0, -1]))
        assert len(MatchReader(tmp_path)) == 2


def test_writer_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    grids, row = ((1, 2), (1, 2)), np.array([0, -1])
    with MatchWriter(tmp_path, {}) as writer:
        with pytest.raises(ValueError, match="scene: expected less than 8,388,608, got 8,388,608"):
            writer.add(2**23, 0, 1, grids, row)
        with pytest.raises(ValueError, match="view: expected less than 1,048,576"):
            writer.add(0, 0, 2**20, grids, row)
    (tmp_path / "file").touch()
    writer = MatchWriter(tmp_path / "full", {})
    writer.add(0, 0, 1, grids, row)
    writer.folder = tmp_path / "file"
    with pytest.raises(DataError, match=r"file/.*cannot write the matches .*choose a folder"):
        writer.flush()


def test_weights_come_back_as_they_were(tmp_path: Path) -> None:
    grids = ((1, 3), (1, 3))
    weight = np.array([0.0, 1 / 16, 577 / 1024], dtype=np.float32)  # as tracks have them
    with MatchWriter(tmp_path, {"correspondence": "tracks"}) as writer:
        writer.add(0, 4, 2, grids, np.array([-1, 0, 2]), weight=weight)
        writer.add(0, 2, 4, grids, np.array([1, -1, 2]), weight=weight[[1, 0, 2]])
    match = MatchReader(tmp_path).read(0, [4, 2], grids)
    assert match is not None
    assert match.match_weight is not None
    assert match.match_weight.dtype == torch.float32
    assert match.match_weight[0, 0, 1].tolist() == weight.tolist()
    assert match.match_weight[0, 1, 0].tolist() == weight[[1, 0, 2]].tolist()
    assert not match.match_weight[0, 0, 0].any()
