"""The command that counts how often the control of the study is right by accident."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.convergence import arms, control_hits, runs

SETTINGS = """
common: {resolution: 16, num_scenes: 4, views_per_scene: 3, train_batch_size: 2, num_views: 2, min_overlap: 0.2,
  max_overlap: 1.0, data_format: bare_rooms, validation: {num_samples: 2}}
subjects:
  cat3d: {backbone: cat3d, preset: tiny, preset_options: {image_size: 16, block_out_channels: [16],
    attention_levels: [true], norm_num_groups: 4, heads: 2}}
"""


def test_a_table_of_the_subjects_with_settings_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(SETTINGS)
    monkeypatch.setattr(arms, "PRESETS", tmp_path)
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    monkeypatch.setenv("CAMEO_CACHE", str(tmp_path))
    arguments = ["--samples", "4", "--subjects", "cat3d", "camera_rig=fan"]
    control_hits.main(arguments)
    table = capsys.readouterr().out
    hits = control_hits.hits_of("tiny", "cat3d", {"camera_rig": "fan"}, num_samples=4)
    assert hits.num_samples == 4
    assert hits.control != control_hits.hits_of("tiny", "cat3d", {}, num_samples=4).control
    assert table.splitlines()[-1].startswith(f"| cat3d | {hits.control:.0%} | {hits.control_in_reference:.0%} |")
