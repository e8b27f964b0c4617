"""Adapters of third parties that override methods under their earlier names, and callers that use those names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cameo
from cameo import backbone
from cameo.attention.capture import AttentionLayer
from cameo.attention.layout import TokenLayout
from cameo.backbone import Backbone
from cameo.config import CameoConfig
from cameo.errors import CaptureError
from cameo.hub.license import find_license
from cameo.renamed import METHODS
from tests.helpers.models import Attention


class Joint(nn.Module):
    """One attention in which two views of 4 x 4 tokens meet."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(8, heads=2)
        self.recomputed = False

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.attention(tokens)


def old_adapter() -> type[Backbone]:
    """An adapter as it was written for an earlier release."""
    with pytest.warns(FutureWarning) as warned:

        class Old(Backbone):
            def recognises(self, model: nn.Module) -> bool:
                return isinstance(model, Joint)

            def sites(self, model: nn.Module) -> list[AttentionLayer]:
                return [AttentionLayer(0, "attention", heads=2, layout=TokenLayout("b (v h w)"))]

            def hazard(self, model: nn.Module) -> str | None:
                return "it is recomputed" if model.recomputed else super().hazard(model)

            def inflatable(self, model: nn.Module) -> list[AttentionLayer]:
                return []

            def licence(self, name_or_path: str | None) -> str | None:
                return "mit" if name_or_path == "me/model" else super().licence(name_or_path)

    messages = sorted(str(warning.message).rpartition("Old.")[2] for warning in warned)
    assert messages == [
        f"{old} is now called {new}; the next release drops the old name" for old, new in sorted(METHODS.items())
    ]
    assert {warning.filename for warning in warned} == {__file__}
    return Old


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> Backbone:
    monkeypatch.setattr(backbone, "_registry", {})
    adapter = old_adapter()
    cameo.register_backbone("old")(adapter)
    return adapter()


@pytest.mark.filterwarnings("error::FutureWarning")
def test_overrides_under_old_names_are_asked(old: Backbone) -> None:
    model = cameo.wrap(Joint(), "old", 0).train()
    with pytest.raises(ValueError, match="backbone 'old' does not fit"):
        cameo.wrap(nn.Linear(1, 1), "old", 0)
    tokens = torch.randn(1, 32, 8)
    index = torch.full((1, 2, 2, 16), -1)
    index[0, 0, 1, 3] = 5
    matches = cameo.Correspondence(index, ((4, 4), (4, 4)))
    with pytest.warns(FutureWarning, match="hazard is now called unsupported"):  # of its own super().hazard
        model(tokens, correspondence=matches)
    assert model.num_supervised == 1
    model.base_model.recomputed = True
    with pytest.raises(CaptureError, match="it is recomputed"):
        model(tokens, correspondence=matches)
    config = CameoConfig("old", [], base_model="me/model")
    assert find_license(config, None, backbone=old) == {"license": "mit"}


def test_an_override_reaches_its_base_class_by_the_old_name(old: Backbone) -> None:
    with pytest.warns(FutureWarning, match="licence is now called license"):
        assert old.license("somebody/else") is None


@pytest.mark.filterwarnings("ignore:.*is now called:FutureWarning")
def test_a_subclass_of_an_adapter_may_use_either_name() -> None:
    class Base(Backbone):
        def license(self, name_or_path: str | None) -> str:
            return "mit"

    class OldName(Base):
        def licence(self, name_or_path: str | None) -> str:
            return f"{super().licence(name_or_path)} or other"

    class NewName(OldName):
        def license(self, name_or_path: str | None) -> str:
            return f"{super().license(name_or_path)} or none"

    class Mixin:
        def licence(self, name_or_path: str | None) -> str:
            return "mixed in"

    class Mixed(Mixin, Base):
        pass

    for adapter, expected in ((OldName, "mit or other"), (NewName, "mit or other or none"), (Mixed, "mixed in")):
        assert adapter().license(None) == adapter().licence(None) == expected


@pytest.mark.filterwarnings("error::FutureWarning")
def test_an_adapter_with_both_names_is_left_alone() -> None:
    class Both(Backbone):  # works with the earlier releases too
        def recognizes(self, model: nn.Module) -> bool:
            return True

        recognises = recognizes

    assert Both().recognises(nn.Linear(1, 1))
