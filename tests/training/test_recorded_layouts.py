"""What was saved records how its layers are supervised, and keeps to it when it is loaded or continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cameo
from cameo import CameoModel, TokenLayout
from cameo.adapters.mvdream import MVDream
from cameo.backbone import get_backbone
from cameo.config import CONFIG_NAME, CameoConfig
from cameo.training.checkpoints.folder import list_checkpoints
from cameo.training.checkpoints.verify import write_state
from cameo.training.setup import load_pipeline, wrap_denoiser
from tests.helpers.mvdream_models import NARROW
from tests.helpers.training_runs import make_config

pytestmark = pytest.mark.usefixtures("alone_on_shared_scenes")
NOW = TokenLayout("b (v h w)", references_last=1)
BEFORE = TokenLayout("b (v h w)", unsupervised_views=1, references_last=1)


def image_dream() -> Any:
    torch.manual_seed(0)
    return get_backbone("mvdream").build("imagedream-tiny", **NARROW).unet


def layout_of(model: CameoModel) -> TokenLayout:
    (layer,) = model.supervised_layers
    return layer.layout


def forget_layouts(folder: Path) -> None:
    """Make a saved model one of a release that did not record them."""
    values = json.loads((folder / CONFIG_NAME).read_text())
    del values["layouts"], values["own_view"]
    (folder / CONFIG_NAME).write_text(json.dumps(values))


def test_a_saved_model_records_its_layouts(tmp_path: Path) -> None:
    model = cameo.wrap(image_dream(), "mvdream")
    model.save_pretrained(tmp_path)
    assert CameoConfig.load(tmp_path).layouts == [NOW.to_dict()]
    assert layout_of(cameo.from_pretrained(tmp_path, base_model=image_dream())) == NOW


def test_a_model_of_before_the_image_prompt_was_supervised(tmp_path: Path) -> None:
    model = cameo.wrap(image_dream(), "mvdream")
    model.save_pretrained(tmp_path / "before")
    forget_layouts(tmp_path / "before")
    again = cameo.from_pretrained(tmp_path / "before", base_model=image_dream())
    assert layout_of(again) == BEFORE
    again.save_pretrained(tmp_path / "again")
    (layout,) = CameoConfig.load(tmp_path / "again").layouts or [None]
    assert layout == BEFORE.to_dict()


def test_without_an_image_prompt_nothing_has_changed() -> None:
    text = get_backbone("mvdream").build("tiny", **NARROW).unet
    layer = MVDream().attention_layers(text)[0]
    assert MVDream().former_layout(layer) == layer.layout == TokenLayout("b (v h w)")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_resumed_run_supervises_what_it_did(tmp_path: Path, recorded: bool) -> None:
    settings = {
        "backbone": "mvdream",
        "preset": "imagedream-tiny",
        "preset_options": {
            name: list(value) if name == "block_out_channels" else value for name, value in NARROW.items()
        },
    }
    config = make_config(tmp_path, **settings)
    model = wrap_denoiser(load_pipeline(config), config)
    assert layout_of(model) == NOW
    folder = tmp_path / "checkpoint-2"
    model.save_pretrained(folder)
    if not recorded:
        forget_layouts(folder)
    write_state(folder, {"step": 2, "settings": {}})
    assert list_checkpoints(tmp_path) == [folder]
    config = make_config(tmp_path, **settings, resume_from_checkpoint="latest")
    assert layout_of(wrap_denoiser(load_pipeline(config), config)) == (NOW if recorded else BEFORE)


@pytest.mark.parametrize("layouts", [[], [{}, {}], ["b (v h w)"], {"path": {}}])
def test_layouts_that_are_none(layouts: Any) -> None:
    with pytest.raises(ValueError, match=r"layouts: expected None, or a mapping for each of the layers"):
        CameoConfig("mvdream", ["mid"], layouts=layouts).check()
