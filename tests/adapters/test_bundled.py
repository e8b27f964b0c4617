"""Trained weights that are part of the package: found, listed and loaded by one function for every backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cameo
from cameo.adapters.common import places
from cameo.backbone import get_backbone
from cameo.config import CameoConfig
from cameo.errors import DataError
from cameo.hub.license import find_license
from cameo.scenes.views import collate
from cameo.training.data import build_dataset
from cameo.training.settings import load_config, settings_file
from tests.helpers.saved_models import lora
from tests.helpers.training_runs import RECIPES, scene_cache

BACKBONES = ("cat3d", "mvdream", "sv3d", "zero123plus")


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of weights in place of the package's."""
    monkeypatch.setattr(places, "BUNDLED_FOLDER", tmp_path)
    return tmp_path


def save(folder: Path, backbone: str, **options: Any) -> Any:
    built = get_backbone(backbone).build("tiny", block_out_channels=(32, 32), heads=2, **options)
    built.save_pretrained(folder / f"{backbone}-tiny")
    return built


@pytest.mark.parametrize("backbone", BACKBONES)
def test_weights_of_every_backbone_load(bundled: Path, backbone: str) -> None:
    built = save(bundled, backbone)
    adapter = get_backbone(backbone)
    name = f"bundled:{backbone}-tiny"
    again = adapter.load(name, revision=None, local_files_only=True)
    state = built.unet.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.unet.state_dict().items())
    assert again.config.position == adapter.position(again.unet) == "sincos"
    assert adapter.license(name) == "apache-2.0"
    config = CameoConfig(backbone, [], base_model=name)
    assert find_license(config, None, backbone=adapter) == {"license": "apache-2.0"}


def test_an_adapter_finds_its_bundled_base(bundled: Path, tmp_path: Path) -> None:
    unet = save(bundled, "mvdream").unet
    unet.add_adapter(lora())
    model = cameo.wrap(unet, "mvdream")
    model.cameo_config.base_model = "bundled:mvdream-tiny"
    again = cameo.from_pretrained(model.save_pretrained(tmp_path / "adapter"))
    args, kwargs = get_backbone("mvdream").example_inputs(unet)
    with torch.no_grad():
        assert torch.equal(again(*args, **kwargs).sample, unet.eval()(*args, **kwargs).sample)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_unknown_name_lists_those_that_there_are(bundled: Path, backbone: str) -> None:
    for name in ("cat3d-tiny", "sv3d-small", "sv3d-tiny"):
        (bundled / name).mkdir()
        (bundled / name / "model_index.json").write_text("{}")
    (bundled / "notes").mkdir()
    expected = (
        r"unknown bundled weights 'bundled:sv3d-tinny': did you mean 'bundled:sv3d-tiny'\? Known: "
        "bundled:cat3d-tiny, bundled:sv3d-small, bundled:sv3d-tiny$"
    )
    with pytest.raises(ValueError, match=expected):
        get_backbone(backbone).load("bundled:sv3d-tinny")


def test_weights_of_another_backbone_are_refused(bundled: Path) -> None:
    save(bundled, "mvdream")
    for backbone in ("cat3d", "sv3d", "zero123plus"):
        with pytest.raises(DataError, match=rf"mvdream-tiny: holds a MVDreamPipeline.*{backbone} starts from"):
            get_backbone(backbone).load("bundled:mvdream-tiny")


def test_every_bundled_folder_says_where_it_comes_from() -> None:
    """Settings, curve and command beside the weights, all together at most 12 MB."""
    names = places.bundled_names()
    assert {f"bundled:{backbone}-tiny" for backbone in BACKBONES} < set(names)
    for name in names:
        folder = Path(places.unbundled(name))
        assert {"README.md", "training.yaml", "training.csv"} <= {path.name for path in folder.iterdir()}, name
    size = sum(path.stat().st_size for path in places.BUNDLED_FOLDER.rglob("*"))
    assert size <= 12 * 2**20


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_backbone_has_a_base_that_paints(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From noise it makes a picture that is nearer to the truth than the mean color of each view."""
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    arguments = [f"backbone={backbone}", "num_validation_scenes=2"]
    config = load_config(settings_file("full", RECIPES / "configs", arguments), arguments)
    scenes = build_dataset(config, "validation")
    pipeline = get_backbone(backbone).load(f"bundled:{backbone}-tiny", torch_dtype=torch.float32)
    batch = collate([scenes[0], scenes[1]])
    made = pipeline.sample(batch, num_inference_steps=10, generator=torch.Generator().manual_seed(0))
    truth = batch["images"][:, 1:]
    errors = [(guess - truth).square().mean() for guess in (made, truth.mean(dim=(-2, -1), keepdim=True))]
    assert errors[0] < errors[1]
