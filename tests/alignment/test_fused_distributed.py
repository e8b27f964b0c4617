"""The fused loss in two processes: replicated (DDP) and sharded (FSDP2) models have the gradients of one process."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

import cameo
from cameo import Correspondence
from tests.helpers.wrapped_models import LAYER, Toy, matches, nothing_visible, tokens

Result = dict[str, Tensor]
SEEDS = (0, 1)


class Checkpointed(Toy):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def model_of(kind: type[nn.Module] = Toy, *, reduction: str = "sum", **options: Any) -> cameo.CameoModel:
    """The same weights in every process."""
    torch.manual_seed(0)
    return cameo.wrap(kind().double(), layer=LAYER, layout="b (v h w)", reduction=reduction, **options).double()


def samples_of(rank: int, empty: bool) -> tuple[Tensor, Correspondence]:
    match = nothing_visible() if rank and empty else matches(seed=SEEDS[rank])
    return tokens(seed=SEEDS[rank]).double(), match


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def step(run: Callable[..., Tensor], model: cameo.CameoModel, x: Tensor, match: Correspondence) -> Result:
    """Loss and gradients; those of the processes add up for sums, and have the whole batch's as mean for means."""
    model.zero_grad()
    if model.cameo_config.reduction == "sum":
        out = run(x, correspondence=match)
        (out.square().sum() + model.alignment_loss).backward()
    else:
        totals = model.match_totals(match)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
            totals /= 2
        out = run(x, correspondence=match, match_totals=totals)
        (out.square().mean() + model.alignment_loss).backward()
    found = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": model.alignment_loss.detach(), **found}


def replicated(reduction: str = "sum") -> tuple[Any, cameo.CameoModel]:
    model = model_of(reduction=reduction)
    return nn.parallel.DistributedDataParallel(model), model


def sharded(*parts: str, kind: type[nn.Module] = Toy, **options: str) -> Callable[[], tuple[Any, cameo.CameoModel]]:
    def build() -> tuple[Any, cameo.CameoModel]:
        model = model_of(kind, **options)
        mesh = init_device_mesh("cpu", (2,))
        for part in parts:
            for module in model.get_submodule(part).children():
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model.alignment_heads[0], FSDPModule) == ("alignment_heads" in parts)
        return model, model

    return build


BLOCKS, HEADS = "base_model.blocks", "alignment_heads"
WAYS: dict[str, Callable[[], tuple[Any, cameo.CameoModel]]] = {
    "DDP": replicated,
    "FSDP root": sharded(),
    "FSDP blocks, checkpointed": sharded(BLOCKS, kind=Checkpointed),
    "FSDP blocks and heads": sharded(BLOCKS, HEADS),
    "FSDP blocks, reference": sharded(BLOCKS, implementation="reference"),
    "DDP, mean": lambda: replicated("mean"),
    "FSDP blocks, mean": sharded(BLOCKS, reduction="mean"),
}


def train(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=100)
    )
    try:
        found: dict[tuple[str, bool], Result] = {}
        for name, build in WAYS.items():
            run, model = build()
            for empty in (False, True):
                found[name, empty] = step(run, model, *samples_of(rank, empty))
        _, model = sharded(HEADS, implementation="reference")()
        with pytest.raises(ValueError, match=r"head: is sharded on its own.*implementation=\"auto\""):
            model(*samples_of(rank, False)[:1], correspondence=matches())
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, bool], Result]]:
    """Return the results of each of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    other = torch.multiprocessing.get_context("spawn").Process(target=train, args=(1, str(folder)))
    other.start()
    try:
        train(0, str(folder))
        other.join(timeout=100)
        assert other.exitcode == 0
    finally:
        other.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in SEEDS]


@pytest.mark.parametrize("empty", [False, True], ids=["matches in both", "matches in one"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_one_process_on_all_samples(
    way: str, empty: bool, processes: list[dict[tuple[str, bool], Result]]
) -> None:
    (first, first_match), (second, second_match) = (samples_of(rank, empty) for rank in SEEDS)
    model = model_of(reduction="mean" if way.endswith("mean") else "sum")
    joined = Correspondence(torch.cat([first_match.index, second_match.index]), first_match.token_grids)
    expected = step(model, model, torch.cat([first, second]), joined)
    found = [process[way, empty] for process in processes]
    assert (found[1]["loss"] == 0) == empty
    parts = 2 if way.endswith("mean") else 1
    loss = (found[0]["loss"] + found[1]["loss"]) / parts
    torch.testing.assert_close(loss, expected.pop("loss"), rtol=1e-12, atol=0)
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        # Both take the mean over the processes. The gradient of the key's bias is 0 up to rounding.
        torch.testing.assert_close(2 / parts * found[0][name], gradient, rtol=1e-11, atol=1e-14)
        assert torch.equal(found[0][name], found[1][name])
