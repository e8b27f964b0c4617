"""What `recipes/probe_layers.py` prints and writes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from cameo import LayerProbe
from cameo.probing.truth import ANGLE_BINS
from tests.helpers.training_runs import RECIPES, scene_cache


def test_the_recipe_writes_the_probe_and_what_each_layer_is_needed_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    settings = {
        "backbone": "cat3d",
        "num_validation_scenes": 2,
        "views_per_scene": 6,
        "num_validation_samples": 2,
        "num_views": 2,
        "layers": "0,2",
        "timesteps": "0.5,1",
        "output": tmp_path / "probe",
    }
    arguments = [f"{name}={value}" for name, value in settings.items()]
    runpy.run_path(str(RECIPES / "probe_layers.py"))["main"]([*arguments, "--perturb"])
    printed = capsys.readouterr().out
    probe = LayerProbe.load(tmp_path / "probe" / "probe.json")
    assert [layer.index for layer in probe.layers] == [0, 2]
    assert probe.noise_levels == (0.5, 1.0)
    assert probe.within == (0, 1, 2, "2cm")
    assert probe.angle_bins == ANGLE_BINS
    table = (tmp_path / "probe" / "table.md").read_text()
    assert table.strip() in printed
    assert "PSNR lost without it (dB)" in table
    assert f"best layer: {probe.best}" in printed
    names = sorted(path.name for path in (tmp_path / "probe").iterdir())
    assert names == ["heat_map.png", "perturbation.png", "probe.json", "table.md"]
