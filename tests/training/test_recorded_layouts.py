"""A checkpoint records how the layers were supervised, and a run that goes on otherwise says so."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import cameo
from cameo import CameoModel
from cameo.backbone import get_backbone
from cameo.training.checkpoint import layouts_of, list_checkpoints, read_state, warn_of_other_layouts
from tests.helpers.mvdream_models import NARROW
from tests.helpers.training_runs import make_trainer

pytestmark = pytest.mark.usefixtures("alone_on_shared_scenes")


def mvdream(preset: str) -> CameoModel:
    return cameo.wrap(get_backbone("mvdream").build(preset, **NARROW).unet, "mvdream")


def warned(folder: Path, model: CameoModel, state: dict[str, Any]) -> list[str]:
    (folder / "trainer_state.json").write_text(json.dumps({"step": 3, "settings": {}, **state}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_other_layouts(folder, model)
    return [str(warning.message) for warning in caught]


def test_a_checkpoint_of_before_layouts_were_recorded(tmp_path: Path) -> None:
    """The image prompt's matches were left out then."""
    (message,) = warned(tmp_path, mvdream("imagedream-tiny"), {})
    assert 'were read with TokenLayout("b (v h w)", unsupervised_views=1, references_last=1), and from here' in message
    assert 'on with TokenLayout("b (v h w)", references_last=1), so that the continued run' in message
    assert warned(tmp_path, mvdream("tiny"), {}) == []


def test_a_recorded_layout_is_compared(tmp_path: Path) -> None:
    model = mvdream("imagedream-tiny")
    assert warned(tmp_path, model, {"layouts": layouts_of(model)}) == []
    ((path, layout),) = layouts_of(model).items()
    (message,) = warned(tmp_path, model, {"layouts": {path: {**layout, "references_last": 0}}})
    assert 'were read with TokenLayout("b (v h w)"), and from here on with TokenLayout("b (v h w)", re' in message


def test_a_run_records_its_layouts_and_compares_them_on_resuming(tmp_path: Path) -> None:
    settings = {"target_modules": ["to_q"], "max_train_steps": 1, "train_batch_size": 1}
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    (folder,) = list_checkpoints(tmp_path)
    state = read_state(folder)
    assert state["layouts"] == layouts_of(trainer.model)
    (path,) = state["layouts"]
    state["layouts"][path]["references_last"] = 1
    (folder / "trainer_state.json").write_text(json.dumps(state))
    with pytest.warns(UserWarning, match=r"the continued run supervises other matches"):
        make_trainer(tmp_path, **settings, resume_from_checkpoint="latest").train()
