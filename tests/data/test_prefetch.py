"""Batches on the device: images of 8 bits become the same floats, and on CUDA the copies run one batch ahead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import cameo.data.prefetch as prefetch
from cameo.correspondence import Correspondence
from cameo.data.batches import to_device
from cameo.data.prefetch import on_device
from cameo.scenes.views import images_to_bytes, images_to_float

CPU = torch.device("cpu")


def test_all_256_values_survive_the_way_to_bytes_and_back() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    floats = images_to_float(values)
    assert torch.equal(floats, values.double().div(255).float())  # the float nearest to each
    assert torch.equal(images_to_bytes(floats), values)
    for other in (floats[:9] + 1e-7, torch.tensor([0.5]), torch.tensor([1.1]), torch.tensor([-1 / 255])):
        assert images_to_bytes(other) is other
    nan = torch.tensor([float("nan"), 0.0])
    assert images_to_bytes(nan) is nan


def test_images_become_floats_on_the_device_and_nothing_else_does() -> None:
    images = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    mask = torch.ones(2, dtype=torch.uint8)
    moved = to_device({"images": images, "mask": mask, "key": ["a", "b"]}, CPU)
    assert torch.equal(moved["images"], images_to_float(images))
    assert moved["mask"].dtype == torch.uint8
    assert moved["key"] == ["a", "b"]
    floats = torch.rand(2, 3, 3, 8, 8)
    assert torch.equal(to_device({"images": floats}, CPU)["images"], floats)


def test_on_a_cpu_batches_are_moved_when_they_are_asked_for() -> None:
    taken = []

    def batches() -> Iterator[dict[str, Any]]:
        for number in range(3):
            taken.append(number)
            yield {"images": torch.full((1, 1, 3, 2, 2), number, dtype=torch.uint8)}

    found = on_device(batches(), CPU)
    assert next(found)["images"].max() == 0
    assert taken == [0]
    assert [round(float(batch["images"].max() * 255)) for batch in found] == [1, 2]


class Device:
    """Records what is asked of CUDA, in order; tensors stay where they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        main = type("Main", (), {"wait_stream": lambda _, other: self.log.append(f"main waits for {other}")})()
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
        monkeypatch.setattr(torch.cuda, "stream", self._within)
        monkeypatch.setattr(prefetch, "to_device", self._moved)
        monkeypatch.setattr(prefetch, "_record", lambda batch, stream: self.log.append(f"record {batch['number']}"))

    @contextmanager
    def _within(self, stream: str) -> Iterator[None]:
        self.log.append(f"begin {stream}")
        yield
        self.log.append(f"end {stream}")

    def _moved(self, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        self.log.append(f"copy {batch['number']}")
        return batch


def test_on_cuda_the_next_batch_is_copied_before_a_step_and_waited_for_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(monkeypatch)
    for batch in on_device(({"number": number} for number in range(3)), torch.device("cuda")):
        device.log.append(f"step {batch['number']}")

    def copied(number: int) -> list[str]:
        return ["begin side", f"copy {number}", "end side"]

    def waited(number: int) -> list[str]:
        return ["main waits for side", f"record {number}"]

    expected = [*copied(0), *waited(0), *copied(1), "step 0", *waited(1), *copied(2), "step 1", *waited(2), "step 2"]
    assert device.log == expected


def test_on_cuda_no_batch_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    Device(monkeypatch)
    assert list(on_device([], torch.device("cuda"))) == []


def test_every_tensor_of_a_batch_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice(torch.Tensor):
        device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]

    recorded: list[int] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: recorded.append(self.numel()))
    match = Correspondence(torch.full((1, 2, 2, 4), -1), ((2, 2), (2, 2)), distance=torch.zeros(1, 2, 2, 4))
    monkeypatch.setattr(Correspondence, "device", property(lambda self: torch.device("cuda")))
    image = torch.zeros(3).as_subclass(OnDevice)
    prefetch._record({"images": image, "correspondences": [match], "key": ["a"], "host": torch.zeros(2)}, "main")
    assert recorded == [3, 16, 16]


def test_matches_are_pinned_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    index = torch.full((1, 2, 2, 4), -1)
    found = Correspondence(index, ((2, 2), (2, 2)), match_weight=torch.ones(1, 2, 2, 4)).pin_memory()
    assert {id(tensor) for tensor in pinned} == {id(found.index), id(found.match_weight)}
    assert found.distance is None
    assert found.token_grids == ((2, 2), (2, 2))
