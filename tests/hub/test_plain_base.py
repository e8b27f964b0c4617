"""Plain diffusers is promised only where it builds the very network of the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from cameo.backbone import get_backbone
from cameo.config import CameoConfig
from cameo.hub.places import builds_in_diffusers, public_config
from tests.helpers.saved_models import wrapped_lora

BASE = "painter/base"


@pytest.fixture
def cached(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of the base's network, as in the cache of the Hub's client."""
    path = tmp_path / "config.json"
    path.write_text((base_folder / "unet" / "config.json").read_text())
    asked = {(BASE, "unet/config.json", None): str(path)}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda name, file, revision: asked.get((name, file, revision))
    )
    return path


def built(unet: UNet2DConditionModel, **config: str) -> bool:
    named = CameoConfig("cat3d", [], **{"base_model": BASE, **config})
    return builds_in_diffusers(unet, "unet", named, online=False)


def test_the_same_class_with_the_same_settings(base, cached: Path) -> None:
    assert built(base)
    assert not built(base, base_revision="v2")  # not in the cache
    assert not built(base, base_model="/data/base")


@pytest.mark.parametrize("changes", [{"in_channels": 4}, {"_class_name": "MultiViewUNetModel"}])
def test_another_network(base, cached: Path, changes: dict) -> None:
    cached.write_text(json.dumps({**json.loads(cached.read_text()), **changes}))
    assert not built(base)


def test_a_class_of_cameo() -> None:
    assert not built(get_backbone("cat3d").build("transformer-tiny", blocks=2).unet)


def test_the_card_follows(base, cached: Path, tmp_path: Path) -> None:
    model = wrapped_lora(base, BASE)
    text = (model.save_pretrained(tmp_path / "same") / "README.md").read_text()
    assert f'unet = UNet2DConditionModel.from_pretrained("{BASE}", subfolder="unet")' in text
    cached.unlink()
    cached.write_text("{}")
    text = (model.save_pretrained(tmp_path / "other") / "README.md").read_text()
    assert f"The network is the one that cameo makes of `{BASE}`" in text
    assert "def add_adapter(unet: UNet2DConditionModel) -> None:" in text


def test_a_published_configuration_names_no_folder() -> None:
    config = CameoConfig("cat3d", [], base_model="/home/me/base", base_revision="v1", training={"data": "/data/office"})
    public = public_config(config)
    assert (public.base_model, public.base_revision, public.training) == (
        None,
        None,
        {"data": "a local file or folder"},
    )
    assert config.base_model == "/home/me/base"
    assert public_config(CameoConfig("cat3d", [], base_model=BASE)).base_model == BASE
