"""A head that no optimizer holds is noticed in the first steps, and there are no false alarms."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import cameo
from cameo import Correspondence
from cameo.alignment.head_watch import PATIENCE
from tests.helpers.models import GRID, JointModel, frames, next_view

ENOUGH = PATIENCE + 3
MISSING = r"alignment head did not change in 10 optimizer steps.*built before cameo\.wrap.*wrapped\.parameters\(\)"


@pytest.fixture(autouse=True)
def _silence_is_tested() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the alignment head")
        yield


def wrapped(base: nn.Module, **options: Any) -> cameo.CameoModel:
    return cameo.wrap(base, layer="joint", layout="b (v h w)", **options).train()


def match() -> Correspondence:
    return next_view(views=2, grid=GRID)


def train(model: Any, optimizer: Any, steps: int = ENOUGH, *, accumulate: int = 1, owner: Any = None) -> None:
    owner = owner or model
    for step in range(steps * accumulate):
        output = model(frames(views=2), num_frames=2, correspondence=match())
        (output.square().mean() + 0.1 * owner.alignment_loss).backward()
        if step % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_built_before_wrap_is_noticed_once(kind: Any) -> None:
    base = JointModel()
    optimizer = kind(base.parameters(), lr=1e-3)
    model = wrapped(base)
    train(model, optimizer, PATIENCE)
    with pytest.warns(UserWarning, match=MISSING) as seen:
        train(model, optimizer)
    assert len(seen) == 1


def test_the_cure_that_the_warning_names_is_one() -> None:
    base = JointModel()
    optimizer = torch.optim.SGD(base.parameters(), lr=1e-3)
    model = wrapped(base)
    optimizer.add_param_group({"params": model.alignment_heads.parameters()})
    train(model, optimizer)


@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"foreach": False}, {"fused": True}, {"weight_decay": 0.0, "amsgrad": True}],
    ids=str,
)
def test_optimizers_that_hold_the_head_give_no_alarm(options: dict[str, Any]) -> None:
    model = wrapped(JointModel())
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3, **options))


def test_gradient_accumulation_gives_no_alarm() -> None:
    model = wrapped(JointModel())
    train(model, torch.optim.SGD(model.parameters(), lr=1e-3), steps=2, accumulate=64)


def test_accumulated_steps_without_the_head_are_noticed_all_the_same() -> None:
    base = JointModel()
    optimizer = torch.optim.SGD(base.parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match=MISSING):
        train(wrapped(base), optimizer, accumulate=3)


def frozen(model: cameo.CameoModel) -> cameo.CameoModel:
    model.alignment_heads.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda base: frozen(wrapped(base)),
        lambda base: wrapped(base, head="mean"),
        lambda base: wrapped(base, head="none"),
    ],
    ids=["frozen", "mean", "none"],
)
def test_a_head_that_has_nothing_to_train_gives_no_alarm(build: Any) -> None:
    base = JointModel()
    optimizer = torch.optim.SGD(base.parameters(), lr=1e-3)
    train(build(base), optimizer)


def test_a_loss_that_is_only_watched_gives_no_alarm() -> None:
    base = JointModel()
    optimizer = torch.optim.SGD(base.parameters(), lr=1e-3)
    model = wrapped(base)
    for _ in range(ENOUGH):
        model(frames(views=2), num_frames=2, correspondence=match()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["eval", "no_grad"])
def test_measuring_gives_no_alarm(how: str) -> None:
    """An average of the weights that is measured changes between the measurements, and its head is never trained."""
    model = wrapped(JointModel()).train(how != "eval")
    for _ in range(ENOUGH):
        with torch.set_grad_enabled(how != "no_grad"):
            model(frames(views=2), num_frames=2, correspondence=match())
        if how == "eval":
            model.alignment_loss.backward()
        with torch.no_grad():
            for parameter in model.base_model.parameters():
                parameter.mul_(0.99)


def test_two_optimizers_in_turn_give_no_alarm() -> None:
    model = wrapped(JointModel())
    one, other = (torch.optim.SGD(part.parameters(), lr=1e-3) for part in (model.base_model, model.alignment_heads))
    for _ in range(3):
        train(model, one, 5)
        train(model, other, 1)


def test_a_head_that_is_changed_through_its_data_gives_no_alarm() -> None:
    model = wrapped(JointModel())
    optimizer = torch.optim.SGD(model.base_model.parameters(), lr=1e-3)
    for _ in range(ENOUGH):
        train(model, optimizer, 1)
        for parameter in model.alignment_heads.parameters():
            parameter.data.mul_(0.99)


def test_a_copy_watches_for_itself() -> None:
    base = JointModel()
    optimizer = torch.optim.SGD(base.parameters(), lr=1e-3)
    model = wrapped(base)
    train(model, optimizer, PATIENCE - 1)
    other = copy.deepcopy(model)
    train(other, torch.optim.SGD(other.parameters(), lr=1e-3))
    blind = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=MISSING):
        train(blind, torch.optim.SGD(blind.base_model.parameters(), lr=1e-3))


def test_compiled_and_parallel_models_are_watched(tmp_path: Any) -> None:
    torch.compiler.reset()
    base = JointModel()
    optimizer = torch.optim.SGD(base.parameters(), lr=1e-3)
    model = wrapped(base)
    with pytest.warns(UserWarning, match=MISSING):
        train(torch.compile(model, backend="eager"), optimizer, owner=model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for forgetful in (False, True):
            base = JointModel()
            optimizer = torch.optim.SGD(base.parameters(), lr=1e-3)
            model = wrapped(base)
            parallel = nn.parallel.DistributedDataParallel(model)
            if not forgetful:
                optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-3)
                train(parallel, optimizer, owner=model)
                continue
            with pytest.warns(UserWarning, match=MISSING):
                train(parallel, optimizer, owner=model)
    finally:
        torch.distributed.destroy_process_group()


def test_the_watch_ends_at_the_first_change_and_holds_nothing() -> None:
    model = wrapped(JointModel())
    train(model, torch.optim.SGD(model.parameters(), lr=1e-3), 2)
    assert model._watch.ended
    assert not model._watch._head
    model(frames(views=2), num_frames=2, correspondence=match())
    assert not model.alignment_loss._backward_hooks
