"""A push: the check before it, and a client against a Hub on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import cameo
from cameo.config import CONFIG_NAME
from cameo.hub.publish import verify
from tests.helpers import hub_client
from tests.helpers.hub_server import OWNER, WRITE_TOKEN, WRONG_TOKEN, LoopbackHub
from tests.helpers.saved_models import LORA, Net, wrapped_lora, wrapped_net


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
        assert ("is a class of the library cameo, which is needed: `pip install cameo-diffusion`" in card) == own_class
        assert ("from diffusers import" in card) == (not own_class)
        assert ("The weights alone are not the whole model" in card) == (name != "cat3d-transformer")
        assert ("plain diffusers loads the U-Net without it" in card) == (not own_class)
        for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
            exec(block, {})  # each defines what it uses; the bases are fresh weights, so a function takes them

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
        assert 'cameo.from_pretrained("painter/rooms", base_model=pipeline.denoiser)' in card.text
        assert "| psnr | 21.5 |" in card.text
        assert [(one.metric_type, one.metric_value) for one in card.data.eval_results] == [("psnr", 21.5)]
        assert card.data.model_name == "rooms"
        assert card.text.lstrip().startswith("# rooms\n")

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
            ("base changed", "NotReproducedError", "base weights changed beside the adapter"),
            ("no license", "ValueError", "pass license="),
            ("no token", "PermissionError", "set the variable HF_TOKEN"),
            ("wrong token", "PermissionError", "answered 401"),
            ("read token", "PermissionError", "may read and not write"),
            ("no member", "PermissionError", "may only read in gallery"),
            ("no id", "ValueError", "is no id of a Hub repository"),
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
