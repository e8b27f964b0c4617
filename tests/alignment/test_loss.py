"""The alignment loss against golden values, a dense version and closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cameo.alignment import AlignmentHead, alignment_loss, supervision_weights
from cameo.correspondence import Correspondence
from tests.helpers.alignment_inputs import (
    PADDED,
    dense_loss,
    explicit_head,
    gradients,
    make_head,
    make_inputs,
    relative_error,
)

ASSETS = Path(__file__).parents[1] / "assets"


class Golden:
    """Values of the published method from one file; `distance` is computed from the resampled point maps."""

    def __init__(self, path: Path) -> None:
        data = {name: torch.as_tensor(value) for name, value in np.load(path).items()}
        views, (height, width) = data["index"].shape[1], data["size"].tolist()
        index = torch.where(data["visible"], data["index"], -1)
        index[:, range(views), range(views)] = -1
        points = F.interpolate(data["point_map"].flatten(0, 1), (height, width), mode="bilinear")
        points = points.unflatten(0, (-1, views)).flatten(3)
        difference = points[:, :, None, :, :, None] - points[:, None, :, :, None, :]
        distance = difference.square().sum(3).amin(-1).sqrt()
        self.match = Correspondence(index, ((height, width),) * views, distance=distance)
        self.query, self.key = (
            data[name].unflatten(2, (views, height * width)).requires_grad_() for name in ("query", "key")
        )
        self.head = AlignmentHead(self.query.shape[1]).double()
        with torch.no_grad():
            self.head.hidden[0].weight.copy_(data["w1"])
            self.head.hidden[0].bias.copy_(data["b1"])
            self.head.output.weight.copy_(data["w2"])
        self.data, self.scale = data, float(data["scale"])


@pytest.fixture(params=["room_3views", "room_4views"])
def scene(request: pytest.FixtureRequest) -> Golden:
    asset = ASSETS / f"{request.param}.npz"
    return Golden(asset if asset.exists() else request.getfixturevalue("golden")(request.param))


# Worst values seen in float64: 3e-16 for the loss, 2e-15 for the gradients.
def test_golden_paper(scene: Golden) -> None:
    data, match = scene.data, scene.match
    assert int(match.matched.sum()) == data["num_pairs"]
    loss = alignment_loss(scene.query, scene.key, match, scene.head, scale=scene.scale)
    loss.backward()
    assert loss.item() == pytest.approx(data["loss_paper"].item(), rel=1e-9)
    assert relative_error(scene.query.grad, data["grad_query_paper"]) < 1e-9
    assert relative_error(scene.key.grad, data["grad_key_paper"]) < 1e-9
    assert relative_error(scene.head.hidden[0].weight.grad, data["grad_w1_paper"]) < 1e-9
    assert relative_error(scene.head.output.weight.grad, data["grad_w2_paper"]) < 1e-9


# The published code adds 1e-8 to every probability; worst seen 3e-7 for the loss, 1.4e-6 for the gradients.
def test_golden_released(scene: Golden) -> None:
    data = scene.data
    loss = alignment_loss(
        scene.query,
        scene.key,
        scene.match,
        scene.head,
        scale=scene.scale,
        reduction="released",
        num_reference_views=int(data["cond_views"]),
    )
    loss.backward()
    expected = data["loss_released_reference"] + data["loss_released_target"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(scene.query.grad, data["grad_query_released"]) < 1e-5
    assert relative_error(scene.key.grad, data["grad_key_released"]) < 1e-5


@pytest.mark.parametrize("normalize", ["per_view", "all_views"])
@pytest.mark.parametrize("token_grids", [((2, 3),) * 3, PADDED], ids=["one grid", "four grids"])
@pytest.mark.parametrize("settings", [{}, {"depth": 0}, {"depth": 2}, {"kind": "mean"}, {"kind": "none"}], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_dense_version(
    normalize: str, token_grids: tuple[tuple[int, int], ...], settings: dict[str, Any], weighted: bool
) -> None:
    query, key, match = make_inputs(token_grids=token_grids, weighted=weighted)
    head = make_head(**settings)
    got = alignment_loss(query, key, match, head, scale=0.3, normalize=normalize)
    expected = dense_loss(query, key, match, head, 0.3, normalize)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for one, other in zip(gradients(got, query, key, head), gradients(expected, query, key, head), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("normalize", ["per_view", "all_views"])
def test_pairs_select_query_view_and_key_view(normalize: str) -> None:
    query, key, match = make_inputs()
    head, pairs = make_head(), torch.tensor([[0, 1, 0], [0, 0, 0], [1, 1, 0]]).bool()
    got = alignment_loss(query, key, match, head, scale=0.3, pairs=pairs, normalize=normalize)
    torch.testing.assert_close(got, dense_loss(query, key, match, head, 0.3, normalize, pairs), rtol=1e-12, atol=0)


def test_released_equals_the_loops() -> None:
    query, key, match = make_inputs(weighted=True)
    head, references = make_head(), 1
    assert match.distance is not None
    assert match.match_weight is not None
    total = torch.zeros((), dtype=torch.float64)
    for half in (range(references), range(references, 3)):
        numerator, denominator = torch.zeros((), dtype=torch.float64), 0.0
        for b in range(2):
            for i in half:
                for x in range(6):
                    nearest = min((j for j in range(3) if j != i), key=lambda j: match.distance[b, i, j, x])
                    for j in range(3):
                        target = int(match.index[b, i, j, x])
                        if target < 0:
                            continue
                        weight = match.match_weight[b, i, j, x]
                        denominator += float(weight)
                        if j == nearest:
                            logits = torch.stack([0.5 * key[b, k, j] @ query[b, k, i, x] for k in range(3)])
                            numerator = numerator - weight * explicit_head(head, logits)[0].log_softmax(0)[target]
        total = total + numerator / denominator
    got = alignment_loss(query, key, match, head, reduction="released", num_reference_views=references)
    torch.testing.assert_close(got, total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("references", [0, 3])
def test_released_counts_an_empty_half_as_zero(references: int) -> None:
    query, key, match = make_inputs()
    loss = alignment_loss(query, key, match, make_head(), reduction="released", num_reference_views=references)
    nearest = supervision_weights(match, reduction="released", num_reference_views=references) > 0
    only_nearest = Correspondence(torch.where(nearest, match.index, -1), match.token_grids)
    summed = alignment_loss(query, key, only_nearest, make_head(), reduction="sum")
    torch.testing.assert_close(loss, summed / match.matched.sum(), rtol=1e-12, atol=0)
    assert loss > 0


def test_released_takes_the_nearest_view_before_visibility() -> None:
    index = torch.full((1, 3, 3, 4), -1)
    index[0, 0, 1] = 2
    distance = torch.ones(1, 3, 3, 4)
    distance[0, 0, 2, :3] = 0.5  # the nearest view of tokens 0 to 2 is view 2, where they have no match
    match = Correspondence(index, ((2, 2),) * 3, distance=distance)
    weights = supervision_weights(match, reduction="released", num_reference_views=1)
    assert weights[0, 0, 1].tolist() == [0, 0, 0, 0.25]
    assert weights.sum() == 0.25


@pytest.mark.parametrize("kind", ["mlp", "mean", "none"])
def test_uniform_attention_gives_the_logarithm_of_the_keys(kind: str) -> None:
    _, key, match = make_inputs(token_grids=((2, 3),) * 4)
    head = make_head(kind=kind)
    query = torch.zeros_like(key)
    loss = alignment_loss(query, key, match, head)
    torch.testing.assert_close(loss, torch.tensor(6.0).double().log(), rtol=1e-12, atol=0)
    loss = alignment_loss(query, key, match, head, normalize="all_views")
    torch.testing.assert_close(loss, torch.tensor(18.0).double().log(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalize", ["per_view", "all_views"])
def test_gradcheck(normalize: str) -> None:
    query, key, match = make_inputs(batch=1, token_grids=((1, 3), (2, 2)), dim=2, weighted=True)
    head = make_head()
    names = [name for name, _ in head.named_parameters()]

    def loss(query: Tensor, key: Tensor, *parameters: Tensor) -> Tensor:
        module = make_head()
        for name, parameter in zip(names, parameters, strict=True):
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
            setattr(module.get_submodule(owner), leaf, parameter)
        return alignment_loss(query, key, match, module, normalize=normalize)

    assert torch.autograd.gradcheck(loss, (query, key, *head.parameters()))


def test_default_scale_and_sum() -> None:
    query, key, match = make_inputs()
    head = make_head()
    mean = alignment_loss(query, key, match, head)
    torch.testing.assert_close(mean, alignment_loss(query, key, match, head, scale=4**-0.5), rtol=1e-14, atol=0)
    summed = alignment_loss(query, key, match, head, reduction="sum")
    torch.testing.assert_close(summed, mean * match.matched.sum(), rtol=1e-12, atol=0)


def test_order_of_samples_does_not_matter() -> None:
    query, key, match = make_inputs(batch=3, weighted=True)
    order = [2, 0, 1]
    permuted = Correspondence.cat([match.select(b) for b in order])
    head = make_head()
    loss = alignment_loss(query[order], key[order], permuted, head)
    torch.testing.assert_close(loss, alignment_loss(query, key, match, head), rtol=1e-12, atol=0)


def test_weights_act_like_repetition() -> None:
    query, key, match = make_inputs(batch=1)
    twice = Correspondence.cat([match, match])
    first_twice = torch.where(torch.arange(6) < 2, 2.0, 1.0).expand(match.index.shape)
    weighted = Correspondence(match.index, match.token_grids, first_twice)
    once = twice.index.clone()
    once[1, ..., 2:] = -1
    head = make_head()
    repeated = alignment_loss(
        query.repeat(2, 1, 1, 1, 1), key.repeat(2, 1, 1, 1, 1), Correspondence(once, match.token_grids), head
    )
    torch.testing.assert_close(alignment_loss(query, key, weighted, head), repeated, rtol=1e-12, atol=0)


# bfloat16 holds 8 bits: an input rounded to 2^-9 moves a logit by about 1e-2. float16 holds 11.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_rounds_only_the_inputs(dtype: torch.dtype, tolerance: float) -> None:
    query, key, match = make_inputs(token_grids=((4, 4),) * 3, dim=16)
    head = make_head()
    exact = alignment_loss(query, key, match, head)
    half_query, half_key = query.detach().to(dtype).requires_grad_(), key.detach().to(dtype).requires_grad_()
    single = AlignmentHead(3)
    single.load_state_dict(head.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = alignment_loss(half_query, half_key, match, single)
    assert loss.dtype == torch.float32
    rounded = alignment_loss(half_query.double(), half_key.double(), match, head)
    assert loss.item() == pytest.approx(rounded.item(), rel=1e-6)
    assert loss.item() == pytest.approx(exact.item(), rel=tolerance)
    got, wanted = gradients(loss, half_query, half_key, single), gradients(exact, query, key, head)
    assert [gradient.dtype for gradient in got[:3]] == [dtype, dtype, torch.float32]
    for one, other in zip(got, wanted, strict=True):
        assert relative_error(one.double(), other) < 3 * tolerance


def test_half_precision_head_is_read_in_float32() -> None:
    query, key, match = make_inputs(dtype=torch.bfloat16)
    head = make_head().bfloat16()
    loss = alignment_loss(query, key, match, head)
    wide = alignment_loss(query, key, match, make_head().bfloat16().float())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wide)


def test_one_token_per_view_equals_a_loop() -> None:
    """Temporal attention: one small softmax over the other views per cell and query view."""
    torch.manual_seed(0)
    cells, heads, views = 5, 3, 4
    query, key = (torch.randn(cells, heads, views, 1, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    index = torch.where(torch.rand(cells, views, views, 1) < 0.4, 0, -1)
    index[:, range(views), range(views)] = -1
    index[2] = -1  # a cell without a match
    weight = torch.rand(index.shape, dtype=torch.float64)
    head = AlignmentHead(heads).double()
    match = Correspondence(index, ((1, 1),) * views, match_weight=weight)
    loss = alignment_loss(query, key, match, head, scale=0.3, normalize="all_views")
    total, expected = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for cell in range(cells):
        for i in range(views):
            others = [j for j in range(views) if j != i]
            logits = torch.stack([head(0.3 * (query[cell, :, i, 0] * key[cell, :, j, 0]).sum(-1))[0] for j in others])
            for place, j in enumerate(others):
                if index[cell, i, j, 0] == 0:
                    expected = expected - weight[cell, i, j, 0] * logits.log_softmax(0)[place]
                    total = total + weight[cell, i, j, 0]
    torch.testing.assert_close(loss, expected / total, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, [query, key]) for value in (loss, expected / total)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-15)
    assert not gradients[0][0][2].any()
