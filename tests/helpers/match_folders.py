"""Folders of matches that are computed before a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cameo.correspondence import Correspondence
from cameo.data.matches import MatchReader
from cameo.training.precompute import precompute
from cameo.training.settings import TrainingConfig
from cameo.training.setup import load_pipeline, wrap_denoiser
from cameo.wrap import CameoModel
from tests.helpers.training_runs import (
    SETTINGS,
    make_config,
)

# Supervised layers of 8x8 and of 4x4 tokens.
TWO_GRIDS = {"layer": [0, 2], "preset_options": {**SETTINGS["preset_options"], "attention_levels": [True, True]}}


def config_for(folder: Path, **changes: Any) -> TrainingConfig:
    return make_config(folder / "run", precomputed_correspondence=str(folder / "matches"), **changes)


def fill(config: TrainingConfig, **options: Any) -> Any:
    return precompute(config, progress=False, **options)


def model_for(config: TrainingConfig) -> CameoModel:
    return wrap_denoiser(load_pipeline(config), config)


def contents(folder: str | Path | None) -> dict[Any, list[int]]:
    """All records of a folder that lacks no shard, whichever shard they are in."""
    return records(folder, complete=True)


def records(folder: str | Path | None, *, complete: bool = False) -> dict[Any, list[int]]:
    reader, found = MatchReader(str(folder), complete=complete), {}
    for shard in reader.shards:
        for name in shard.tensors:
            if name.startswith("pairs/"):
                kind = name.removeprefix("pairs/")
                for pair, row in zip(shard.whole(name).tolist(), shard.whole(f"index/{kind}").tolist(), strict=True):
                    assert (kind, *pair) not in found
                    found[kind, *pair] = row
    return found


def no_matching(*_: object, **__: object) -> None:
    pytest.fail("matches are computed that should have been read")


def same(found: Correspondence, expected: Correspondence) -> None:
    assert found.token_grids == expected.token_grids
    assert torch.equal(found.index, expected.index)
    assert (found.index >= 0).any()
