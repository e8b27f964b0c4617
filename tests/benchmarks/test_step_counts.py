"""What CAMEO adds to a step on an accelerator: launches and waits of the host, counted on a pretended device."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.step import pretend_device
from benchmarks.step.pretend_device import NAME, PretendDevice
from cameo.alignment.supervision import check_matches
from tests.helpers.pretended_steps import run_apart

pytestmark = pytest.mark.skipif(not pretend_device.available(), reason="devices made in Python need torch 2.10")

# Launches of a step with matches: beside the portions of the sweep, and for each of them.
LAUNCHES, LAUNCHES_OF_A_PORTION = 86, 12
# Where the host waits for what CAMEO needs: it reads how many rows there are, which were counted before the forward.
WAITS = ["cameo/memory.py"]
# Waits of a step of the trainer, with what does not need CAMEO: batches, noise, checks of cameras, the figures of the
# step.
WAITS_OF_A_STEP = 10


def test_mixed_devices_are_refused_and_waits_are_counted_with_their_line() -> None:
    index = torch.tensor([[[-1, -1], [0, 1]], [[1, 5], [-1, -1]]])[None]
    with PretendDevice() as device:
        ours = torch.ones(2, 2).to(NAME)
        with pytest.raises(RuntimeError, match=f"mixes {NAME} and cpu"):
            ours @ torch.ones(2, 2)
        device.clear()
        assert ((ours + ours).sum() > 0).item()
        assert device.launches["other"]["aten::add"] == 1
        assert device.launches["other"]["aten::view"] == 0
        device.clear()
        with device.part("mine"), pytest.raises(ValueError, match=r"index\[0, 1, 0, 1\]"):
            check_matches(index.to(NAME), ((1, 2), (1, 2)))
        assert set(device.syncs) == {"mine"}
        assert any("cameo/alignment/supervision.py" in line for line in device.syncs["mine"])


def files(waits: Counter[str]) -> list[str]:
    return [line.split(" at ")[1].split(":")[0] for line in waits.elements()]


def check(path: Path, *size: str, portions: int) -> tuple[int, int]:
    pytest.importorskip("triton", reason="Triton is not installed")
    run_apart("benchmarks.step.counts", *size, "--output", str(path))
    (found,) = json.loads(path.read_text()).values()
    waits = sum((Counter(part) for part in found["syncs"].values()), Counter())
    assert files(waits) == WAITS, waits
    assert found["launches"]["sweep"]["softmax_kernel"] == portions
    launches = sum(sum(part.values()) for part in found["launches"].values())
    assert launches <= LAUNCHES + portions * LAUNCHES_OF_A_PORTION, found["launches"]
    return launches, waits.total()


def test_a_step_with_matches_waits_once_and_launches_little(tmp_path: Path) -> None:
    size = ["--batch", "1", "--views", "3", "--grid", "8", "--resolution", "64"]
    check(tmp_path / "counts.json", *size, portions=1)


@pytest.mark.long
def test_the_setting_of_the_paper_takes_at_most_200_launches(tmp_path: Path) -> None:
    launches, waits = check(tmp_path / "counts.json", portions=12)
    assert launches <= 200
    assert waits <= 2


def test_a_step_of_the_trainer_waits_once_more_than_without_cameo() -> None:
    without, aligned = map(Counter, json.loads(run_apart("tests.helpers.pretended_steps")))
    more = aligned - without
    assert files(more) == WAITS, more
    assert aligned.total() <= WAITS_OF_A_STEP, aligned
