"""Full models and alignment heads, and what a save leaves in the folder."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import cameo
from cameo.adapters.common.joint_views import inflate
from cameo.config import CONFIG_NAME, CameoConfig
from cameo.errors import DataError
from tests.helpers.saved_models import ADAPTER, LORA, Net, names, output, wrapped, wrapped_lora, wrapped_net


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
        assert "holds no alignment head; it starts with new weights" in caplog.text

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


class TestFolder:
    def test_other_format_replaces_the_old_one(self, base, base_folder, tmp_path):
        pipeline = ADAPTER.build("tiny")
        folder = wrapped(pipeline.unet, "preset:tiny").save_pretrained(tmp_path / "rooms", pipeline=pipeline)
        (folder / "notes.txt").write_text("mine")
        wrapped_lora(base, base_folder).save_pretrained(folder, local_base=True)
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
            name: [(tmp_path / save / "rooms" / name).read_bytes() for save in ("old", "new")] for name in names(folder)
        }
        fresh = [name for name in names(folder) if (folder / name).read_bytes() == whole[name][1] != whole[name][0]]
        assert all((folder / name).read_bytes() in versions for name, versions in whole.items())
        assert CONFIG_NAME not in fresh
        assert len(fresh) >= survived - 1  # the cards differ in nothing but the weight of the loss
        assert [path.name for path in folder.parent.iterdir()] == ["rooms"]
