"""What every model of the catalogue of docs/models.md must pass, once it is attached by the page's line."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import cameo
from cameo import Correspondence
from tests.helpers.models import SAMPLES, Place

__all__ = [
    "Arguments",
    "Attached",
    "attach",
    "check_checkpointing",
    "check_copy",
    "check_footprint",
    "check_lora",
    "check_untouched",
    "first_tensor",
    "hidden_states",
    "one_match",
    "randomize",
]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Attached:
    """A model with CAMEO, and what one forward with a single match gave.

    `hidden` are the gradients of the loss on what enters the layer, `gradients` those on the parameters.
    """

    model: cameo.CameoModel
    arguments: Arguments
    match: Correspondence
    before: Tensor
    output: Tensor
    loss: Tensor
    hidden: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]


def first_tensor(output: Any) -> Tensor:
    """The prediction in whatever a forward returns; those of several samples are stacked."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return first_tensor(next(iter(output.values())))
    return torch.stack(output) if isinstance(output, list) else first_tensor(output[0])


def randomize(model: nn.Module) -> nn.Module:
    """Norms and gates of a trained model are not ones and zeros."""
    for parameter in model.parameters():
        if parameter.ndim < 2 or not parameter.any():
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
    return model


def one_match(query: Place, key: Place, views: int, grid: tuple[int, int]) -> Correspondence:
    """A match of the last sample."""
    index = torch.full((SAMPLES, views, views, grid[0] * grid[1]), -1)
    index[-1, query[0], key[0], query[1] * grid[1] + query[2]] = key[1] * grid[1] + key[2]
    return Correspondence(index, (grid,) * views)


def hidden_states(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    """What enters a layer of self-attention."""
    return (args[0] if args else options["hidden_states"],)


def attach(
    model: nn.Module,
    line: str,
    arguments: Arguments,
    match: Correspondence,
    enters: Callable[..., tuple[Tensor, ...]] = hidden_states,
) -> Attached:
    """Attach by the line of a page, and run the model before and after; `enters` gives what enters the layer."""
    args, options = arguments
    before = first_tensor(model(*args, **options)).detach()
    wrapped = eval(line, {"cameo": cameo, "model": model})
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.extend(enters(*args, **options))

    (layer,) = wrapped.supervised_layers
    hook = model.get_submodule(layer.path).register_forward_pre_hook(keep, with_kwargs=True)
    output = first_tensor(wrapped(*args, **options, correspondence=match)).detach()
    hook.remove()
    assert wrapped.num_supervised == 1
    gradients, number = _gradients(wrapped, *seen), len(seen)
    loss = wrapped.alignment_loss.detach()
    return Attached(wrapped, arguments, match, before, output, loss, gradients[:number], gradients[number:])


def _gradients(model: cameo.CameoModel, *others: Tensor) -> tuple[Any, ...]:
    parameters = list(model.base_model.parameters())
    return torch.autograd.grad(model.alignment_loss, [*others, *parameters], allow_unused=True)


def check_untouched(attached: Attached) -> None:
    assert attached.before.isfinite().all()
    assert torch.equal(attached.output, attached.before)


def check_footprint(images: Tensor, others: Tensor, expected: Tensor) -> None:
    """The gradient on the images `[B, V, h, w, C]` is zero but for `expected` `[V, h, w]` in the last sample."""
    places = torch.zeros(images.shape[:-1], dtype=torch.bool)
    places[-1] = expected
    pulled = images.abs().sum(-1) > 0
    assert torch.equal(pulled, places), (pulled != places).nonzero().tolist()
    assert not others.any()


def check_copy(attached: Attached) -> None:
    """A deep copy has the same loss and shares no parameter."""
    twin = copy.deepcopy(attached.model)
    args, options = attached.arguments
    twin(*args, **options, correspondence=attached.match)
    assert torch.equal(twin.alignment_loss, attached.loss)
    twin.alignment_loss.backward()
    assert any(p.grad is not None for p in twin.base_model.parameters())
    assert all(p.grad is None for p in attached.model.parameters())


def check_checkpointing(attached: Attached, **more: Any) -> None:
    """The parameters get the same gradients as without checkpointing, which the caller has turned on."""
    args, options = attached.arguments
    attached.model(*args, **options, **more, correspondence=attached.match)
    gradients = _gradients(attached.model)
    assert any(gradient is not None for gradient in gradients)
    for found, expected in zip(gradients, attached.gradients, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected)


def check_lora(attached: Attached, targets: Sequence[str], match: Correspondence) -> None:
    """Training a LoRA on these projections of the layer lowers the loss."""
    model = copy.deepcopy(attached.model)
    (layer,) = model.supervised_layers
    torch.manual_seed(0)
    paths = [f"{layer.path}.{name}" for name in targets]
    inject_adapter_in_model(LoraConfig(r=8, target_modules=paths), model.base_model)
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(weights) == 2 * len(paths)
    optimizer = torch.optim.Adam(weights.values(), lr=0.1)
    (args, options), losses = attached.arguments, []
    while not losses or (losses[-1] > 0.95 * losses[0] and len(losses) < 24):
        model(*args, **options, correspondence=match)
        losses.append(model.alignment_loss.item())
        optimizer.zero_grad()
        model.alignment_loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in weights.values())
    assert losses[-1] <= 0.95 * losses[0], losses
