"""A folder belongs to one run at a time, and the demonstration replaces nothing but itself."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from cameo.errors import DataError
from cameo.training.checkpoints import folder as checkpoint
from cameo.training.output_folder import HOLDER_FILE, hold_folder
from cameo.training.settings import TrainingConfig, continued_settings, load_config, save_config
from cameo.training.setup import planned_runs
from tests.helpers.training_runs import RECIPES, RecipeProcess

DEMONSTRATION = RECIPES / "configs" / "lora_cat3d_tiny.yaml"


class Started(Exception):  # noqa: N818  (no error: it ends the recipe where the test has seen enough)
    """The recipe has begun to work."""


@pytest.fixture
def demonstrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`python recipes/lora_finetune.py` in an empty folder, up to the moment before it reads its data."""
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(RECIPES / "lora_finetune.py"))["main"]

    def begin(*_: Any) -> None:
        raise Started

    def demonstrate() -> None:
        with pytest.raises(Started):
            main([])

    monkeypatch.setattr("cameo.training.data.build_dataset", begin)
    return demonstrate


def leave_run(config: TrainingConfig, *steps: int, processes: int = 1) -> Path:
    """Write what a run leaves in its folder, as far as it says which run it was."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    for step in steps:
        staged = checkpoint.staging_folder(folder, step)
        checkpoint.publish_checkpoint(staged, step, {"settings": continued_settings(config) | {"processes": processes}})
    return folder


def leave_demonstration(**changes: Any) -> tuple[Path, Path]:
    """Write what the demonstration leaves, in the folders of both of its runs."""
    config = replace(load_config(DEMONSTRATION), overwrite_output_dir=True, **changes)
    without, with_cameo = (leave_run(run, 200) for run in planned_runs(config).values())
    (with_cameo / "adapter").mkdir()
    return without, with_cameo


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_demonstration_begins_in_an_empty_folder_and_replaces_itself(demonstrate: Callable[[], None]) -> None:
    demonstrate()
    without, _ = leave_demonstration()
    demonstrate()
    # One that was stopped and resumed is still the demonstration.
    config = planned_runs(replace(load_config(DEMONSTRATION), overwrite_output_dir=True))["without CAMEO"]
    save_config(replace(config, resume_from_checkpoint="latest"), without / "config.yaml")
    demonstrate()


def test_the_demonstration_begins_where_its_first_run_was_stopped(demonstrate: Callable[[], None]) -> None:
    config = replace(load_config(DEMONSTRATION), overwrite_output_dir=True)
    leave_run(planned_runs(config)["without CAMEO"], 100, processes=2)
    demonstrate()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 77}, "seed=77, not 0"),
        ({"max_train_steps": 5000}, "max_train_steps=5000, not 400"),
        ({"train_data_dir": "scan", "data_format": "auto"}, "train_data_dir=scan, not None"),
    ],
)
def test_a_run_with_settings_of_its_own_is_not_replaced(
    demonstrate: Callable[[], None], changes: dict[str, Any], reason: str
) -> None:
    without, folder = leave_demonstration(**changes)
    before = files(folder)
    with pytest.raises(DataError, match=rf"{without}: holds a run with settings of its own .*{reason}.*another output"):
        demonstrate()
    assert files(folder) == before


def test_a_single_run_is_not_replaced(demonstrate: Callable[[], None]) -> None:
    folder = leave_run(replace(load_config(DEMONSTRATION), compare_without_cameo=False), 200)
    with pytest.raises(DataError, match=r"lora-cat3d-tiny: holds a run .*compare_without_cameo=False, not True.*or ov"):
        demonstrate()
    assert (folder / "checkpoint-200").is_dir()


def test_either_run_protects_both(demonstrate: Callable[[], None]) -> None:
    without, folder = leave_demonstration()
    other = replace(load_config(DEMONSTRATION), output_dir="other", seed=1)
    (leave_run(other, 300) / "checkpoint-300").rename(folder / "checkpoint-300")
    before = files(folder)
    with pytest.raises(DataError, match=r"lora-cat3d-tiny: holds checkpoint-300 of a run with .* \(seed=1, not 0\)"):
        demonstrate()
    assert files(folder) == before
    assert (without / "checkpoint-200").is_dir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "config.yaml").unlink(), "holds files, and no config.yaml that says of which run"),
        (lambda folder: (folder / "config.yaml").write_text("seed: [1"), "holds a run whose settings cannot be read"),
        (
            lambda folder: (folder / "checkpoint-200" / "trainer_state.json").write_text("{"),
            "holds checkpoint-200, whose settings cannot be read",
        ),
    ],
)
def test_what_cannot_be_read_is_not_replaced(
    demonstrate: Callable[[], None], damage: Callable[[Path], None], reason: str
) -> None:
    _, folder = leave_demonstration()
    damage(folder)
    with pytest.raises(DataError, match=f"lora-cat3d-tiny: {reason}"):
        demonstrate()
    assert (folder / "checkpoint-200").is_dir()


def test_arguments_are_no_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    leave_demonstration()
    main = runpy.run_path(str(RECIPES / "lora_finetune.py"))["main"]
    with pytest.raises(DataError, match=r"holds checkpoints of an earlier run\. Continue it with resume_from"):
        main(["seed=0"])


def in_another_process(work: Callable[[], None]) -> int:
    """Run a function in a child of this process, which says by a byte that it is done and waits; returns its id."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            work()
            os.write(write, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"1"
    os.close(read)
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_folder_that_another_process_holds_is_refused_until_it_ends(tmp_path: Path) -> None:
    held, worker = [], tmp_path / "worker"

    def hold() -> None:
        held.append(hold_folder(tmp_path / "run"))
        held[0].__enter__()
        if (child := os.fork()) == 0:  # as a data worker, it outlives a run that is killed
            signal.pause()
        worker.write_text(str(child))

    holder = in_another_process(hold)
    try:
        message = rf"run: another run is writing there \(process {holder}\). Wait for it or stop it, or choose another"
        with pytest.raises(DataError, match=message), hold_folder(tmp_path / "run"):
            pass
        with hold_folder(tmp_path / "other"):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with hold_folder(tmp_path / "run"), hold_folder(tmp_path / "run"):
            assert (tmp_path / "run" / HOLDER_FILE).read_text() == f"{os.getpid()} on {platform.node()}\n"
        assert list((tmp_path / "run").iterdir()) == []
    finally:
        os.kill(int(worker.read_text()), signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_of_many_processes_one_at_a_time_holds_a_folder(tmp_path: Path) -> None:
    """Each tries again and again; whoever holds the folder finds no trace of another holder."""
    mark, counts, children = tmp_path / "inside", tmp_path / "counts", []
    counts.mkdir()
    for number in range(4):
        if (child := os.fork()) == 0:
            held = overlaps = 0
            end = time.monotonic() + 3
            while time.monotonic() < end:
                with contextlib.suppress(DataError), hold_folder(tmp_path / "run"):
                    try:
                        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                        mark.unlink()
                        held += 1
                    except OSError:
                        overlaps += 1
            (counts / str(number)).write_text(f"{held} {overlaps}")
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    found = [tuple(map(int, path.read_text().split())) for path in counts.iterdir()]
    assert len(found) == 4
    assert sum(held for held, _ in found) > 10
    assert sum(overlaps for _, overlaps in found) == 0


def test_a_holder_on_another_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(lock: FileLock, **_: Any) -> None:
        raise Timeout(lock.lock_file)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr("filelock.FileLock.acquire", busy)
    for holder, shown in {"77 on nodeA\n": "77 on nodeA", f"77 on {platform.node()}\n": "77"}.items():
        (tmp_path / "run" / HOLDER_FILE).write_text(holder)
        with pytest.raises(DataError, match=rf"another run is writing there \(process {shown}\)"):
            hold_folder(tmp_path / "run").__enter__()


def test_a_drive_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", fail)
    with pytest.warns(UserWarning, match="cannot be locked .*start no second run"), hold_folder(tmp_path / "run"):
        pass


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no users")
def test_a_read_only_folder_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name) / "run", os.geteuid()
        folder.mkdir()
        Path(name).chmod(0o755)
        folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            with pytest.raises(DataError, match=r"cannot be written to \(.*Permission denied.*make it writable"):
                hold_folder(folder).__enter__()
        finally:
            os.seteuid(user)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"output_dir=.*file/run: cannot be written to .*Choose another output_dir"):
        hold_folder(tmp_path / "file" / "run").__enter__()


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    settings = {"max_train_steps": 3, "checkpointing_steps": 1}
    first = RecipeProcess("lora_finetune", tmp_path, **settings, stall="checkpoint-1")  # hangs in its checkpoint
    first.reach(lambda: any(tmp_path.glob(".*checkpoint-1*/*.half")))
    try:
        before = files(tmp_path)
        second = RecipeProcess("lora_finetune", tmp_path, **settings, overwrite_output_dir=True)
        assert second.wait() > 0
        assert f"another run is writing there (process {first.process.pid})" in second.output
        assert files(tmp_path) == before
    finally:
        first.signal(signal.SIGKILL)
        first.wait()


def test_only_what_a_run_left_itself_is_removed(tmp_path: Path) -> None:
    own = [".checkpoint-4.77.partial", ".checkpoint-3.77.removed", "..checkpoint-4.77.partial.0123abcd.tmp"]
    own += [
        ".checkpoint-4.partial",
        ".checkpoint-3.removed",
        "..checkpoint-4.partial.0123abcd.tmp",
    ]  # of older releases
    foreign = [".git-checkpoint-mine", ".checkpoint-notes", ".checkpoint-x.partial", ".checkpoint-4.partial.bak"]
    for name in own + foreign:
        (tmp_path / name).mkdir()
    (tmp_path / ".my-checkpoint-backup").symlink_to(tmp_path / ".git-checkpoint-mine")
    (tmp_path / ".checkpoint-5.partial").symlink_to(tmp_path / ".git-checkpoint-mine")
    (tmp_path / ".checkpoint-6.partial").touch()
    checkpoint.prune_checkpoints(tmp_path, None)
    left = {*foreign, ".my-checkpoint-backup", ".checkpoint-5.partial", ".checkpoint-6.partial"}
    assert {path.name for path in tmp_path.iterdir()} == left
