"""Every row of docs/models.md on a narrow random model of the installed diffusers, attached by the line of the page."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import cameo
from cameo import Correspondence
from cameo.errors import CaptureError
from cameo.probing.ablation import self_view_only
from tests.helpers.catalogue import Entry, Row, noise, rows
from tests.helpers.catalogue_images import IMAGES
from tests.helpers.catalogue_videos import VIDEOS
from tests.helpers.models import GRID, SAMPLES, next_view

ENTRIES = IMAGES | VIDEOS
ROWS = rows()
QUERY, KEY = (2, 1, 3), (0, 2, 1)  # view, row, column


@dataclass
class Attached:
    """A model with CAMEO, and what one forward with a single match gave."""

    entry: Entry
    row: Row
    model: cameo.CameoModel
    inputs: dict[str, Any]
    before: Tensor
    output: Tensor
    loss: Tensor
    hidden: Tensor
    gradients: tuple[Tensor | None, ...]


def sample(output: Any) -> Tensor:
    found = output.sample
    return found if isinstance(found, Tensor) else torch.stack(found)


def build(entry: Entry) -> nn.Module:
    torch.manual_seed(0)
    model = entry.build().eval()
    for parameter in model.parameters():  # norms and gates of a trained model are not ones and zeros
        if parameter.ndim < 2 or not parameter.any():
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
    return model


def one_match(entry: Entry) -> Correspondence:
    index = torch.full((SAMPLES, entry.views, entry.views, GRID[0] * GRID[1]), -1)
    index[-1, QUERY[0], KEY[0], QUERY[1] * GRID[1] + QUERY[2]] = KEY[1] * GRID[1] + KEY[2]
    return Correspondence(index, (GRID,) * entry.views)


def loss_gradients(model: cameo.CameoModel, *others: Tensor) -> tuple[Tensor | None, ...]:
    parameters = list(model.base_model.parameters())
    return torch.autograd.grad(model.alignment_loss, [*others, *parameters], allow_unused=True)


@pytest.fixture(scope="module", params=ENTRIES)
def attached(request: pytest.FixtureRequest) -> Attached:
    entry, row = ENTRIES[request.param], ROWS[request.param]
    model = build(entry)
    assert type(model) is getattr(diffusers, row.kind)
    inputs = entry.inputs()
    before = sample(model(**inputs)).detach()
    wrapped = eval(row.line, {"cameo": cameo, "model": model})
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.append(args[0] if args else options["hidden_states"])

    (layer,) = wrapped.supervised_layers
    hook = model.get_submodule(layer.path).register_forward_pre_hook(keep, with_kwargs=True)
    output = sample(wrapped(**inputs, correspondence=one_match(entry))).detach()
    hook.remove()
    assert wrapped.num_supervised == 1
    gradients = loss_gradients(wrapped, seen[0])
    loss = wrapped.alignment_loss.detach()
    return Attached(entry, row, wrapped, inputs, before, output, loss, gradients[0], gradients[1:])


def test_the_page_lists_these_models() -> None:
    assert list(ROWS) == list(ENTRIES)


def test_the_output_is_untouched(attached: Attached) -> None:
    assert attached.before.isfinite().all()
    assert torch.equal(attached.output, attached.before)


def test_one_match_pulls_its_query_and_the_matched_view(attached: Attached) -> None:
    images, others = attached.entry.to_images(attached.hidden.abs())
    expected = torch.zeros(images.shape[:-1], dtype=torch.bool)
    expected[(-1, *QUERY)] = True
    expected[-1, KEY[0]] = True
    pulled = images.sum(-1) > 0
    assert torch.equal(pulled, expected), (pulled != expected).nonzero().tolist()
    assert not others.any()


def test_the_layer_can_be_cut_to_its_own_views(attached: Attached) -> None:
    """Text of open length, masks and calls sample by sample stay as they are."""
    (layer,) = attached.model.supervised_layers
    with torch.no_grad():
        with self_view_only(attached.model, layer, (GRID,) * attached.entry.views):
            cut = sample(attached.model(**attached.inputs))
        after = sample(attached.model(**attached.inputs))
    assert cut.isfinite().all()
    assert not torch.allclose(cut, attached.before, atol=1e-4)
    assert torch.equal(after, attached.before)


def test_a_copy_has_the_same_loss(attached: Attached) -> None:
    twin = copy.deepcopy(attached.model)
    twin(**attached.inputs, correspondence=one_match(attached.entry))
    assert torch.equal(twin.alignment_loss, attached.loss)
    twin.alignment_loss.backward()
    assert any(p.grad is not None for p in twin.base_model.parameters())
    assert all(p.grad is None for p in attached.model.parameters())


def test_checkpointing_gives_the_same_gradients(attached: Attached, request: pytest.FixtureRequest) -> None:
    if not attached.entry.checkpoints:
        request.applymarker(pytest.mark.xfail(strict=True, reason="the class drops its mask; docs/models.md says so"))
    model: Any = attached.model.base_model
    model.enable_gradient_checkpointing()
    attached.model(**attached.inputs, correspondence=one_match(attached.entry))
    gradients = loss_gradients(attached.model)
    model.disable_gradient_checkpointing()
    assert any(gradient is not None for gradient in gradients)
    for found, expected in zip(gradients, attached.gradients, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected)


def test_a_lora_trains(attached: Attached) -> None:
    model = copy.deepcopy(attached.model)
    (layer,) = model.supervised_layers
    torch.manual_seed(0)
    targets = [f"{layer.path}.{name}" for name in attached.row.targets]
    inject_adapter_in_model(LoraConfig(r=8, target_modules=targets), model.base_model)
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(weights) == 2 * len(targets)
    optimizer = torch.optim.Adam(weights.values(), lr=0.1)
    match, losses = next_view(views=attached.entry.views), []
    while not losses or (losses[-1] > 0.95 * losses[0] and len(losses) < 24):
        model(**attached.inputs, correspondence=match)
        losses.append(model.alignment_loss.item())
        optimizer.zero_grad()
        model.alignment_loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in weights.values())
    assert losses[-1] <= 0.95 * losses[0], losses


def test_linear_attention_has_nothing_to_supervise() -> None:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=12,
    )
    wrapped = cameo.wrap(model, layer="transformer_blocks.0.attn1", layout="b (v h w)")
    match = next_view()
    with pytest.raises(CaptureError, match=r"layer 'transformer_blocks\.0\.attn1'"):
        wrapped(noise(SAMPLES, 4, 9, 4), noise(SAMPLES, 5, 8), torch.full((SAMPLES,), 400), correspondence=match)
