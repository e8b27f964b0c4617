"""Settings of an evaluation, read without loading any model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cameo.config import CONFIG_NAME, CameoConfig
from cameo.data.settings import data_format
from cameo.evaluation.settings import EvaluationSettings
from cameo.settings import typed_values
from cameo.training.settings.config import TrainingConfig, load_config, settings_file

__all__ = ["evaluation_settings", "run_settings"]

RUN_SETTINGS = "config.yaml"
# Formats of data whose depth is known to be in meters.
METRIC_FORMATS = ("scenes", "bare_rooms", "rgbd")


def evaluation_settings(given: Mapping[str, Any], config: TrainingConfig) -> EvaluationSettings:
    """Read the settings of the evaluation; `metric_depth` is on where the data is known to be in meters.

    Example:
        >>> settings = evaluation_settings({"num_sampled": "4", "lpips": "null"}, TrainingConfig())
        >>> settings.num_sampled, settings.lpips, settings.metric_depth
        (4, None, True)

    Raises:
        ValueError: for a value of the wrong type or out of range; names the setting.
    """
    metric_depth = data_format(config) in METRIC_FORMATS
    return EvaluationSettings(**{"metric_depth": metric_depth, **typed_values(EvaluationSettings, given)})


def run_settings(given: Mapping[str, Any], configs: str | Path, folder: Path | None) -> tuple[TrainingConfig, bool]:
    """Return the settings with which a model is loaded, and whether they are those of its own run.

    Args:
        given: settings of the command line, which take precedence; see `cameo.settings.split_arguments`.
        configs: folder of the settings files, one of which is used where no other is given or found.
        folder: folder of the checkpoint. Without `config=` the `config.yaml` in it or beside it holds the settings of
            its run; interpolations in that file are not resolved, since the checkpoint may come from someone else.
    """
    given = dict(given)
    if "pretrained_model_name_or_path" in given:
        given.setdefault("preset", "null")  # that of the settings file
    if folder is not None and "config" not in given:
        for candidate in (folder, folder.absolute().parent):
            if (candidate / RUN_SETTINGS).is_file():
                return load_config(candidate / RUN_SETTINGS, given, interpolate=False), True
        if (folder / CONFIG_NAME).is_file():
            given.setdefault("backbone", CameoConfig.load(folder).backbone)
    return load_config(settings_file("lora", configs, given), given), "config" in given
