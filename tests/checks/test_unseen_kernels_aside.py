"""The search for unseen attention leaves no trace in a training, says what it cannot tell, and ends."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cameo
from cameo import CameoModel, Correspondence, TokenLayout
from cameo.errors import CaptureError
from tests.helpers.attention_kernels import HEADS, beside_unseen, sdpa
from tests.helpers.captured_models import WIDTH, Attention

SAMPLES, VIEWS, GRID = 2, 3, (2, 2)
INDEX = torch.full((SAMPLES, VIEWS, VIEWS, 4), -1)
INDEX[:, 0, 1] = torch.tensor([3, 1, 0, 2])
MATCHES = Correspondence(INDEX, (GRID,) * VIEWS)


class Rich(nn.Module):
    """Attention with a norm, a gate, dropout and a residual inside, which counts its runs and keeps its output."""

    heads = HEADS

    def __init__(self, kernel: Callable[..., Tensor] = sdpa) -> None:
        super().__init__()
        self.norm, self.gate, self.attention = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1), Attention(kernel)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.latest = self.attention(self.norm(x)) * self.gate(x).sigmoid()
        return x + self.dropout(self.latest)


class Model(nn.Module):
    def __init__(self, layer: nn.Module, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed, self.layer, self.checkpointed = nn.Linear(WIDTH, WIDTH), layer, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return checkpoint(self.layer, x, use_reentrant=False) if self.checkpointed else self.layer(x)


def tokens() -> Tensor:
    return torch.randn(SAMPLES, VIEWS * 4, WIDTH, generator=torch.Generator().manual_seed(3))


def wrapped(layer: nn.Module, layout: TokenLayout | str = "b (v h w)", **options: Any) -> CameoModel:
    return cameo.wrap(Model(layer, **options), layer="layer", layout=layout, heads=HEADS, head="mean")


def answer(model: CameoModel) -> str:
    model(tokens(), correspondence=MATCHES)
    return model._unseen.answers["layer"]


@pytest.mark.parametrize("way", ["plain", "checkpointed", "autocast"])
def test_a_training_step_is_the_same_with_and_without_the_check(way: str) -> None:
    steps = []
    for check in (True, False):
        torch.manual_seed(0)
        layer = Rich()
        model = wrapped(layer, checkpointed=way == "checkpointed")
        model.check_unseen = check
        seen: list[Tensor] = []
        layer.attention.to_q.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1]))
        with torch.autocast("cpu", torch.bfloat16) if way == "autocast" else nullcontext():
            output = model(tokens(), correspondence=MATCHES)
        runs, latest = layer.runs.clone(), layer.latest.detach()
        assert len(seen) == runs == 1
        (output.square().mean() + model.alignment_loss).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient is not None for gradient in gradients)
        steps.append([output, latest, model.alignment_loss, torch.get_rng_state(), *gradients])
        assert model._unseen.answers == ({"layer": ""} if check else {})
    assert all(map(torch.equal, *steps))


def test_it_looks_once_and_only_in_training() -> None:
    runs: list[int] = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        runs.append(1)
        return sdpa(q, k, v)

    model = wrapped(Attention(counted))
    with torch.no_grad():
        model(tokens(), correspondence=MATCHES)
    model.eval()(tokens(), correspondence=MATCHES)
    model.train()(tokens())
    assert len(runs) == 3
    for _ in range(3):
        model(tokens(), correspondence=MATCHES)
    assert len(runs) == 3 + 3 + 6


def test_what_is_found_stays_refused_until_it_is_cured_or_known() -> None:
    layer = Rich(beside_unseen(sdpa))
    model = wrapped(layer)
    for _ in range(3):
        with pytest.raises(CaptureError, match="another attention runs unseen in this module"):
            model(tokens(), correspondence=MATCHES)
    model.check_unseen = False
    model(tokens(), correspondence=MATCHES)
    model.check_unseen = True
    layer.attention.kernel = sdpa
    assert answer(model) == ""


class Projected(Attention):
    """With a projection of its output that starts from zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.to_out = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.to_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(super().forward(x))


class NormalizedTogether(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=1, keepdim=True))


class MixedAfterwards(Attention):
    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        return output + output.mean(dim=1, keepdim=True)


class FromElsewhere(Attention):
    """Takes its tokens from no argument."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(tokens()) + 0 * x


class OnlyOnce(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.ran: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.ran.append(1)
        if len(self.ran) == 2:
            raise RuntimeError("a second time")
        return super().forward(x)


OWN_VIEW = TokenLayout("(b v) (h w)", own_view_shows=0)


class WithinViews(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, 4, WIDTH)).view_as(x)


@pytest.mark.parametrize(
    ("layer", "layout", "reason"),
    [
        (Projected, "b (v h w)", "its output does not depend on what the seen call returns"),
        (NormalizedTogether, "b (v h w)", "no argument of the module's forward influences the tokens of some views"),
        (MixedAfterwards, "b (v h w)", "its output mixes the tokens once more after the seen call"),
        (FromElsewhere, "b (v h w)", "no argument of the module's forward influences the tokens of some views"),
        (OnlyOnce, "b (v h w)", "it did not run again: RuntimeError: a second time"),
        (WithinViews, OWN_VIEW, "it attends within each view, and the token grid has fewer than 4 rows"),
    ],
)
def test_what_it_cannot_tell(layer: type[Attention], layout: TokenLayout | str, reason: str) -> None:
    assert answer(wrapped(layer(), layout)).startswith(reason)


def test_it_looks_again_where_it_could_not_tell() -> None:
    layer = Projected()
    model = wrapped(layer)
    answers = []
    for _ in range(4):
        answers.append(answer(model))
        nn.init.eye_(layer.to_out.weight)
    assert answers[0]
    assert answers[1:] == [""] * 3


def test_a_model_pickled_before_there_was_a_check() -> None:
    model = wrapped(Attention())
    state = model.__getstate__()
    del state["_unseen"], state["check_unseen"]
    old = CameoModel.__new__(CameoModel)
    old.__setstate__(state)
    assert answer(old) == ""
    again = pickle.loads(pickle.dumps(old))
    assert again.check_unseen
    assert again._unseen.answers == {"layer": ""}
