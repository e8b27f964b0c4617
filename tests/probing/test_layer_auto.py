"""`cameo.wrap(layer="auto")` takes the best layer of a probe."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import cameo
from cameo import LayerProbe, probe_layers
from cameo.adapters.cat3d import BUNDLED
from cameo.backbone import get_backbone, unwrap_peft
from cameo.config import CameoConfig
from cameo.data import EmbeddedScenes, MultiViewDataset, collate
from cameo.hub.card import model_card
from cameo.hub.card_facts import CardFacts
from cameo.wrap import CameoModel
from tests.helpers.probes import CAT3D, LEVELS, made_probe
from tests.helpers.training_runs import scene_cache


def probe_of(model: nn.Module, best: int, *, hits: tuple[int, int] = (70, 30), **options: Any) -> LayerProbe:
    """A probe of a CAT3D model in which one layer has the first number of hits among 100, and the others the second."""
    attention_layers = get_backbone("cat3d").attention_layers(unwrap_peft(model))
    probe = made_probe(*[[hits[attention_layer.index != best]] * 4 for attention_layer in attention_layers], **options)
    layers = tuple(
        replace(layer, path=attention_layer.path)
        for layer, attention_layer in zip(probe.layers, attention_layers, strict=True)
    )
    return replace(probe, layers=layers)


def test_auto_takes_the_best_layer_and_keeps_the_evidence(tmp_path: Path) -> None:
    unet = CAT3D.pipeline().unet
    probe = probe_of(unet, best=2, backbone="cat3d")
    model = cameo.wrap(unet, "cat3d", layer="auto", probe=probe)
    assert [layer.index for layer in model.supervised_layers] == [2]
    choice = model.cameo_config.layer_choice
    assert choice["layer"] == probe.best == model.cameo_config.layers[0]
    assert choice["ranking"][0]["skill"] == pytest.approx(0.625)
    assert choice["timesteps"] == list(LEVELS)
    assert (choice["scenes"], choice["samples"], choice["pairs"]) == (4, 4, 400)
    folder = model.save_pretrained(tmp_path / "saved", license="mit")
    assert CameoConfig.load(folder).layer_choice == choice
    card = (folder / "README.md").read_text()
    assert "| Layer chosen by |" in card
    assert "2: 0.625 (0.625 to 0.625)" in card
    again = cameo.from_pretrained(folder, base_model=CAT3D.pipeline().unet)
    assert again.cameo_config.layer_choice == choice


def test_a_card_without_a_probe_says_nothing_of_a_choice() -> None:
    config = CameoConfig(backbone=None, layers=["attn"])
    assert "chosen by" not in model_card(CardFacts("me/x", "peft", config, "Net", "nets"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "auto"}, r'layer="auto": expected probe=.*cameo.probe_layers'),
        ({"layer": 1, "probe": True}, r'probe: is for layer="auto", got layer=1'),
        (
            {"layer": "auto", "probe": "sv3d"},
            "probe: is of backbone='sv3d' with inflate=False, expected backbone='cat3d'",
        ),
    ],
)
def test_auto_without_its_probe_is_refused(options: dict[str, Any], message: str) -> None:
    unet = CAT3D.pipeline().unet
    if "probe" in options:
        backbone = options["probe"] if isinstance(options["probe"], str) else "cat3d"
        options = {**options, "probe": probe_of(unet, best=1, backbone=backbone)}
    with pytest.raises(ValueError, match=message):
        cameo.wrap(unet, "cat3d", **options)
    assert isinstance(cameo.wrap(unet, "cat3d"), CameoModel)  # the refused call left nothing behind


def test_auto_passes_over_a_layer_that_cannot_be_supervised() -> None:
    unet = CAT3D.pipeline().unet
    probe = probe_of(unet, best=3, backbone="cat3d")
    layers = [*probe.layers[:3], replace(probe.layers[3], unsupervised="its attention is masked")]
    probe = replace(probe, layers=tuple(layers))
    assert probe.ranking[0].index == 3
    assert probe.best == probe.layers[0].path
    assert "Cannot be supervised:" in probe.table()
    assert [place["index"] for place in probe.choice(top=1)["ranking"]] == [3, 0]  # the evidence holds the choice
    assert cameo.wrap(unet, "cat3d", layer="auto", probe=probe).supervised_layers[0].index == 0


def test_a_choice_that_is_not_above_chance_warns_with_the_line_of_the_caller() -> None:
    unet = CAT3D.pipeline().unet
    probe = probe_of(unet, best=0, hits=(20, 10), backbone="cat3d")
    with pytest.warns(UserWarning, match="does not show that its attention finds the true match") as warned:
        cameo.wrap(unet, "cat3d", layer="auto", probe=probe)
    assert [warning.filename for warning in warned] == [__file__]


def test_the_bundled_base_is_probed_and_its_best_layer_supervised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its best layer is far above chance, and is the default one."""
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    pipeline = get_backbone("cat3d").load(BUNDLED)
    scenes = EmbeddedScenes(content="bare_rooms", num_scenes=4, size=(32, 32), views_per_scene=6, progress=False)
    data = MultiViewDataset(scenes, num_views=3)
    probe = probe_layers(pipeline, [collate([data[0], data[1], data[2], data[3]])], (0.5, 0.9, 1.0))
    assert len(probe.ranking) == 6
    assert probe.ranking[0].skill == max(probe.skill(number) for number in range(6))
    assert probe.ranking[0].interval is not None
    assert probe.ranking[0].interval[0] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # `wrap` warns about a choice that is not above chance
        model = cameo.wrap(pipeline.unet, "cat3d", layer="auto", probe=probe)
    assert model.cameo_config.layers == [probe.best]
    assert model.supervised_layers[0].index == get_backbone("cat3d").default_layer(pipeline.unet)
