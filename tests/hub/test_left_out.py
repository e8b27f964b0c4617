"""What a save leaves out is said by name: scale, disabled and other adapters, parameters beside the adapter."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from cameo.hub.left_out import left_out
from tests.helpers.saved_models import Net, lora, wrapped, wrapped_lora, wrapped_net


def said(model, folder: Path) -> list[str]:
    """Save a model, and return what is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
    return [text for one in caught if (text := str(one.message)).startswith("saving:")]


def test_a_plain_adapter_and_a_full_model_leave_nothing_out(base, tmp_path) -> None:
    assert said(wrapped(base), tmp_path / "full") == []
    model = wrapped_lora(base)
    model.train()
    assert said(model, tmp_path / "lora") == []


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"to_q": 4}}, {"alpha_pattern": {"to_k": 1}}]
)
def test_a_scale_that_the_settings_give_is_kept(options) -> None:
    net = inject_adapter_in_model(lora(**{"target_modules": ["to_q", "to_k"], **options}), Net())
    assert left_out(net) == []
    net.to_q.scaling["default"] *= 0.5
    [text] = left_out(net)
    assert "changed in 1 layers (to_q) to 0.5 times lora_alpha / r" in text


def test_a_scale_of_diffusers(base, tmp_path) -> None:
    model = wrapped_lora(base)
    base.set_adapters(["default"], [0.25])
    [text] = said(model, tmp_path)
    assert "to 0.25 times lora_alpha / r, which no file keeps" in text
    assert "set_adapters(['default'], [1.0])" in text
    base.set_adapters(["default"], [1.0])
    assert said(model, tmp_path) == []


def test_a_disabled_adapter(base, tmp_path) -> None:
    model = wrapped_lora(base)
    base.disable_adapters()
    [text] = said(model, tmp_path)
    assert "the adapter is switched off, which no file keeps" in text
    base.enable_adapters()
    assert said(model, tmp_path) == []


def test_other_adapters(base, tmp_path) -> None:
    model = wrapped_lora(base)
    base.add_adapter(lora(), adapter_name="style")
    base.set_adapter("default")
    [text] = said(model, tmp_path)
    assert "the adapter 'default' is saved and style is not" in text


def test_parameters_beside_the_adapter(base, tmp_path) -> None:
    model = wrapped_lora(base)
    base.conv_out.requires_grad_(True)
    [text] = said(model, tmp_path)
    assert text.startswith("saving: 2 parameters beside the adapter take gradients")
    assert "conv_out.weight, conv_out.bias" in text
    assert "modules_to_save" in text


def test_modules_to_save_are_saved() -> None:
    net = Net()
    peft = get_peft_model(net, LoraConfig(r=1, target_modules=["to_q"], modules_to_save=["to_k"]))
    assert left_out(peft) == []
    net.to_q.base_layer.bias.requires_grad_(True)
    assert left_out(peft)[0].startswith("1 parameters beside the adapter take gradients")


def test_a_merged_adapter_is_refused(tmp_path) -> None:
    net = inject_adapter_in_model(lora(target_modules=["to_q"]), Net())
    model = wrapped_net(net)
    net.to_q.merge()
    with pytest.raises(ValueError, match="merged into the base weights"):
        model.save_pretrained(tmp_path / "rooms")
