"""A head that the optimizer does not hold is noticed within the first steps; a run as it should be stays silent."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cameo
from cameo.head_watch import HeadWatch


class Attention(nn.Module):
    """One joint attention over the tokens of all views."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.project = 2, nn.Linear(8, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.project(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Attention())


def attach(base: nn.Module) -> cameo.CameoModel:
    return cameo.wrap(base, layer="0", layout="b (v h w)")


def train(model: cameo.CameoModel, optimizer: torch.optim.Optimizer, forwards: int = 8, accumulate: int = 1) -> None:
    """Take two views of 2 x 2 tokens, each of which matches the same token of the other view."""
    index = torch.full((1, 2, 2, 4), -1)
    index[0, 0, 1] = index[0, 1, 0] = torch.arange(4)
    match = cameo.Correspondence(index, sizes=((2, 2),) * 2)
    for step in range(1, forwards + 1):
        output = model(torch.randn(1, 8, 8), correspondence=match)
        (output.square().mean() + model.weight * model.alignment_loss).backward()
        if step % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_built_before_wrap_is_noticed_once(kind: type[torch.optim.Optimizer]) -> None:
    base = build()
    optimizer = kind(base.parameters(), lr=0.01)
    model = attach(base)
    start = copy.deepcopy(model.alignment_heads.state_dict())
    with pytest.warns(UserWarning, match=r"built before cameo\.wrap") as caught:
        train(model, optimizer)
    assert len(caught) == 1
    assert all(torch.equal(value, start[name]) for name, value in model.alignment_heads.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"lr": 0.0}])
def test_an_optimizer_built_after_wrap_is_silent(options: dict[str, object]) -> None:
    model = attach(build())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, torch.optim.AdamW(model.parameters(), **options))


@pytest.mark.parametrize("case", ["accumulation", "frozen head", "head without parameters", "evaluation"])
def test_what_is_meant_to_be_is_silent(case: str) -> None:
    base = build()
    optimizer = torch.optim.AdamW(base.parameters())
    model = cameo.wrap(base, layer="0", layout="b (v h w)", head="mean" if case == "head without parameters" else "mlp")
    if case == "frozen head":
        model.alignment_heads.requires_grad_(False)
    if case == "evaluation":
        model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, accumulate=8 if case == "accumulation" else 1)


def test_a_copy_watches_for_itself() -> None:
    base = build()
    optimizer = torch.optim.SGD(base.parameters(), lr=0.01)
    model = attach(base)
    with pytest.warns(UserWarning, match="alignment head has not changed"):
        train(model, optimizer)
    again = copy.deepcopy(model)
    assert isinstance(again._head_watch, HeadWatch)
    with pytest.warns(UserWarning, match="alignment head has not changed"):
        train(again, torch.optim.SGD(again.base_model.parameters(), lr=0.01))
