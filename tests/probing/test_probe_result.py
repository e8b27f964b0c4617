"""Figures, ranking, intervals, table and picture of a `LayerProbe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cameo import LayerProbe, probe_layers
from cameo.errors import DataError
from tests.helpers.probes import CAT3D, LEVELS, made_probe, small_batches


def test_ranking_is_by_skill_and_says_what_it_cannot_tell_apart() -> None:
    probe = made_probe([30, 31, 30, 29], [61, 60, 59, 60], [60, 58, 60, 61])
    assert [ranked.index for ranked in probe.ranking] == [1, 2, 0]
    first, second, third = probe.ranking
    assert first.skill == pytest.approx((0.6 - 0.2) / 0.8)
    assert probe.skill(1) == first.skill
    assert first.behind is None
    low, high = second.behind
    assert low <= 0 < high  # a tie
    low, high = third.behind
    assert 0.3 < low < 0.375 < high < 0.45
    assert first.interval[0] < first.skill < first.interval[1]
    assert probe.ranking == made_probe([30, 31, 30, 29], [61, 60, 59, 60], [60, 58, 60, 61]).ranking


def test_the_interval_is_that_of_scenes_drawn_anew() -> None:
    """Against a plain loop that draws the same scenes for both layers."""
    first, second = np.random.default_rng(0).integers(20, 90, size=(2, 12))
    first = first + 20
    probe = made_probe(list(first), list(second), scenes=tuple("abcdefghijkl"))
    generator, skills = np.random.default_rng(0), []
    for _ in range(10_000):
        drawn = generator.integers(12, size=12)
        skills.append([(hits[drawn].sum() / 1200 - 0.2) / 0.8 for hits in (first, second)])
    behind = [one - two for one, two in skills]
    expected = [np.quantile(values, (0.025, 0.975)) for values in (*zip(*skills, strict=True), behind)]
    found = [probe.ranking[0].interval, probe.ranking[1].interval, probe.ranking[1].behind]
    assert [ranked.index for ranked in probe.ranking] == [0, 1]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_samples_of_one_scene_count_together() -> None:
    probe = made_probe([10, 30, 80, 40], scenes=("a", "a", "b", "c"))
    assert probe.per_scene(0) == {"a": 0.2, "b": 0.8, "c": 0.4}
    assert probe.per_scene(0, kind="skill")["b"] == pytest.approx(0.75)
    assert probe.per_scene(0, kind="chance") == {"a": 0.2, "b": 0.2, "c": 0.2}
    single = made_probe([10], scenes=("a",))
    assert single.ranking[0].interval is None


def test_a_probe_is_written_and_read(tmp_path: Path) -> None:
    probe = probe_layers(CAT3D.pipeline(), small_batches(CAT3D), LEVELS, metric=True)
    path = probe.save(tmp_path / "new" / "probe.json")
    again = LayerProbe.load(path)
    assert again.to_dict() == probe.to_dict()
    assert again.ranking == probe.ranking
    assert again.table() == probe.table()
    assert again.ceiling(0) == 1.0  # the cameras stand whole tokens apart
    for content, message in (("{", "not a saved probe"), ("{}", "expected the keys"), ("[]", "not a saved probe")):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            LayerProbe.load(path)
    with pytest.raises(DataError, match="no such file"):
        LayerProbe.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"within": 3}, r"within: expected one of \(1,\), got 3"),
        ({"readout": "through_head"}, "readout of layer 'block.0.attn1'.*through_head"),
        ({"noise_level": 0.2}, r"noise_level: expected one of \(0.5, 1.0\) or None, got 0.2"),
        ({"angle_bin": 1}, r"angle_bin: expected one of \(\(0.0, 180.0\),\)"),
        ({"angle_bin": (0, 15)}, "angle_bin: expected one of"),
    ],
)
def test_what_was_not_probed_is_refused(selection: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made_probe([1, 2, 3, 4]).precision(0, **selection)


def test_the_heat_map_shows_every_layer_and_step() -> None:
    probe = probe_layers(CAT3D.pipeline(), small_batches(CAT3D), LEVELS)
    figure = probe.heat_map(within=1)
    panels = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in panels] == ["all pairs", "0-15 deg", "15-30 deg", "30-60 deg", "60-180 deg"]
    drawn = np.asarray(panels[0].images[0].get_array())
    assert drawn.shape == (len(probe.layers), len(LEVELS))
    assert drawn[2, 1] == pytest.approx(probe.skill(2, noise_level=1.0))
    assert np.ma.getmaskarray(panels[3].images[0].get_array()).all()  # no pair of views at this angle
    with pytest.raises(ValueError, match="kind"):
        probe.heat_map(kind="skills")


def test_a_saved_probe_keeps_the_keys_of_its_format(tmp_path: Path) -> None:
    """Files of earlier releases can be read, and earlier releases can read new ones."""
    probe = made_probe([10, 30, 80, 40])
    saved = json.loads(probe.save(tmp_path / "probe.json").read_text())
    assert set(saved) == {
        "format", "layers", "timesteps", "angle_bins", "within", "scenes", "samples", "backbone", "inflate", "seed",
    }  # fmt: skip
    assert saved["timesteps"] == [0.5, 1.0]
    assert LayerProbe.load(tmp_path / "probe.json").noise_levels == (0.5, 1.0)
