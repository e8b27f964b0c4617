"""What a save leaves out, by the structure of the model alone: no output is computed, and no base is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from cameo.backbone import unwrap_peft
from cameo.hub.weights import ADAPTER_FORMATS, adapter_layers, adapter_name, adapter_settings, format_to_write

__all__ = ["left_out"]

SHOWN = 3  # names that a message lists


def left_out(model: nn.Module) -> list[str]:
    """Say what of a model with an adapter is in no file that a save writes, each with the cure; empty for a full model.

    Example:
        >>> from peft import LoraConfig, inject_adapter_in_model
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> net = inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), net)
        >>> left_out(net)
        []
        >>> _ = net[1].requires_grad_(True)
        >>> left_out(net)[0][:70]
        '2 parameters beside the adapter take gradients, so they may have been '

    A merged adapter, and several active ones, are refused by the save itself. Weights of the base that were changed and
    do not take gradients are found by the comparison of a push.

    Args:
        model: the base model of a `CameoModel`.
    """
    if format_to_write(model) not in ADAPTER_FORMATS:
        return []
    name = adapter_name(model)
    return [*_other_adapters(model, name), *_switched_off(model), *_scaled(model, name), *_beside(model, name)]


def _other_adapters(model: nn.Module, name: str) -> Iterator[str]:
    others = [other for other in model.peft_config if other != name]  # type: ignore[union-attr]
    if others:
        yield (
            f"the adapter {name!r} is saved and {_listed(others)} is not: a folder holds one adapter. To keep the "
            "others, make each the active one (set_adapter) and save it to a folder of its own"
        )


def _switched_off(model: nn.Module) -> Iterator[str]:
    if any(layer.disable_adapters for layer in adapter_layers(model)):
        yield (
            "the adapter is switched off, which no file keeps: it is saved, and it loads switched on. Call "
            "enable_adapters() if it was switched off by mistake; who wants the base loads the base"
        )


def _scaled(model: nn.Module, name: str) -> Iterator[str]:
    """Compare the scale of each LoRA layer with the one that its rank and alpha give, which is the one that loads."""
    rank_stabilized = getattr(adapter_settings(model), "use_rslora", False)
    changed: dict[str, float] = {}
    for path, layer in unwrap_peft(model).named_modules():
        scaling, alphas, ranks = (getattr(layer, key, {}) for key in ("scaling", "lora_alpha", "r"))
        if not all(isinstance(values, dict) and name in values for values in (scaling, alphas, ranks)):
            continue
        loaded = alphas[name] / (math.sqrt(ranks[name]) if rank_stabilized else ranks[name])
        if not math.isclose(scaling[name], loaded, rel_tol=1e-6):
            changed[path] = scaling[name] / loaded if loaded else math.inf
    if changed:
        factors = sorted({f"{factor:.4g}" for factor in changed.values()})
        yield (
            f"the scale of the adapter {name!r} was changed in {len(changed)} layers ({_listed(list(changed))}) to "
            f"{_listed(factors)} times lora_alpha / r, which no file keeps: it loads with lora_alpha / r. Set it back "
            f"(set_adapters([{name!r}], [1.0]), or set_scale({name!r}, 1.0) of each layer) before you save, or set it "
            "again after loading"
        )


def _beside(model: nn.Module, name: str) -> Iterator[str]:
    """Find parameters that take gradients and are not among the tensors that the adapter's file holds."""
    from peft import get_peft_model_state_dict

    saved = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model, adapter_name=name).values()}
    settings: Any = model.peft_config
    others = [f".{other}" for other in settings if other != name]
    beside = [
        (path, parameter.numel())
        for path, parameter in unwrap_peft(model).named_parameters()
        if parameter.requires_grad
        and parameter.data_ptr() not in saved
        and not any(f"{path}.".find(f"{other}.") >= 0 for other in others)
    ]
    if beside:
        yield (
            f"{len(beside)} parameters beside the adapter take gradients, so they may have been trained, and are in no "
            f"file: {_listed([path for path, _ in beside])}. Freeze them (requires_grad_(False)) if they are as in the "
            "base; else name their modules in target_modules or modules_to_save of the adapter, or merge the adapter "
            "and save the full model"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
