"""Two machines, which are network namespaces with folders of their own: ranks that are exchanged, and a lost process.

`benchmarks/reliability/machines.py` is the long form.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.reliability.kills import difference, newest
from benchmarks.reliability.machines import (
    PATIENCE,
    PRECOMPUTE,
    RUN,
    STEPS,
    TRAINING,
    disturbed,
    finished,
    kill,
    last_words,
    written,
)
from benchmarks.reliability.namespaces import (
    Machine,
    cannot_join_machines,
    exchange_addresses,
    joined_machines,
    one_machine,
)

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run of two processes of one machine."""
    with one_machine(tmp_path_factory.mktemp("undisturbed")) as machine:
        finished([machine], RUN, processes=2)
    return machine.folder / "run"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Machine]]:
    if reason := cannot_join_machines():
        pytest.skip(reason)
    with joined_machines(tmp_path) as machines:
        yield machines


def test_a_killed_process_ends_the_other_machine_and_the_run_goes_on_with_the_ranks_exchanged(
    pair: list[Machine], undisturbed: Path
) -> None:
    killed = disturbed(pair, RUN, kill(1, signal.SIGKILL))
    first, second = pair
    last = newest(first.folder / "run")  # 4, or more where this process was kept waiting
    ends = [*killed.processes.values(), *killed.launchers]
    assert all(end is not None and end < 60 for end in ends), killed
    words = last_words(pair[0])
    assert any(
        "process 1 (" in word
        and f"Start it again on all machines, with resume_from_checkpoint=latest (checkpoint-{last})" in word
        for word in words
    ), words
    assert written(first)[f"run/checkpoint-{last}"]
    assert not any(place.startswith("run") for place in written(second))

    order = exchange_addresses(pair)
    finished(order, {**RUN, "resume_from_checkpoint": "latest"})
    assert difference(second.folder / "run", undisturbed) is None
    places = {place for place in written(second) if place.startswith("run/")}
    assert places == {f"run/checkpoint-{step}" for step in range(last, STEPS + 1, 2)}
    places = {place for place in written(first) if place.startswith("run/")}
    assert places == {f"run/checkpoint-{step}" for step in range(2, last + 1, 2)}


def test_matches_that_two_machines_compute_into_a_shared_folder_are_those_of_a_run(
    pair: list[Machine], undisturbed: Path, tmp_path: Path
) -> None:
    settings = {**RUN, "precomputed_correspondence": str(tmp_path / "drive")}
    finished(pair, settings, module=PRECOMPUTE)
    # A shard of each machine.
    assert len({path.name.split("-")[1] for path in (tmp_path / "drive").glob("matches-*.safetensors")}) == 2
    finished(pair, settings)
    metrics = pair[0].folder / "run" / "metrics.jsonl"
    assert metrics.read_text() == (undisturbed / "metrics.jsonl").read_text()


def test_a_machine_that_fails_at_the_start_is_named_on_the_other_one(pair: list[Machine]) -> None:
    first, second = pair
    launchers = [
        first.launch(TRAINING, RUN, machines=pair),
        second.launch(TRAINING, {**RUN, "train_data_dir": "nowhere"}, machines=pair),
    ]
    assert all(launcher.wait(PATIENCE) != 0 for launcher in launchers)
    (word,) = last_words(first)
    assert "process 1 (" in word
    assert "has ended with DataError: " in word
    assert "nowhere" in word


def test_a_process_that_hangs_ends_the_others(tmp_path: Path) -> None:
    with one_machine(tmp_path) as machine:
        hung = disturbed(
            [machine], {**RUN, "process_timeout": 10}, kill(1, signal.SIGSTOP), processes=2, steps=2, limit=80
        )
    end = hung.processes[0]
    assert end is not None
    assert end < 60
    named = [
        re.search(r"process 1 \(.*\) is lost: its last sign of life came (\d+) s ago", word) for word in hung.words
    ]
    assert any(one is not None and int(one[1]) >= 10 for one in named), hung
