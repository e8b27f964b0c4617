"""A run that is to be pushed: what is checked before its first step, and what remains if the push fails at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from cameo.hub.publish import NotReproducedError
from cameo.hub.results import number
from cameo.recipes.lora_finetune import train_and_compare
from cameo.recipes.push_of_a_run import check_push, push_finished
from cameo.training.report import card_metrics
from cameo.training.settings import TrainingConfig
from tests.helpers.hub_server import READ_TOKEN, WRITE_TOKEN, WRONG_TOKEN, LoopbackHub
from tests.helpers.training_runs import fresh_accelerate, make_config, scene_cache


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Make a Hub on this machine the one that the client asks."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with LoopbackHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        yield server


def pushed(folder: Path, **changes: object) -> TrainingConfig:
    settings = {"push_to_hub": True, "hub_model_id": "painter/rooms", "hub_token": WRITE_TOKEN, **changes}
    return make_config(folder, **settings)


def test_an_id_gets_its_owner_before_the_first_step(hub: LoopbackHub, tmp_path: Path) -> None:
    config = pushed(tmp_path, hub_model_id="rooms")
    check_push(config)
    assert config.hub_model_id == "painter/rooms"
    assert "GET /api/whoami-v2" in hub.requests
    assert not hub.repositories


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"hub_model_id": "my rooms"}, ValueError, r"hub_model_id='my rooms': is no id of a Hub repository"),
        ({"hub_model_id": "a/b/c"}, ValueError, r"hub_model_id='a/b/c': is no id of a Hub repository"),
        ({"hub_token": None}, PermissionError, "no Hugging Face token"),
        ({"hub_token": WRONG_TOKEN}, PermissionError, "painter/rooms: the Hub answered 401"),
        ({"hub_token": READ_TOKEN}, PermissionError, "the token of painter may read and not write"),
        ({"hub_model_id": "gallery/rooms"}, PermissionError, "who may only read in gallery. Push to painter/rooms"),
        ({"hub_model_id": "museum/rooms"}, PermissionError, "who is no member of museum"),
        (
            {"preset": None, "pretrained_model_name_or_path": "."},
            ValueError,
            r"no license is known.*here as hub_license=",
        ),
    ],
)
def test_what_would_be_refused_later_is_refused_before_the_first_step(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, error: type, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(error, match=rf"push_to_hub=true: .*{text}.*Nothing was trained yet") as raised:
        check_push(pushed(tmp_path, **changes))
    for token in (WRITE_TOKEN, READ_TOKEN, WRONG_TOKEN):
        assert token not in str(raised.value)
    assert not hub.repositories


def test_a_license_of_ones_own_is_enough(hub: LoopbackHub, tmp_path: Path) -> None:
    check_push(pushed(tmp_path, preset=None, pretrained_model_name_or_path=str(tmp_path), hub_license="openrail"))


def test_without_a_connection_nothing_is_trained(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match=r"Nothing was trained yet; train without push_to_hub, and push later"):
        check_push(pushed(tmp_path))


class Unpushable:
    """A model whose push fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def push_to_hub(self, repo_id: str, **options: object) -> str:
        raise self.error


def test_a_failed_push_prints_the_command_that_pushes_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = pushed(tmp_path, hub_private=True)
    push_finished(Unpushable(ConnectionError("painter/rooms: answered\n500")), tmp_path / "my adapter", config)
    shown = capsys.readouterr().out
    assert "not pushed: painter/rooms: answered 500" in shown
    assert f"cameo push '{tmp_path / 'my adapter'}' painter/rooms private=true" in shown
    assert WRITE_TOKEN not in shown


def test_files_that_reproduce_nothing_are_not_to_be_pushed_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push_finished(Unpushable(NotReproducedError("the output differs")), tmp_path, pushed(tmp_path))
    shown = capsys.readouterr().out
    assert "not pushed: the output differs" in shown
    assert "cameo push" not in shown


def test_nothing_is_pushed_unasked(tmp_path: Path) -> None:
    push_finished(Unpushable(AssertionError("was pushed")), tmp_path, make_config(tmp_path))


def test_a_run_whose_push_fails_is_finished_and_its_card_compares(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    config = pushed(tmp_path / "run", hub_model_id="rooms-broken", max_train_steps=2, compare_without_cameo=True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with fresh_accelerate():
        train_and_compare(config)
    shown = capsys.readouterr().out
    assert f"cameo push {tmp_path / 'run' / 'adapter'} painter/rooms-broken" in shown

    text = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "# rooms-broken" in text.splitlines()
    assert "| | base | without CAMEO | with CAMEO |" in text
    measured = json.loads((tmp_path / "run" / "validation.json").read_text())
    columns = [measured["with CAMEO"][0], *(entries[-1] for entries in measured.values())]
    losses = " | ".join(number(round(one["loss"], 4)) for one in columns)
    assert f"| denoising loss | {losses} |" in text
    data = ModelCard(text).data
    last = {name: entries[-1] for name, entries in measured.items()}
    assert {one.metric_name: one.metric_value for one in data.eval_results} == card_metrics(last)["with CAMEO"]
    assert {one.dataset_split for one in data.eval_results} == {"validation"}
    for private in ("psnr_covisible", "precision", "loss_by_level", WRITE_TOKEN, str(tmp_path)):
        assert private not in text
    baseline = (tmp_path / "run" / "without_cameo" / "adapter" / "README.md").read_text()
    assert "trained without the alignment loss of [CAMEO]" in baseline
    assert "| | base | without CAMEO |" in baseline
    assert "The more blue the better" in text
