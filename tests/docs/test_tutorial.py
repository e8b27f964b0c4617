"""The code of docs/tutorial.md runs from top to bottom, a push to a Hub on this machine included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cameo
from tests.helpers.hub_server import OWNER, LoopbackHub
from tests.helpers.pages import blocks, hub_environment, text_of, with_owner
from tests.helpers.training_runs import scene_cache

PAGE = text_of("docs/tutorial.md")
# What makes the run short, in words that stand in the page.
SHORTER = {"num_scenes=40": "num_scenes=10", "num_steps = 200": "num_steps = 3"}
PUSHED = {"README.md", "cameo_config.json", "pytorch_lora_weights.safetensors"}


def shortened(code: str) -> str:
    for long, short in SHORTER.items():
        assert long in PAGE
        code = code.replace(long, short)
    return code


@pytest.mark.slow
def test_code_runs_in_order(tmp_path: Path) -> None:
    script = tmp_path / "tutorial.py"
    script.write_text(shortened(with_owner("\n".join(blocks(PAGE, "python")))), encoding="utf-8")
    with LoopbackHub() as hub:
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env={**hub_environment(hub, tmp_path), "CAMEO_CACHE": scene_cache()},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert hub.files(f"{OWNER}/rooms-lora").keys() >= PUSHED
    printed = done.stdout.splitlines()
    assert printed[:2] == ["agrees", "torch.Size([1, 2, 2, 64])"]
    before, after = (line for line in printed if "within one token" in line)
    assert before.startswith("before: ")
    assert after.startswith("after: ")
    assert all((tmp_path / f"{name}.png").is_file() for name in ("check", "correspondence", "attention"))
    assert cameo.from_pretrained(tmp_path / "rooms-lora").cameo_config.base_model == "bundled:cat3d-transformer-tiny"


@pytest.mark.slow
def test_the_mistake_that_the_page_names_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    write, check = (shortened(code) for code in blocks(PAGE, "python")[:2])
    assert " @ opengl" in write
    names: dict[str, Any] = {}
    exec(write.replace(" @ opengl", ""), names)
    exec(check, names)
    assert names["check"].verdict == "wrong"
    assert any("OpenGL" in mistake for mistake in names["check"].mistakes)
