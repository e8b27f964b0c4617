"""Adapters alone: the files are those that diffusers and PEFT write, and load in both and here."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file

import cameo
from cameo.config import CONFIG_NAME
from tests.helpers.saved_models import (
    ADAPTER,
    LORA,
    TARGETS,
    Net,
    lora,
    names,
    output,
    plain_unet,
    wrapped,
    wrapped_lora,
    wrapped_net,
)


class TestDiffusersLora:
    def test_files(self, base, tmp_path):
        wrapped_lora(base).save_pretrained(tmp_path / "rooms")
        assert names(tmp_path / "rooms") == ["README.md", CONFIG_NAME, LORA]
        assert names(tmp_path) == [f"rooms/{name}" for name in ["README.md", CONFIG_NAME, LORA]]

    def test_same_file_as_diffusers_writes(self, base, tmp_path):
        wrapped_lora(base).save_pretrained(tmp_path / "ours")
        StableDiffusionPipeline.save_lora_weights(
            tmp_path / "theirs",
            unet_lora_layers=get_peft_model_state_dict(base),
            unet_lora_adapter_metadata={
                **base.peft_config["default"].to_dict(),
                "target_modules": sorted(TARGETS),
            },
        )
        ours, theirs = (safe_open(tmp_path / folder / LORA, "pt") for folder in ("ours", "theirs"))
        assert set(ours.keys()) == set(theirs.keys())
        assert all(torch.equal(ours.get_tensor(key), theirs.get_tensor(key)) for key in theirs.keys())  # noqa: SIM118
        assert ours.metadata() == theirs.metadata()

    def test_plain_diffusers_model_reads_it(self, base, base_folder, tmp_path):
        before = output(base)
        wrapped_lora(base).save_pretrained(tmp_path / "rooms")
        other = plain_unet(base_folder)
        other.load_lora_adapter(tmp_path / "rooms", prefix="unet", weight_name=LORA)
        assert torch.equal(output(other), output(base))
        assert not torch.equal(output(other), before)

    def test_plain_diffusers_pipeline_reads_it(self, base, base_folder, tmp_path):
        wrapped_lora(base).save_pretrained(tmp_path / "rooms", include_head=True)
        other = plain_unet(base_folder)
        absent = dict.fromkeys(["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
        scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
        pipeline = StableDiffusionPipeline(**absent, unet=other, scheduler=scheduler, requires_safety_checker=False)
        pipeline.load_lora_weights(tmp_path / "rooms")  # must pick the LoRA, not the alignment head
        assert torch.equal(output(other), output(base))

    def test_base_is_loaded_by_name(self, base, base_folder, tmp_path):
        model = wrapped_lora(base, base_folder)
        model.cameo_config.training = {"steps": 7}
        again = cameo.from_pretrained(model.save_pretrained(tmp_path / "rooms", local_base=True))
        assert torch.equal(output(again.unwrap()), output(base))
        assert again.cameo_config == replace(model.cameo_config, cameo_version=cameo.__version__)
        assert not again.training
        assert list(again.base_model.peft_config) == ["default"]

    def test_base_is_given(self, base, base_folder, tmp_path):
        folder = wrapped_lora(base).save_pretrained(tmp_path / "rooms")
        other = plain_unet(base_folder)
        assert cameo.from_pretrained(folder, base_model=other).unwrap() is other
        assert torch.equal(output(other), output(base))

    @pytest.mark.parametrize("is_trainable", [False, True])
    def test_trainable_parameters(self, base, base_folder, tmp_path, is_trainable):
        folder = wrapped_lora(base).save_pretrained(tmp_path / "rooms")
        again = cameo.from_pretrained(folder, base_model=plain_unet(base_folder), is_trainable=is_trainable)
        for name, parameter in again.base_model.named_parameters():
            assert parameter.requires_grad == (is_trainable and "lora_" in name), name

    def test_precision_of_the_adapter_survives(self, base, base_folder, tmp_path):
        base.add_adapter(lora())
        base.to(torch.bfloat16)
        for name, parameter in base.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.float32)
        folder = wrapped(base).save_pretrained(tmp_path / "rooms")
        other = plain_unet(base_folder).to(torch.bfloat16)
        cameo.from_pretrained(folder, base_model=other).unwrap()
        assert torch.equal(output(other), output(base))

    def test_adapter_that_is_not_called_default(self, base, base_folder, tmp_path):
        base.add_adapter(lora(), adapter_name="rooms")
        folder = wrapped(base).save_pretrained(tmp_path / "rooms")
        other = cameo.from_pretrained(folder, base_model=plain_unet(base_folder)).unwrap()
        assert torch.equal(output(other), output(base))

    def test_pipeline_names_the_prefix(self, base_folder, tmp_path):
        pipeline = ADAPTER.load(str(base_folder))
        pipeline.unet.add_adapter(lora())
        folder = wrapped(pipeline.unet).save_pretrained(tmp_path / "rooms", pipeline=pipeline)
        assert all(key.startswith("unet.") for key in load_file(folder / LORA))

    def test_two_active_adapters(self, base, tmp_path):
        base.add_adapter(lora())
        base.add_adapter(lora(), adapter_name="second")
        base.set_adapters(["default", "second"])
        with pytest.raises(ValueError, match=r"\['default', 'second'\] of .* are active; call set_adapter"):
            wrapped(base).save_pretrained(tmp_path / "rooms")
        assert not any(tmp_path.iterdir())

    def test_merged_adapter(self, base, tmp_path):
        model = wrapped_lora(base)
        base.fuse_lora()
        with pytest.raises(ValueError, match=r"merged into the base weights.*unfuse_lora"):
            model.save_pretrained(tmp_path / "rooms")


class TestPeft:
    def test_peft_model(self, base, base_folder, tmp_path):
        model = wrapped(get_peft_model(base, lora()))
        folder = model.save_pretrained(tmp_path / "rooms")
        assert names(folder) == ["README.md", "adapter_config.json", "adapter_model.safetensors", CONFIG_NAME]
        plain = PeftModel.from_pretrained(plain_unet(base_folder), folder)
        again = cameo.from_pretrained(folder, base_model=plain_unet(base_folder))
        assert torch.equal(output(plain), output(model.base_model))
        assert torch.equal(output(again.unwrap()), output(model.base_model))

    def test_same_file_as_peft_writes(self, tmp_path):
        model = get_peft_model(Net(), lora(target_modules=["to_q"]))
        wrapped_net(model).save_pretrained(tmp_path / "ours")
        model.save_pretrained(tmp_path / "theirs")
        ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    def test_injected_layers(self, tmp_path):
        net, tokens = Net(), torch.randn(1, 6, 8)
        state = {key: value.clone() for key, value in net.state_dict().items()}
        inject_adapter_in_model(lora(target_modules=["to_q"]), net)
        folder = wrapped_net(net).save_pretrained(tmp_path / "rooms")
        fresh = Net()
        fresh.load_state_dict(state)
        again = cameo.from_pretrained(folder, base_model=fresh)
        assert torch.equal(again(tokens), net(tokens))
        plain = Net()
        plain.load_state_dict(state)
        assert torch.equal(PeftModel.from_pretrained(plain, folder)(tokens), net(tokens))

    def test_other_kinds_of_adapter(self, base, base_folder, tmp_path):
        base.add_adapter(peft.LoHaConfig(r=2, target_modules=["to_q"], init_weights=False))
        folder = wrapped(base).save_pretrained(tmp_path / "rooms")
        again = cameo.from_pretrained(folder, base_model=plain_unet(base_folder))
        assert torch.equal(output(again.unwrap()), output(base))
