"""Settings of the evaluation, and how a section counts samples without a value."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cameo.evaluation.protocol import EvaluationSettings, Section
from cameo.training.runs import evaluation_settings
from cameo.training.settings import TrainingConfig


def test_a_sample_without_a_value_is_counted_out() -> None:
    section = Section()
    section.add("psnr", ["a", "b", "c"], [10.0, math.nan, None], missing="nothing seen")
    assert section.per_sample == {"psnr": {"a": 10.0}}
    assert section.mean == {"psnr": 10.0}
    assert section.notes == {"psnr": "nothing seen in 2 of 3 samples"}
    section.add("ssim", ["a"], [None], missing="nothing seen")
    assert section.mean["ssim"] is None
    section.add("loss", ["a", "b"], [1.0, math.inf])
    assert section.mean["loss"] == 1
    assert section.notes["loss"] == "not finite in 1 of 2 samples"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({"num_sampled": -1}, "num_sampled: expected at least 0, got -1"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected at least 1, got 0"),
        ({"noise_levels": ()}, r"noise_levels: expected different levels between 0 and 1, got \(\)"),
        ({"noise_levels": (0.5, 1.5)}, r"noise_levels: expected a share in \[0, 1\], got 1.5"),
        ({"noise_levels": (1.0, 1.0)}, "noise_levels: expected different levels"),
        ({"attention_levels": (math.nan,)}, "attention_levels: expected a finite number, got nan"),
        ({"noise_levels": (0.5,)}, r"noise_levels: expected one at or above high_noise=0.95, got \(0.5,\)"),
        ({"noise_bands": (0.7, 0.3)}, r"noise_bands: expected two rising levels, got \(0.7, 0.3\)"),
        ({"attention_layers": "al"}, "unknown attention_layers 'al': did you mean 'all'?"),
        ({"lpips": "alexnet"}, "unknown lpips 'alexnet': did you mean 'alex'?"),
        ({"epipolar_threshold": 0.0}, "epipolar_threshold: expected a number > 0, got 0.0"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**change)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_samples": "many"}, "num_samples: expected a whole number, got 'many'"),
        ({"num_samples": "1.5"}, "num_samples: expected a whole number, got '1.5'"),
        ({"noise_levels": "0.5"}, r"noise_levels: expected one at or above high_noise=0.95, got \(0.5,\)"),
        ({"noise_levels": "[high]"}, r"noise_levels: expected a list \[a, b\], got '\[high\]'"),
        ({"noise_levels": "[]"}, r"noise_levels: expected different levels between 0 and 1, got \(\)"),
        ({"noise_levels": "[0.5, 1.5]"}, r"noise_levels: expected a share in \[0, 1\], got 1.5"),
        ({"noise_bands": "[0.5]"}, r"noise_bands: expected a list \[a, b\], got '\[0.5\]'"),
        ({"lpips": "3"}, "unknown lpips '3': Known: alex, squeeze, vgg"),
        ({"fid": "often"}, "fid: expected true or false, got 'often'"),
    ],
)
def test_settings_of_the_wrong_type(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluation_settings(given, TrainingConfig())


def test_settings_from_the_command_line(tmp_path: Path) -> None:
    given = {"noise_levels": "[0.5,1]", "guidance_scale": "2", "lpips": "null", "fid": "true"}
    settings = evaluation_settings(given, TrainingConfig())
    assert settings == EvaluationSettings(
        noise_levels=(0.5, 1), guidance_scale=2.0, lpips=None, fid=True, metric_depth=True
    )
    assert evaluation_settings({}, TrainingConfig(data_format="bare_rooms")).metric_depth
    assert not evaluation_settings({}, TrainingConfig(camera_rig="mvdream", num_views=4)).metric_depth
    assert evaluation_settings({"metric_depth": "true"}, TrainingConfig(data_format="objects")).metric_depth
