"""Whole runs: where a disk is full, where paths are odd, with two processes, and after their figures were lost."""

from __future__ import annotations

import resource
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cameo.errors import DataError
from cameo.training.checkpoints.folder import list_checkpoints
from cameo.training.checkpoints.verify import damage_of
from cameo.training.records import Records
from tests.helpers.checkpoint_damage import RUN, flip, train
from tests.helpers.training_runs import RecipeProcess, make_trainer, read_lines


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("alone_on_shared_scenes")
def test_a_full_disk_is_named_and_nothing_half_stays(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", max_train_steps=1, **RUN)
    trainer.train()
    trainer.step = 2
    total = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoint-1").iterdir())
    for size in (0, 300, 1000, 3000, 8000, 20000):
        assert size < total
        message = (
            r"output_dir=.*run: checkpoint-2 cannot be written \(.*Make room there, .*resume_from_checkpoint=latest"
        )
        with largest_file(size), pytest.raises(DataError, match=message):
            trainer.save_checkpoint()
        assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-1"]
        assert damage_of(tmp_path / "run" / "checkpoint-1") is None
    with largest_file(0), pytest.raises(DataError, match=r"metrics.jsonl: cannot be written .*Make room there"):
        trainer.metrics.append({"step": 2})
    assert damage_of(trainer.save_checkpoint()) is None


@pytest.mark.usefixtures("alone_on_shared_scenes")
def test_a_run_that_a_full_disk_ended_goes_on(tmp_path: Path) -> None:
    with largest_file(20000), pytest.raises(DataError, match="cannot be written"):
        train(tmp_path / "run", 3)
    train(tmp_path / "run", 1, overwrite_output_dir=True)
    with largest_file(20000), pytest.raises(DataError, match="checkpoint-2 cannot be written"):
        train(tmp_path / "run", 3, resume_from_checkpoint="latest")
    train(tmp_path / "run", 3, resume_from_checkpoint="latest")
    train(tmp_path / "whole", 3)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


ODD = ("a b", "caf\u00e9 \u5bb6 \U0001f3e0", 'it\'s "quoted"', "%[x]*?", "$HOME #:;", "x" * 200, "new\nline", "-n")


@pytest.mark.slow
@pytest.mark.usefixtures("alone_on_shared_scenes")
@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_odd_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the folder is given relative, too
    train(Path(name), 2)
    flip(Path(name) / "checkpoint-2" / "optimizer.safetensors", 9000)
    with pytest.warns(UserWarning, match="checkpoint-2 is damaged and not used"):
        train(Path(name), 3, resume_from_checkpoint="latest", checkpoints_total_limit=1)
    assert [path.name for path in list_checkpoints(name)] == ["checkpoint-3"]
    assert [entry["step"] for entry in read_lines(Path(name) / "metrics.jsonl")] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.usefixtures("alone_on_shared_scenes")
def test_lost_and_damaged_figures_are_told(tmp_path: Path) -> None:
    train(tmp_path / "run", 2)
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    with (tmp_path / "damaged" / "metrics.jsonl").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(DataError, match=r"metrics.jsonl: line 1 is damaged .*Copy the file again, or delete the line"):
        train(tmp_path / "damaged", 3, resume_from_checkpoint="latest")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"metrics.jsonl: the figures of steps .* are lost \(step 1 to 2, 2 in all\)"):
        train(tmp_path / "run", 3, resume_from_checkpoint="latest")
    assert [entry["step"] for entry in Records(tmp_path / "run" / "metrics.jsonl").read()] == [3]


def two_processes(folder: Path, **settings: Any) -> list[RecipeProcess]:
    """Start a run of two processes, as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        RecipeProcess(
            "lora_finetune",
            folder,
            environment={**group, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"},
            **{**RUN, "num_validation_images": 0, **settings},
        )
        for rank in range(2)
    ]


@pytest.mark.slow
def test_two_processes_take_the_same_checkpoint(tmp_path: Path) -> None:
    def finish(folder: Path, code: int = 0, **settings: Any) -> str:
        runs = two_processes(folder, **settings)
        assert [run.wait(300) for run in runs] == [code] * 2, "\n".join(run.output for run in runs)
        return runs[0].output + runs[1].output

    finish(tmp_path / "whole", max_train_steps=4)
    finish(tmp_path / "run", max_train_steps=2)
    last = tmp_path / "run" / "checkpoint-2"
    states = [(last / f"random_states_{rank}.safetensors").read_bytes() for rank in range(2)]
    assert states[0] != states[1]
    flip(last / "random_states_1.safetensors", 9000)
    output = finish(tmp_path / "run", 2, max_train_steps=4, resume_from_checkpoint="checkpoint-2")
    assert output.count("random_states_1.safetensors: its checksum is not the one") == 2  # each process says it
    assert "Traceback" not in output
    output = finish(tmp_path / "run", max_train_steps=4, resume_from_checkpoint="latest")
    assert output.count("checkpoint-2 is damaged and not used") == 1
    assert output.count("resumed from") == output.count("checkpoint-1 at step 1") == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
