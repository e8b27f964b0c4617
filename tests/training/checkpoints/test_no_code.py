"""A checkpoint from somebody else runs no code, whatever is in its files."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cameo.errors import DataError
from cameo.training.checkpoints.verify import STATE_NAME, read_state, write_state
from cameo.training.data import build_dataset
from cameo.training.settings import load_config
from cameo.training.setup import add_lora, load_pipeline, wrap_denoiser
from cameo.training.trainer import Trainer
from tests.helpers.checkpoint_damage import FILES, RUN, train
from tests.helpers.training_runs import fresh_accelerate, make_trainer, scene_cache

EARLIER = Path(__file__).parents[2] / "assets" / "saved_by_0.1.0" / "run"
PICKLES = ("optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl")
# Names that accelerate, torch and diffusers have read pickles from, and one that nobody knows.
OTHER_FILES = (
    "custom_checkpoint_0.pkl",
    "custom_checkpoint_1.pkl",
    "optimizer.bin",
    "scheduler.bin",
    "scaler.pt",
    "sampler.bin",
    "dl_state_dict.bin",
    "random_states_0.pkl",
    "pytorch_model.bin",
    "pytorch_lora_weights.bin",
    "diffusion_pytorch_model.bin",
    "training_args.bin",
    "model.safetensors",
    "adapter_model.safetensors",
    "feature_projectors.safetensors",
    "anything.pt",
)


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def _forms() -> dict[str, Callable[[Path, Evil], None]]:
    def raw(protocol: int) -> Callable[[Path, Evil], None]:
        return lambda path, evil: path.write_bytes(pickle.dumps(evil, protocol=protocol))

    def plausible(path: Path, evil: Evil) -> None:
        torch.save({"state": {}, "param_groups": [{"params": [0], "lr": evil}], "last_epoch": 1}, path)

    return {
        **{f"pickle, protocol {number}": raw(number) for number in (0, 2, 4, 5)},
        "torch.save": lambda path, evil: torch.save(evil, path),
        "torch.save, legacy": lambda path, evil: torch.save(evil, path, _use_new_zipfile_serialization=False),
        "torch.save, within a state": plausible,
    }


FORMS = _forms()
CALLS = {
    "os.system": lambda marker: Evil(os.system, f"touch '{marker}'"),
    "eval": lambda marker: Evil(eval, f"open({str(marker)!r}, 'w')"),
    "os.mkdir": lambda marker: Evil(os.mkdir, str(marker)),
}
each_form = pytest.mark.parametrize("form", FORMS)


def trainer_of_earlier(folder: Path) -> Trainer:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its settings have the names of their time
        config = load_config(EARLIER / "config.yaml", {"output_dir": str(folder)})
    pipeline = load_pipeline(config)
    add_lora(pipeline.denoiser, config)
    dataset = build_dataset(config, "train")
    return Trainer(wrap_denoiser(pipeline, config, dataset), pipeline, dataset, config)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Trainer]]:
    """A trainer of the run whose files are damaged, and one of a run of an earlier release."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch, fresh_accelerate():
        patch.setenv("CAMEO_CACHE", scene_cache())
        train(folder / "now", 2)
        now = make_trainer(folder / "now", max_train_steps=4, **RUN)
        shutil.copytree(EARLIER, folder / "earlier")
        yield {"now": now, "earlier": trainer_of_earlier(folder / "earlier")}


def resume(trainer: Trainer, folder: Path, asked: str) -> str | None:
    """Resume from a copy of the run's folder; returns the message of a refusal."""
    trainer.checkpoints.output_dir = folder
    try:
        trainer.checkpoints.resume(asked, trainer._fixed_settings(), 4)
    except DataError as error:
        return str(error)
    return None


def test_the_crafted_files_do_run_code_where_they_are_unpickled(tmp_path: Path) -> None:
    """Otherwise the other tests would prove nothing."""
    for number, (form, write) in enumerate(FORMS.items()):
        for call, make in CALLS.items():
            marker, path = tmp_path / f"marker-{number}-{call}", tmp_path / "crafted"
            write(path, make(marker))
            torch.load(path, weights_only=False) if "torch" in form else pickle.loads(path.read_bytes())
            assert marker.exists(), (form, call)


def crafted() -> Iterator[tuple[str, str]]:
    """Every form, the calls in turn."""
    yield from zip(FORMS, itertools.cycle(CALLS))


@pytest.mark.parametrize("name", [*PICKLES, "custom_checkpoint_1.pkl", "scaler.pt"])
def test_a_checkpoint_of_an_earlier_release(name: str, trainers: dict[str, Trainer], tmp_path: Path) -> None:
    for number, (form, call) in enumerate(crafted()):
        run, marker = shutil.copytree(EARLIER, tmp_path / str(number)), tmp_path / "marker"
        FORMS[form](run / "checkpoint-2" / name, CALLS[call](marker))
        for asked in ("latest", "checkpoint-2"):
            message = resume(trainers["earlier"], run, asked)
            assert not marker.exists(), form
            assert message is not None, form
            assert name in message
            assert "not run" in message or "damaged" in message
            assert "begin anew" in message or "Copy that checkpoint" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sealed"),
    [
        *((name, True) for name in (*FILES, *OTHER_FILES)),  # with checksums that were made to fit
        *((name, False) for name in FILES),
    ],
)
def test_a_checkpoint(name: str, sealed: bool, trainers: dict[str, Trainer], tmp_path: Path) -> None:
    for number, (form, call) in enumerate(crafted()):
        run, marker = shutil.copytree(trainers["now"].config.output_dir, tmp_path / str(number)), tmp_path / "marker"
        folder = run / "checkpoint-2"
        state = read_state(folder)
        FORMS[form](folder / name, CALLS[call](marker))
        if sealed and name != STATE_NAME:
            write_state(folder, {key: state[key] for key in ("step", "settings")})
        message = resume(trainers["now"], run, "checkpoint-2")
        assert not marker.exists(), form
        if name in FILES and not (sealed and name in ("README.md", "cameo_config.json")):
            assert message is not None, form
            assert name in message or "its weights are missing or damaged" in message


@each_form
def test_files_of_an_earlier_release_in_a_checkpoint_whose_state_names_no_others(
    form: str, trainers: dict[str, Trainer], tmp_path: Path
) -> None:
    run, marker = shutil.copytree(trainers["now"].config.output_dir, tmp_path / "run"), tmp_path / "marker"
    folder = run / "checkpoint-2"
    for name in (*PICKLES, "custom_checkpoint_1.pkl", "scaler.pt"):
        FORMS[form](folder / name, CALLS["os.system"](marker))
    state = {key: value for key, value in read_state(folder).items() if key in ("step", "settings")}
    (folder / STATE_NAME).write_text(json.dumps(state))
    assert resume(trainers["now"], run, "checkpoint-2") is not None
    assert not marker.exists()


def test_a_run_of_an_earlier_release_says_that_its_random_states_are_lost(
    trainers: dict[str, Trainer], tmp_path: Path
) -> None:
    run = shutil.copytree(EARLIER, tmp_path / "run")
    assert resume(trainers["earlier"], run, "latest") is None
    (run / "checkpoint-2" / "random_states_0.pkl").unlink()
    with pytest.warns(UserWarning, match=r"random_states_0.pkl: is missing, so the random generators begin anew"):
        assert resume(trainers["earlier"], run, "latest") is None


@pytest.mark.parametrize("name", [*PICKLES, "pytorch_lora_weights.safetensors", "alignment_head.safetensors"])
@pytest.mark.parametrize("keep", [0, 0.5], ids=["empty", "half"])
def test_a_damaged_file_of_an_earlier_release_is_named(
    name: str, keep: float, trainers: dict[str, Any], tmp_path: Path
) -> None:
    run = shutil.copytree(EARLIER, tmp_path / "run")
    path = run / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    message = resume(trainers["earlier"], run, "checkpoint-2")
    assert message is not None
    assert name in message
    assert "Copy that checkpoint again" in message
