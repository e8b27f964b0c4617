"""The code of the guides runs, and every command of every page is one that a command line takes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cameo.data.depth_estimator
from cameo.scenes.embedded import EmbeddedScenes
from tests.helpers.hub_server import OWNER, LoopbackHub
from tests.helpers.pages import DOCS, PAGES, CommandLine, blocks, command_lines, hub_environment, text_of, with_owner
from tests.helpers.tracked_rooms import pixel_tracks
from tests.helpers.training_runs import scene_cache, write_settings

GUIDES = {page.stem for page in (DOCS / "guides").glob("*.md")} - {"index"}
COMPLETE = ("any_model", "several_processes", "weight_and_schedule", "compiled")  # code that needs nothing else
ELSEWHERE = {"your_own_loop", "add_a_backbone"}  # test_your_own_loop.py, tests/adapters/test_add_a_backbone.py
COMMANDS = {"scale"}  # no Python
HERE = {"without_depth", "saving"}  # the tests below give the names that the pages take for granted
LINES = [line for page in PAGES for line in command_lines(page.read_text(encoding="utf-8"))]


def guide(name: str) -> list[str]:
    return blocks(text_of(f"docs/guides/{name}.md"), "python")


def test_no_guide_is_left_out() -> None:
    assert {*COMPLETE, *ELSEWHERE, *HERE, *COMMANDS} == GUIDES
    assert {name for name in GUIDES if not guide(name)} == COMMANDS


@pytest.mark.parametrize("name", [*COMPLETE[:-1], pytest.param("compiled", marks=pytest.mark.slow)])
def test_code_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for code in guide(name):
        exec(code, names)
    printed = capsys.readouterr().out
    if name == "any_model":
        assert "fits" in printed
        assert names["losses"][-1] < names["losses"][0] - 0.5
    elif name == "compiled":
        assert len({line.split()[1][:6] for line in printed.splitlines()}) == 1
    elif name == "several_processes":
        for model in (names["inner"], names["model"]):
            assert all(one.grad is not None for one in model.alignment_heads.parameters())
    else:
        assert printed.splitlines()[-1] == "step 3: 0.025"


def test_without_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    from_tracks, from_network = guide("without_depth")
    model = cameo.wrap(nn.MultiheadAttention(8, 2, batch_first=True), layer="", layout="b (v h w)", stride=16)
    sightings = torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([[8.0, 8.0], [24.0, 8.0]])
    names: dict[str, Any] = {"cameo": cameo, "model": model, "samples": [sightings]}
    exec(from_tracks, names)
    assert names["match"].index[0, 0, 1, 0] == 1
    assert int(names["match"].matched.sum()) == 2

    room = EmbeddedScenes(split="validation", num_scenes=1, views_per_scene=4, size=(48, 48), progress=False).views(0)
    network = lambda images: 3 / room.depth + 0.5  # noqa: E731  (stands for a network, whose weights need a download)
    monkeypatch.setattr(cameo.data.depth_estimator, "DepthEstimator", lambda name: network)
    cameras = {"intrinsics": room.intrinsics, "extrinsics": room.extrinsics}
    names = {"images": room.images, "tracks": pixel_tracks(room), **cameras, "names": "abcd", "folder": tmp_path}
    exec(from_network, names)
    written = torch.stack([torch.from_numpy(np.load(tmp_path / "depth" / f"{name}.npy")) for name in "abcd"])
    assert ((written - room.depth[:, 0]) / room.depth[:, 0]).abs().nanmedian() < 0.03


@pytest.mark.slow
def test_saving(tmp_path: Path) -> None:
    model = """
        import cameo
        from cameo.backbone import get_backbone
        from peft import LoraConfig

        unet = get_backbone("cat3d").load("bundled:cat3d-tiny").unet
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
        model = cameo.wrap(unet, backbone="cat3d")
        model.cameo_config.base_model = "bundled:cat3d-tiny"
    """
    code = "\n".join(line.strip() for line in model.splitlines()) + with_owner("\n".join(guide("saving")))
    with LoopbackHub() as hub:
        done = subprocess.run(
            [sys.executable, "-c", code + "\nprint(type(model).__name__)"],
            cwd=tmp_path,
            env=hub_environment(hub, tmp_path),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "pytorch_lora_weights.safetensors" in hub.files(f"{OWNER}/rooms-lora")
    assert done.stdout.split()[-1] == "CameoModel"


def refused(line: CommandLine) -> str | None:
    """What the command line of a page is refused with, or None; only its settings are read."""
    try:
        with contextlib.redirect_stdout(None):
            line.module.run([*line.arguments, "--print-config"])
    except SystemExit as stop:
        return None if not stop.code else f"{line.line}: exit status {stop.code}"
    return None


def test_every_command_of_every_page_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_settings(tmp_path / "my.yaml", Path("outputs/my"))
    for folder in ("rooms-lora", "outputs/lora-cat3d-tiny/adapter"):  # what earlier lines of a page have written
        (tmp_path / folder).mkdir(parents=True)
    assert len(LINES) >= 40
    assert {line.launcher for line in LINES} == {"cameo", "python", "torchrun", "accelerate"}
    assert [found for line in LINES if (found := refused(line))] == [], capsys.readouterr().err


def test_a_setting_that_is_none_is_seen() -> None:
    wrong = command_lines("```\ncameo lora loss_wait=0.1   # no such setting\n```")
    assert [refused(line) for line in wrong] == ["cameo lora loss_wait=0.1: exit status 2"]
