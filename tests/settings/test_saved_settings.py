"""Settings: old names, interpolations and secrets, and what of them is written."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cameo
from cameo.errors import DataError
from cameo.processes.accelerator import start_trackers
from cameo.renamed import SETTINGS as RENAMED
from cameo.settings import shown_settings, to_yaml
from cameo.training.checkpoints.folder import check_continues
from cameo.training.run_settings import run_settings
from cameo.training.settings import TrainingConfig, continued_settings, load_config, save_config

ROOT = Path(__file__).parents[2]
TOKEN = "hf_topsecret"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("preset: tiny\n")
    return path


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


# 1. Old names


def test_a_setting_of_the_command_line_wins_under_whichever_name(file: Path) -> None:
    write(file, "weight: 0.1\n")
    with pytest.warns(FutureWarning, match="weight is now called loss_weight"):
        assert load_config(file, ["loss_weight=0.2"]).loss_weight == 0.2
    write(file, "loss_weight: 0.1\n")
    with pytest.warns(FutureWarning, match="weight is now called loss_weight"):
        assert load_config(file, ["weight=0.2"]).loss_weight == 0.2


def test_a_checkpoint_with_old_names_continues(tmp_path: Path) -> None:
    settings = continued_settings(TrainingConfig(loss_weight=0.1))
    old = {new: name for name, new in RENAMED.items()}
    older = {old.get(name, name): value for name, value in settings.items()}
    assert "weight" in older
    (tmp_path / "trainer_state.json").write_text(json.dumps({"step": 3, "settings": older}))
    with warnings.catch_warnings(action="error"):
        assert check_continues(tmp_path, settings, 10) == 3
    with pytest.raises(ValueError, match=r"loss_weight: 0.1 -> 0.5"):
        check_continues(tmp_path, {**settings, "loss_weight": 0.5}, 10)


def test_settings_saved_before_the_renaming_load() -> None:
    saved = ROOT / "adapters" / "weights" / "cat3d-transformer-tiny" / "training.yaml"
    with pytest.warns(FutureWarning):
        config = load_config(saved)
    assert (config.loss_weight, config.max_train_steps, config.mixed_precision) == (0.0, 1200, "no")


def test_the_default_weight_is_that_of_wrap() -> None:
    import inspect

    assert TrainingConfig().loss_weight == inspect.signature(cameo.wrap).parameters["weight"].default == 0.02


# 2. Secrets and interpolations


@pytest.mark.parametrize(
    "arguments",
    [
        [f"hub_token={TOKEN}", "max_train_steps=x"],
        [f"hub_token=[{TOKEN}]", "max_train_steps=x"],
        [f"hub_token={TOKEN}", "learning_rate=nan"],
        [f"hub_token={TOKEN}", "head={kind: mlp"],
        [f"hub_token.a={TOKEN}"],
        [f"--hub_token.a={TOKEN}"],
        ["hub_token=", TOKEN],
        ["--hub_token", "--seed", TOKEN],
        ["hub_token", TOKEN],
        [TOKEN],
        [f"hub_tokn={TOKEN}"],
        [f"--hub-token={TOKEN}", "rank=x"],
        ["push_to_hub=true", f"hub_token={TOKEN}"],
    ],
)
def test_no_error_shows_the_token(file: Path, arguments: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - any message that does not show it
        load_config(file, arguments)
    assert TOKEN not in str(caught.value)
    write(file, f"hub_token: {TOKEN}: x\nseed: [\n")
    with pytest.raises(DataError) as caught:
        load_config(file)
    assert "topsecret" not in str(caught.value)


def test_nothing_shows_the_token(file: Path) -> None:
    config = load_config(file, [f"hub_token={TOKEN}"])
    assert config.hub_token == TOKEN
    assert TOKEN not in repr(config)
    assert TOKEN not in to_yaml(shown_settings(config))
    with pytest.raises(ValueError, match="hub_token: expected a text or null, got a value that is not shown"):
        TrainingConfig(hub_token=[TOKEN])


@pytest.fixture
def interpolated(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAMEO_TEST_SECRET", TOKEN)
    monkeypatch.setenv("CAMEO_TEST_STEPS", "20")
    return write(
        file,
        "output_dir: ${oc.env:CAMEO_TEST_SECRET}/${backbone}-${rank}\n"
        "revision: ${oc.env:CAMEO_TEST_SECRET}\n"
        "max_train_steps: ${oc.env:CAMEO_TEST_STEPS}\n"
        "preset_options: {deep: ['${oc.env:CAMEO_TEST_SECRET}'], steps: '${max_train_steps}'}\n"
        "tracker_project_name: \\${kept}\n",
    )


def test_interpolations_are_used_resolved_and_written_as_typed(interpolated: Path, tmp_path: Path) -> None:
    config = replace(load_config(interpolated, ["rank=8"]), seed=1)  # as for the runs of a comparison
    assert config.output_dir == f"{TOKEN}/cat3d-8"
    assert (config.revision, config.max_train_steps) == (TOKEN, 20)
    assert config.preset_options == {"deep": [TOKEN], "steps": 20}
    assert config.tracker_project_name == "${kept}"
    seen: dict[str, Any] = {}

    class Accelerator:
        def init_trackers(self, name: str, config: dict[str, Any]) -> None:
            seen.update(config)

    start_trackers(Accelerator(), config)
    saved = tmp_path / "saved.yaml"
    save_config(config, saved)
    texts = [saved.read_text(), json.dumps([continued_settings(config), seen, shown_settings(config)])]
    assert all("topsecret" not in text for text in texts)
    assert "${oc.env:CAMEO_TEST_SECRET}" in texts[0]
    assert load_config(saved) == config
    plain = replace(config, output_dir="elsewhere")
    save_config(plain, saved)
    assert load_config(saved).output_dir == "elsewhere"


def test_a_resumed_run_notices_that_a_variable_has_changed(
    interpolated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = continued_settings(load_config(interpolated))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"step": 3, "settings": settings}))
    assert check_continues(tmp_path, continued_settings(load_config(interpolated)), 30) == 3
    monkeypatch.setenv("CAMEO_TEST_SECRET", "other")
    with pytest.raises(ValueError, match=r"revision: \$\{oc.env:CAMEO_TEST_SECRET\} \(\w+\) -> ") as caught:
        check_continues(tmp_path, continued_settings(load_config(interpolated)), 30)
    assert "topsecret" not in str(caught.value)


def test_interpolations_of_a_file_beside_a_checkpoint_are_left_as_text(interpolated: Path) -> None:
    with pytest.warns(UserWarning, match=r"interpolations in output_dir, revision, .* left as text"):
        config = load_config(interpolated, ["max_train_steps=5", "hub_model_id=${backbone}/x"], interpolate=False)
    assert config.revision == "${oc.env:CAMEO_TEST_SECRET}"
    assert config.preset_options["deep"] == ["${oc.env:CAMEO_TEST_SECRET}"]
    assert config.hub_model_id == "cat3d/x"  # the user's own
    with (
        pytest.warns(UserWarning, match="left as text"),
        pytest.raises(
            ValueError, match=r"max_train_steps: expected a whole number, got .*Give max_train_steps= itself"
        ),
    ):
        load_config(interpolated, interpolate=False)


def test_the_settings_found_beside_a_checkpoint_are_not_resolved(interpolated: Path) -> None:
    adapter = interpolated.parent / "adapter"
    adapter.mkdir()
    interpolated.rename(interpolated.parent / "config.yaml")
    with pytest.warns(UserWarning, match="left as text"):
        config, of_run = run_settings({"max_train_steps": "1"}, ROOT / "recipes" / "configs", adapter)
    assert of_run
    assert config.revision == "${oc.env:CAMEO_TEST_SECRET}"
    named = {"config": str(interpolated.parent / "config.yaml")}  # by the user, who has looked at it
    assert run_settings(named, ROOT / "recipes" / "configs", adapter)[0].revision == TOKEN


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rank: ${oc.env:CAMEO_TEST_SECRET}", r"rank: expected a whole number, got '\$\{oc.env:CAMEO_TEST_SECRET\}'"),
        ("lr_scheduler: ${oc.env:CAMEO_TEST_SECRET}", r"unknown lr_scheduler '\$\{oc.env:CAMEO_TEST_SECRET\}'"),
        ("revision: ${oc.env:CAMEO_TEST_ABSENT}", r"revision: .*CAMEO_TEST_ABSENT"),
        ("revision: ${nothing}", r"revision: .*nothing"),
    ],
)
def test_errors_show_an_interpolation_as_it_was_typed(interpolated: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config(write(interpolated, line + "\n"))
    assert "topsecret" not in str(caught.value)
