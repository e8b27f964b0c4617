"""Adapters of third parties: their registration, and layers that they inflate."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import cameo
from cameo import TokenLayout, backbone
from cameo.attention.capture import AttentionLayer
from cameo.backbone import Backbone, get_backbone
from tests.helpers.wrapped_models import LAYER, Toy, run_loss


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    fresh: dict[str, Any] = {}
    monkeypatch.setattr(backbone, "_registry", fresh)
    return fresh


class ToyBackbone(Backbone):
    def recognizes(self, model: nn.Module) -> bool:
        return isinstance(model, Toy)

    def attention_layers(self, model: nn.Module) -> list[AttentionLayer]:
        return [
            AttentionLayer(i, f"blocks.{i}.attention", 2, TokenLayout("b (v h w)"), 8, "runs twice" if i == 2 else None)
            for i in range(3)
        ]

    def default_layer(self, model: nn.Module) -> int:
        return 1


def test_a_backbone_of_a_third_party(registry: dict[str, Any]) -> None:
    assert cameo.register_backbone("toy")(ToyBackbone) is ToyBackbone
    assert "toy" in cameo.backbones()
    model = cameo.wrap(Toy(), "toy")
    assert model.supervised_layers[0].path == LAYER
    assert len(model.attention_layers) == 3
    assert float(run_loss(model).detach()) > 0
    with pytest.raises(ValueError, match=r"layer 2 \(blocks\.2\.attention\) cannot be supervised: runs twice"):
        cameo.wrap(Toy(), "toy", 2)
    with pytest.raises(ValueError, match="Linear does not have the structure of backbone 'toy'"):
        cameo.wrap(nn.Linear(2, 2), "toy")
    with pytest.raises(NotImplementedError, match="backbone 'toy' only attaches; it has no presets"):
        get_backbone("toy").build("tiny")


class MixedBackbone(ToyBackbone):
    """Its first layer is temporal; `inflate` leaves a note on the model."""

    def attention_layers(self, model: nn.Module) -> list[AttentionLayer]:
        return [
            AttentionLayer(0, "blocks.0.attention", 2, TokenLayout("(b h w) v")),
            super().attention_layers(model)[1],
        ]

    def inflatable_layers(self, model: nn.Module) -> list[AttentionLayer]:
        return ToyBackbone.attention_layers(self, model)

    def inflate(self, model: nn.Module, path: str) -> None:
        model.joined = {*getattr(model, "joined", ()), path}


def test_inflate_joins_the_chosen_layers_only(registry: dict[str, Any]) -> None:
    cameo.register_backbone("mixed")(MixedBackbone)
    model = cameo.wrap(Toy(), "mixed", [0, 1], inflate=True)
    assert model.joined == {"blocks.0.attention", LAYER}
    assert len(model.attention_layers) == 3
    assert model.unwrap().joined == {"blocks.0.attention", LAYER}
    assert not hasattr(cameo.wrap(Toy(), "mixed"), "joined")
    assert ToyBackbone().inflatable_layers(Toy()) == []
    with pytest.raises(NotImplementedError, match="has no layers to inflate"):
        ToyBackbone().inflate(Toy(), LAYER)


@pytest.mark.parametrize("options", [{"head": "mpl"}, {"layer": 2}, {"normalize": "each"}, {"layer": [1, 1]}], ids=str)
def test_a_refused_wrap_inflates_nothing(options: dict[str, Any], registry: dict[str, Any]) -> None:
    cameo.register_backbone("mixed")(MixedBackbone)
    base = Toy()
    with pytest.raises(ValueError, match=r"unknown|cannot be supervised|named twice"):
        cameo.wrap(base, "mixed", inflate=True, **options)
    assert not hasattr(base, "joined")


def test_normalize_follows_from_each_chosen_layer(registry: dict[str, Any]) -> None:
    cameo.register_backbone("mixed")(MixedBackbone)
    assert cameo.wrap(Toy(), "mixed", 0).cameo_config.normalize == "all_views"
    assert cameo.wrap(Toy(), "mixed", 1).cameo_config.normalize == "per_view"
    assert cameo.wrap(Toy(), "mixed", [0, 1]).cameo_config.normalize == ["all_views", "per_view"]
    with pytest.raises(ValueError, match=r"blocks\.0\.attention' cannot be supervised with normalize='per_view'"):
        cameo.wrap(Toy(), "mixed", [0, 1], normalize="per_view")
    assert cameo.wrap(Toy(), "mixed", [0, 1], normalize="all_views").cameo_config.normalize == "all_views"


def test_names_are_not_taken_twice(registry: dict[str, Any]) -> None:
    cameo.register_backbone("toy")(ToyBackbone)
    cameo.register_backbone("toy")(ToyBackbone)  # a notebook cell that runs again
    with pytest.raises(ValueError, match=r"'toy' is already registered by .*test_backbone:ToyBackbone"):
        cameo.register_backbone("toy")(type("Other", (Backbone,), {}))
    elsewhere = type("ToyBackbone", (Backbone,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="already registered"):  # the same class name is not the same class
        cameo.register_backbone("toy")(elsewhere)
    with pytest.raises(ValueError, match=r"'cat3d' is already registered by cameo\.adapters\.cat3d:Cat3D"):
        cameo.register_backbone("cat3d")(ToyBackbone)  # installed, though not loaded yet
    with pytest.raises(TypeError, match=r"expected a subclass of cameo\.backbone\.Backbone"):
        cameo.register_backbone("linear")(nn.Linear)  # type: ignore[arg-type]


def test_an_installed_backbone_is_found_by_its_entry_point(registry: dict[str, Any]) -> None:
    assert "cat3d" in cameo.backbones()
    assert registry == {}
    assert type(get_backbone("cat3d")).__name__ == "Cat3D"
    assert list(registry) == ["cat3d"]
    with pytest.raises(ValueError, match=r"unknown backbone 'cat4d': did you mean 'cat3d'\? Known: .*cat3d"):
        get_backbone("cat4d")


def test_a_broken_entry_point_is_named(registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    points = [
        EntryPoint("broken", "no_such_package.adapter:Adapter", "cameo.backbones"),
        EntryPoint("renamed", "cameo.adapters.cat3d:Dog3D", "cameo.backbones"),
        EntryPoint("foreign", "torch.nn:Linear", "cameo.backbones"),
    ]
    monkeypatch.setattr(
        backbone, "entry_points", lambda group, name=None: [p for p in points if name in (None, p.name)]
    )
    with pytest.raises(ImportError, match=r"backbone 'broken': its entry point 'no_such_package\.adapter:Adapter'"):
        get_backbone("broken")
    with pytest.raises(ImportError, match="Dog3D"):
        get_backbone("renamed")
    with pytest.raises(TypeError, match="expected a subclass"):
        get_backbone("foreign")
