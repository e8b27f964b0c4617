"""The benchmark of a training step runs at its smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.step import check_layout, latents, measure
from tests.helpers.training_runs import fresh_accelerate


@pytest.mark.slow
def test_training_step_runs_at_its_smallest_size_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step.json"
    kind = measure.Kind("cat3d", checkpointing=False)
    monkeypatch.setattr(measure, "kinds", lambda backbones: [kind])
    size = ["--width", "0.05", "--resolution", "64", "--batch", "1", "--repeats", "1"]
    arguments = ["--device", "cpu", "--gates", *size, "--output", str(path)]
    assert measure.main(arguments) == 0
    first, shown = path.read_text(), capsys.readouterr().out
    (found,) = json.loads(first).values()
    assert len(found["steps"]) == 4
    assert found["left_out"] == {}
    assert "time of a step, cat3d, LoRA, no checkpointing, with alignment, matches from depth / without" in shown
    assert measure.main(arguments) == 0
    assert path.read_text() == first


def test_training_step_has_the_released_size() -> None:
    config = measure.settings(measure.Kind("cat3d"), 1.0, None, None)
    assert (config.resolution, config.num_views, config.train_batch_size) == (512, 4, 3)
    assert config.mixed_precision == "bf16"
    assert config.preset_options["block_out_channels"] == [320, 640, 1280, 1280]


@pytest.mark.slow
def test_cached_latents_run_at_their_smallest_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMEO_CACHE", str(tmp_path))
    path = tmp_path / "latents.json"
    arguments = ["--device", "cpu", "--resolution", "32", "--repeats", "1", "--output", str(path)]
    with fresh_accelerate():
        assert latents.main(arguments) == 0
    (found,) = json.loads(path.read_text()).values()
    differences = [way["largest relative difference of a loss"] for way in found["ways"].values()]
    assert differences[:2] == [0, 0]
    assert 0 < differences[2] < 2**-9
    assert "steps per second" in capsys.readouterr().out


@pytest.mark.slow
def test_the_cost_of_checking_a_layout_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert check_layout.main(["--repeats", "1"]) == 0
    torch.set_num_threads(threads)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| CAT3D", "| Wan"))]
    assert [float(row[-1].rstrip(" |")) > 0 for row in rows] == [True, True]
