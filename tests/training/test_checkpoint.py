"""A run that is killed, stopped or interrupted goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cameo.errors import DataError
from cameo.training.checkpoints import folder as checkpoint
from cameo.training.records import Records
from cameo.training.trained_weights import load_trained
from tests.helpers.training_runs import (
    RecipeProcess,
    fresh_accelerate,
    make_trainer,
    read_lines,
    same_files,
    scene_cache,
)

LORA: dict[str, Any] = {
    "max_train_steps": 14,
    "checkpointing_steps": 3,
    "checkpoints_total_limit": 2,
    "validation_steps": 6,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.2,  # makes every step depend on the random state
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
    "dataloader_num_workers": 1,
}
FULL: dict[str, Any] = {
    "max_train_steps": 13,
    "checkpointing_steps": 2,
    "validation_steps": 8,
    "loss_weight": 0.1,
    "use_ema": True,
    "ema_decay": 0.9,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 2,
}


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.list_checkpoints(folder)]


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


@pytest.fixture(scope="module")
def uninterrupted_lora(tmp_path_factory: pytest.TempPathFactory) -> RecipeProcess:
    """A run to compare with, under way beside the tests; it loads its data without worker processes."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "lora"
    return RecipeProcess("lora_finetune", folder, **{**LORA, "dataloader_num_workers": 0})


def finished(run: RecipeProcess) -> Path:
    assert run.wait() == 0, run.output
    return run.output_dir


def test_lora_survives_kill_and_sigterm_bit_for_bit(uninterrupted_lora: RecipeProcess, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = RecipeProcess("lora_finetune", out, **LORA, signal_at=(5, signal.SIGKILL))
    assert run.wait() == -signal.SIGKILL
    assert checkpoints(out) == ["checkpoint-3"]

    # Killed in the middle of writing a file of checkpoint-9: the older ones stay, the half one is no checkpoint.
    run = RecipeProcess("lora_finetune", out, **LORA, resume_from_checkpoint="latest", stall="checkpoint-9.")
    run.reach(lambda: any(out.glob(".*checkpoint-9.*/*.half")))
    run.signal(signal.SIGKILL)
    run.wait()
    assert checkpoints(out) == ["checkpoint-3", "checkpoint-6"]
    assert any(name.startswith("..checkpoint-9.") for name in hidden(out))

    run = RecipeProcess("lora_finetune", out, **LORA, resume_from_checkpoint="latest", signal_at=(10, signal.SIGTERM))
    assert run.wait() == 0, run.output
    assert "checkpoint-6 at step 6" in run.output
    assert "stopped by SIGTERM at step 11 of the run with CAMEO; continue with resume_from_chec" in run.output
    assert Records(out / "metrics.jsonl").read()[-1]["step"] == 11
    assert checkpoints(out) == ["checkpoint-9", "checkpoint-11"]  # the limit of two holds
    assert hidden(out) == []

    run = RecipeProcess("lora_finetune", out, **LORA, resume_from_checkpoint="latest")
    assert run.wait() == 0, run.output
    whole = finished(uninterrupted_lora)
    assert [entry["step"] for entry in read_lines(out / "metrics.jsonl")] == list(range(1, 15))
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (out / "validations.jsonl").read_text() == (whole / "validations.jsonl").read_text()
    assert [entry["step"] for entry in read_lines(out / "validations.jsonl")] == [0, 6, 12, 14]
    weights = "adapter/pytorch_lora_weights.safetensors"
    assert same_files(out / weights, whole / weights)


@pytest.mark.slow
def test_full_training_with_ema_survives_kill_and_sigint_bit_for_bit(tmp_path: Path) -> None:
    uninterrupted = RecipeProcess("full_finetune", tmp_path / "uninterrupted", **FULL)
    out = tmp_path / "run"
    run = RecipeProcess("full_finetune", out, **FULL, signal_at=(3, signal.SIGKILL))
    run.wait()
    assert checkpoints(out) == ["checkpoint-2"]

    path = str(out / "checkpoint-2")
    run = RecipeProcess("full_finetune", out, **FULL, resume_from_checkpoint=path, signal_at=(5, signal.SIGINT))
    assert run.wait() == 0, run.output
    assert "SIGINT: stopping after this step with a checkpoint" in run.output

    run = RecipeProcess("full_finetune", out, **FULL, resume_from_checkpoint="latest")
    assert run.wait() == 0, run.output
    whole = finished(uninterrupted)
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (out / "validations.jsonl").read_text() == (whole / "validations.jsonl").read_text()
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    assert same_files(out / weights, whole / weights)
    assert not same_files(out / weights, out / "checkpoint-13/diffusion_pytorch_model.safetensors")  # averaged

    # A finished run that is resumed trains nothing and writes its results once more.
    (out / "table.md").unlink()
    run = RecipeProcess("full_finetune", out, **FULL, resume_from_checkpoint="latest")
    assert run.wait() == 0, run.output
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (out / "table.md").is_file()
    assert same_files(out / weights, whole / weights)


def test_runs_that_cannot_go_on_end_with_an_error(uninterrupted_lora: RecipeProcess, tmp_path: Path) -> None:
    whole = finished(uninterrupted_lora)
    before = (whole / "metrics.jsonl").read_text()
    cases = {
        "holds no complete checkpoint-N; leave the setting out": (
            tmp_path / "empty",
            {"resume_from_checkpoint": "latest"},
        ),
        "resume_from_checkpoint=checkpoint-99: not a complete checkpoint folder (it has no trainer_state.json); in": (
            whole,
            {"resume_from_checkpoint": "checkpoint-99"},
        ),
        "cannot continue with other settings (seed: 0 -> 1, train_batch_size: 2 -> 4). Restore them": (
            whole,
            {"resume_from_checkpoint": "latest", "seed": 1, "train_batch_size": 4},
        ),
        "holds checkpoints of an earlier run. Continue it with resume_from_checkpoint=latest": (whole, {}),
        "max_train_steps=13: ": (whole, {"resume_from_checkpoint": "latest", "max_train_steps": 13}),
        "holds later checkpoints (checkpoint-14). Remove them, or choose another output_dir": (
            whole,
            {"resume_from_checkpoint": "checkpoint-12"},
        ),
    }
    runs = {}
    for number, (message, (folder, changes)) in enumerate(cases.items()):
        if folder == whole:  # a copy for each, since two runs may not work in one folder
            folder = shutil.copytree(whole, tmp_path / f"copy-{number}")
        runs[message] = RecipeProcess("lora_finetune", folder, **{**LORA, **changes})
    for message, run in runs.items():
        assert run.wait() == 2, (message, run.output)
        assert "Traceback" not in run.output
        assert message in run.output
        if run.output_dir.name != "empty":
            assert (run.output_dir / "metrics.jsonl").read_text() == before


def test_checkpoint_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    with fresh_accelerate():
        trainer = make_trainer(tmp_path, max_train_steps=1)
        trainer.train()
        folder = checkpoint.list_checkpoints(tmp_path)[-1]
        other = make_trainer(tmp_path / "rank", rank=2).model
        with pytest.raises(DataError, match=r"checkpoint-1: does not fit the model that trains: .*size mismatch"):
            load_trained(other, folder)
        other = make_trainer(tmp_path / "targets", target_modules=["to_q"]).model
        with pytest.raises(DataError, match=r"pytorch_lora_weights.safetensors: does not fit .*in one of them only"):
            load_trained(other, folder)


def test_folders_that_are_no_checkpoints_are_not_listed(tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-5", "checkpoint-x", ".checkpoint-11.partial"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-5":
            state = {"step": int(name[-2:].lstrip("-")), "settings": {}} if name[-1].isdigit() else {}
            (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-10"]
    checkpoint.prune_checkpoints(tmp_path, 1)
    assert checkpoints(tmp_path) == ["checkpoint-10"]
    assert hidden(tmp_path) == []
    assert (tmp_path / "checkpoint-5").is_dir()  # not ours to judge


def test_records_skip_a_line_that_was_not_finished(tmp_path: Path) -> None:
    records = Records(tmp_path / "metrics.jsonl")
    for step in range(1, 4):
        records.append({"step": step, "loss": 0.5})
    with records.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [entry["step"] for entry in records.read()] == [1, 2, 3]
    records.keep_until(3)
    records.append({"step": 4, "loss": 0.25})
    assert [entry["step"] for entry in records.read()] == [1, 2, 3, 4]
    records.keep_until(0)
    assert records.read() == []


@pytest.mark.parametrize("crash", [False, True])
def test_a_checkpoint_is_whole_before_it_has_its_name(
    crash: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power may fail between any two steps: what is called checkpoint-N must hold its state file from the start."""
    staged = checkpoint.staging_folder(tmp_path, 3)
    staged.mkdir()
    (staged / "weights.safetensors").write_bytes(b"weights")
    appeared: list[list[str]] = []

    def watching(move: Callable[..., None]) -> Callable[..., None]:
        def run(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
            if Path(target).name == "checkpoint-3":
                appeared.append(sorted(path.name for path in Path(source).iterdir()))
                if crash:
                    raise OSError("the power is gone")
            move(source, target, *args, **kwargs)

        return run

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, watching(getattr(os, name)))
    if crash:
        with pytest.raises(OSError, match="the power is gone"):
            checkpoint.publish_checkpoint(staged, 3, {"settings": {}})
        assert checkpoint.list_checkpoints(tmp_path) == []
        assert not (tmp_path / "checkpoint-3").exists()
    else:
        assert checkpoint.publish_checkpoint(staged, 3, {"settings": {}}) == tmp_path / "checkpoint-3"
    assert appeared == [["trainer_state.json", "weights.safetensors"]]
