"""What strangers find on the Hub: code that runs as it stands, figures, and nothing of the author's machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from cameo.config import CONFIG_NAME
from tests.helpers.card_author import METRICS
from tests.helpers.hub_server import WRITE_TOKEN, WRONG_TOKEN, LoopbackHub

REPOSITORIES = ("base", "unet-lora", "dit-lora", "renamed", "local", "gone", "preset")
# An import of cameo fails, as where it is not installed.
WITHOUT_CAMEO = """
import sys
sys.modules["cameo"] = None
"""
COMPARE = """
import torch
kept = torch.load({kept!r})
with torch.no_grad():
    output = unet.eval()(*kept["args"], **kept["kwargs"]).sample
assert torch.equal(output, kept["output"]), (output - kept["output"]).abs().max()
"""
PLAIN = COMPARE.replace('**kept["kwargs"]', "").replace(", )", ")")


def environment(server: LoopbackHub, home: Path, *, token: str | None) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # the loopback Hub stores large files through LFS
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        **({"HF_TOKEN": token} if token else {}),
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    """Let the author push once; the tests look at what is on the Hub."""
    folder = tmp_path_factory.mktemp("author")
    with LoopbackHub() as server:
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.card_author", str(folder)],
            cwd=Path(__file__).parents[2],
            env=environment(server, folder / "home", token=WRITE_TOKEN),
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        server.folder = folder
        server.printed = json.loads((folder / "steps.json").read_text())
        server.output = done.stdout + done.stderr
        yield server


def card(hub: LoopbackHub, name: str) -> str:
    return hub.files(f"painter/{name}")["README.md"].decode()


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run_as_stranger(hub: LoopbackHub, code: str, folder: Path, *, token: str | None = None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment(hub, folder / "home", token=token),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_plain_diffusers_runs_the_code_that_promises_it(hub, tmp_path) -> None:
    code = WITHOUT_CAMEO
    for name in ("base", "unet-lora"):
        block = blocks(card(hub, name))[1]
        assert "cameo" not in block
        code += block + PLAIN.format(kept=str(hub.folder / f"{name}-plain.pt"))
    run_as_stranger(hub, code + "assert sys.modules['cameo'] is None\n", tmp_path)


def test_the_code_with_cameo_gives_the_output_of_the_author(hub, tmp_path) -> None:
    code = ""
    for name in ("base", "unet-lora", "dit-lora"):
        code += blocks(card(hub, name))[0] + COMPARE.format(kept=str(hub.folder / f"{name}.pt"))
    run_as_stranger(hub, code, tmp_path, token=WRITE_TOKEN)  # painter/dit-lora is private


def test_a_class_of_cameo_promises_no_plain_diffusers(hub) -> None:
    text = card(hub, "dit-lora")
    assert len(blocks(text)) == 1
    assert "`JointDiT` is a class of the library cameo, which is needed: `pip install cameo-diffusion`" in text
    assert ModelCard(text).data.library_name == "cameo"
    assert ModelCard(card(hub, "unet-lora")).data.library_name == "diffusers"


@pytest.mark.parametrize("name", REPOSITORIES)
def test_every_card_names_its_repository_alone(hub, name) -> None:
    text = card(hub, name)
    assert re.search(r"^# (.*)$", text, flags=re.MULTILINE)[1] == name
    for block in blocks(text):
        assert f'"painter/{name}"' in block
        exec(block.split("pipeline =")[0].split("unet =")[0], {})  # imports, and functions for a base of the reader's
        compile(block, name, "exec")
    assert "office-run" not in text
    assert "old-name" not in text


@pytest.mark.parametrize(("name", "base"), [("unet-lora", "painter/base"), ("dit-lora", None), ("local", None)])
def test_only_a_base_of_the_hub_is_named_as_one(hub, name, base) -> None:
    data = ModelCard(card(hub, name)).data.to_dict()
    assert data.get("base_model") == base
    assert data.get("base_model_relation") == (base and "adapter")


@pytest.mark.parametrize("name", ["base", "unet-lora", "dit-lora", "renamed"])
def test_figures(hub, name) -> None:
    text = card(hub, name)
    assert "| | base | without CAMEO | with CAMEO |" in text
    assert "| PSNR of the predicted view (dB) | 11.8 | 12.5 | 13.25 |" in text
    data = ModelCard(text).data
    assert data.model_name == name
    assert {one.metric_name: one.metric_value for one in data.eval_results} == METRICS["with CAMEO"]
    assert {one.task_type for one in data.eval_results} == {"image-to-3d"}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_nothing_of_the_authors_machine_is_published(hub, name) -> None:
    for path, content in hub.files(f"painter/{name}").items():
        for private in (str(hub.folder), "/home/author", WRITE_TOKEN, WRONG_TOKEN, "not for the Hub"):
            assert private.encode() not in content, (path, private)


def test_tokens_are_never_shown(hub) -> None:
    said = hub.output + json.dumps(hub.printed)
    assert WRITE_TOKEN not in said
    assert WRONG_TOKEN not in said


def test_only_the_model_is_pushed(hub) -> None:
    pushed = {".gitattributes", "README.md", CONFIG_NAME, "pytorch_lora_weights.safetensors", "pictures/01_view.png"}
    assert set(hub.files("painter/dit-lora")) == pushed
    assert hub.repositories["painter/dit-lora"].private


def test_what_the_author_wrote_into_the_card_stays(hub) -> None:
    text = card(hub, "renamed")
    assert "By the author." in text
    assert ModelCard(text).data.license == "mit"
    assert ModelCard(card(hub, "dit-lora")).data.license == "apache-2.0"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run", "checked before: the uploaded files, loaded again, give the output of the saved model bit for bit"),
        ("local base", "checked before: the uploaded files, loaded again"),
        ("base gone", "not checked: the output of the uploaded files, since the base "),
        ("preset", "since cameo_config.json names fresh weights as base (preset:transformer-tiny)"),
    ],
)
def test_it_says_what_was_checked(hub, name, text) -> None:
    assert hub.printed[name]["status"] == 0, hub.printed[name]
    assert text in hub.printed[name]["text"]
    assert "pushed " in hub.printed[name]["text"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no folder", "no such folder; expected that of a finished run"),
        ("no model", "holds no saved model: expected cameo_config.json in it, or in its folder adapter or model"),
        ("one argument", "expected a folder and a repository, got 1 arguments"),
        ("wrong token", "answered 401"),
        ("no id", "is no id of a Hub repository"),
        ("damaged", "damaged or cut short"),
    ],
)
def test_a_mistake_is_one_paragraph_and_pushes_nothing(hub, name, text) -> None:
    said = hub.printed[name]
    assert said["status"] == 2
    assert text in said["text"]
    assert said["text"].count("\n") == 1
    assert "painter/x" not in hub.repositories
