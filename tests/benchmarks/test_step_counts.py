"""What CAMEO adds to a step on an accelerator: launches and waits of the host, counted on a pretended device."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.step import pretend_device
from benchmarks.step.pretend_device import NAME, PretendDevice
from cameo.alignment.supervision import check_matches
from cameo.processes.stopping import StopSignal
from cameo.training.data import StepSampler, training_batches
from tests.helpers.training_runs import fresh_accelerate, make_trainer

pytestmark = pytest.mark.skipif(not pretend_device.available(), reason="devices made in Python need torch 2.10")

# Launches of a step with matches: beside the portions of the sweep, and for each of them.
LAUNCHES, LAUNCHES_OF_A_PORTION = 75, 14
# Where the host waits for what CAMEO needs: it reads how many rows there are, which were counted before the forward.
WAITS = ["cameo/memory.py"]


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


@pytest.fixture
def counts() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    from benchmarks.step import counts

    return counts


def added(found: dict[str, dict[str, dict[str, int]]], kind: str) -> int:
    return sum(count for part in found[kind].values() for count in part.values())


def check(found: dict[str, dict[str, dict[str, int]]], portions: int) -> None:
    waits = [line for part in found["syncs"].values() for line, count in part.items() for _ in range(count)]
    assert [line.split(" at ")[1].split(":")[0] for line in waits] == WAITS, waits
    assert found["launches"]["sweep"]["softmax_kernel"] == portions
    assert added(found, "launches") <= LAUNCHES + portions * LAUNCHES_OF_A_PORTION, found["launches"]


def test_a_step_with_matches_waits_once_and_launches_little(counts: ModuleType, tmp_path: Path) -> None:
    size = ["--batch", "1", "--views", "3", "--grid", "8", "--resolution", "64"]
    assert counts.main([*size, "--output", str(tmp_path / "counts.json")]) == 0
    (found,) = json.loads((tmp_path / "counts.json").read_text()).values()
    check(found, portions=1)


@pytest.mark.slow
def test_the_setting_of_the_paper_takes_at_most_200_launches(counts: ModuleType, tmp_path: Path) -> None:
    assert counts.main(["--output", str(tmp_path / "counts.json")]) == 0
    (found,) = json.loads((tmp_path / "counts.json").read_text()).values()
    check(found, portions=6)
    assert added(found, "launches") <= 200
    assert added(found, "syncs") <= 2


def test_a_step_of_the_trainer_waits_once_more_than_without_cameo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", NAME)
    waits = []
    for loss_weight in (0.0, 0.1):
        with PretendDevice() as device, fresh_accelerate():
            trainer = make_trainer(tmp_path / str(loss_weight), loss_weight=loss_weight)
            trainer.output_dir.mkdir()
            trainer.model.check_unseen = False  # is repeated ever more rarely
            sampler = StepSampler(start=0, stop=2, batch_size=trainer.config.train_batch_size)
            trainer.prepared.train()
            with (
                StopSignal() as stop,
                training_batches(trainer.dataset, sampler, trainer.config, trainer.device) as batches,
            ):
                for _ in range(2):
                    device.clear()
                    trainer._train_step(batches, stop)
            waits.append(sum(device.syncs.values(), start=type(device.syncs["other"])()))
    more = waits[1] - waits[0]
    assert [line.split(" at ")[1].split(":")[0] for line in more] == WAITS, more
    assert more.total() == 1
    assert waits[1].total() <= 13, waits[1]
