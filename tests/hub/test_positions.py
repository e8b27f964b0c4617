"""The map of positions in what is saved: set again on loading, absent in older files, told on the card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import cameo
from cameo.adapters.common.positions import get_position, set_position
from cameo.backbone import get_backbone
from cameo.config import CONFIG_NAME, CameoConfig
from cameo.hub.card import model_card
from cameo.hub.card_facts import CardFacts
from cameo.hub.publish import verify
from cameo.training.trained_weights import load_trained
from tests.helpers.saved_models import lora

NARROW: dict[str, Any] = {"block_out_channels": (32, 32), "heads": 2}
FAMILIES = ("cat3d", "mvdream", "sv3d", "zero123plus")
every_family = pytest.mark.parametrize("backbone", FAMILIES)


def pipeline(backbone: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_backbone(backbone).build("tiny", **NARROW, **options)


def wrapped(backbone: str, unet: nn.Module) -> cameo.CameoModel:
    model = cameo.wrap(unet, backbone)
    model.cameo_config.base_model = "preset:tiny"
    return model


def output(backbone: str, unet: nn.Module) -> Tensor:
    args, kwargs = get_backbone(backbone).example_inputs(unet)
    torch.manual_seed(3)  # Zero123++ draws noise
    with torch.no_grad():
        return unet.eval()(*args, **kwargs).sample


def forget(folder: Path) -> None:
    """Make the folder one that was saved before there was a map."""
    path = folder / CONFIG_NAME
    saved = json.loads(path.read_text())
    assert saved.pop("position") == "sincos"
    path.write_text(json.dumps(saved))


@every_family
def test_an_adapter_sets_the_map_of_its_base(backbone: str, tmp_path: Path) -> None:
    unet = pipeline(backbone).unet
    unet.add_adapter(lora(target_modules=["to_q", "to_k"]))
    folder = wrapped(backbone, unet).save_pretrained(tmp_path / "rooms")
    expected = output(backbone, unet)
    for position in ("none", "sincos"):
        base = pipeline(backbone, position=position).unet
        again = cameo.from_pretrained(folder, base_model=base).unwrap()
        assert get_position(again) == "sincos"
        assert torch.equal(output(backbone, again), expected)
    forget(folder)
    again = cameo.from_pretrained(folder, base_model=pipeline(backbone).unet).unwrap()
    assert get_position(again) == "none"
    set_position(unet, "none")
    assert torch.equal(output(backbone, again), output(backbone, unet))


@every_family
def test_a_full_model_sets_it(backbone: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = get_backbone(backbone).build("tiny").unet
    folder = wrapped(backbone, unet).save_pretrained(tmp_path / "rooms")
    base = get_backbone(backbone).build("tiny", position="none").unet
    for given in (base,) if backbone == "sv3d" else (base, None):  # diffusers has no SV3DUNet to load by itself
        again = cameo.from_pretrained(folder, base_model=given).unwrap()
        assert get_position(again) == "sincos"
        assert torch.equal(output(backbone, again), output(backbone, unet))
    forget(folder)
    assert get_position(cameo.from_pretrained(folder, base_model=given).unwrap()) == "none"


def test_the_check_before_a_push_sees_a_lost_map(tmp_path: Path) -> None:
    unet = pipeline("cat3d").unet
    model = wrapped("cat3d", unet)
    folder = model.save_pretrained(tmp_path / "rooms")

    def load(base: nn.Module | None) -> nn.Module:
        return cameo.from_pretrained(folder, base_model=base or pipeline("cat3d").unet).unwrap()

    verify(unet, CameoConfig.load(folder), folder, load)
    forget(folder)
    with pytest.raises(RuntimeError, match="do not reproduce"):
        verify(unet, CameoConfig.load(folder), folder, load)


def test_a_checkpoint_sets_it(tmp_path: Path) -> None:
    unet = pipeline("cat3d").unet
    folder = wrapped("cat3d", unet).save_pretrained(tmp_path / "checkpoint", include_head=True)
    other = pipeline("cat3d", position="none").unet
    load_trained(wrapped("cat3d", other), folder)
    assert get_position(other) == "sincos"
    forget(folder)
    load_trained(wrapped("cat3d", unet), folder)
    assert get_position(unet) == "none"


@pytest.mark.parametrize("kind", ["lora", "pipeline", "unet"])
@every_family
def test_the_card_tells_of_it(backbone: str, kind: str, tmp_path: Path) -> None:
    for position in ("sincos", "none"):
        built = pipeline(backbone, position=position)
        if kind == "lora":
            built.unet.add_adapter(lora(target_modules=["to_q", "to_k"]))
        options = {"pipeline": built} if kind == "pipeline" else {}
        folder = wrapped(backbone, built.unet).save_pretrained(tmp_path / position, **options)
        card = (folder / "README.md").read_text()
        told = (
            "The pipelines of cameo and `cameo.from_pretrained` add the map",
            f'`cameo.backbone.get_backbone("{backbone}").set_position(unet, "sincos")`',
            "| Position map | sincos, fixed, behind the first convolution; not part of the weights |",
        )
        assert [text in card for text in told] == [position == "sincos"] * len(told)
        in_diffusers = backbone in ("cat3d", "mvdream")  # the others have a class of their own
        other = "plain diffusers loads the U-Net without it, and its output is another"
        assert (other in card) == (in_diffusers and position == "sincos")
        assert ("in plain diffusers:" in card) == (in_diffusers and position == "none")


def test_the_code_on_the_card_gives_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code without cameo gives the weights alone; with the call that the card names, the model."""
    unet = pipeline("cat3d").unet
    folder = wrapped("cat3d", unet).save_pretrained(tmp_path / "rooms")
    card = (folder / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    call = next(line for line in re.findall(r"`(.*?)`", card) if ".set_position(" in line)
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {"cameo": cameo}
    exec(code, scope)
    assert isinstance(scope["unet"], UNet2DConditionModel)
    from cameo.adapters.common.joint_views import inflate

    inflate(scope["unet"])
    assert not torch.equal(output("cat3d", scope["unet"]), output("cat3d", unet))
    exec(call, scope)
    assert torch.equal(output("cat3d", scope["unet"]), output("cat3d", unet))


def test_a_card_without_a_map_is_as_before() -> None:
    config = CameoConfig("cat3d", ["mid"], base_model="preset:tiny")
    facts = CardFacts("me/rooms", "pipeline", config, "UNet2DConditionModel", "diffusers")
    assert "Without cameo, in plain diffusers:" in model_card(facts)
    assert "position" not in model_card(facts).lower()


def test_other_backbones_have_none() -> None:
    adapter = cameo.backbone.Backbone()
    adapter.name = "other"
    adapter.set_position(nn.Linear(2, 2), adapter.position(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"position: backbone 'other' has no maps .* expected 'none', got 'sincos'"):
        adapter.set_position(nn.Linear(2, 2), "sincos")
