"""SGM's `VideoUNet` by its structure: where its attentions are, and its gradient checkpointing.

Nothing of SGM is imported; the module may be the U-Net itself or hold it as `diffusion_model` or
`model.diffusion_model`, as SGM's engine does.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator

import torch.utils.checkpoint
from torch import nn

__all__ = ["checkpoint_hazard", "resolution_levels", "use_non_reentrant_checkpointing", "video_attentions"]

PLACE = re.compile(
    r"((?:(?:model\.)?diffusion_model\.)?)((input_blocks|output_blocks)\.(\d+)|middle_block)\.\d+\.(\w+)\.\d+\.attn1"
)


def video_attentions(model: nn.Module, blocks: str) -> dict[str, nn.Module]:
    """List the modules `attn1` of the video transformers in execution order.

    Args:
        model: `VideoUNet`, or a module that holds it.
        blocks: "time_stack" (temporal) or "transformer_blocks" (per frame).

    Returns:
        Modules by path; empty if there are none, or if attentions over time are missing altogether.
    """
    found: dict[str, dict[str, nn.Module]] = {"time_stack": {}, "transformer_blocks": {}}
    for path, module in model.named_modules():  # registered in execution order
        if (match := PLACE.fullmatch(path)) and match[5] in found:
            found[match[5]][path] = module
    return found[blocks] if len(found["time_stack"]) == len(found["transformer_blocks"]) else {}


def resolution_levels(model: nn.Module, paths: list[str]) -> list[int]:
    """How often the latents were halved at each of these attentions."""
    if not paths:
        return []
    match = PLACE.fullmatch(paths[0])
    assert match is not None
    unet = model.get_submodule(match[1].rstrip("."))
    level, at = 0, {}
    for part in ("input_blocks", "middle_block", "output_blocks"):
        module = unet.get_submodule(part)
        runs = {part: module} if part == "middle_block" else {f"{part}.{n}": m for n, m in module.named_children()}
        for name, block in runs.items():
            at[name] = level
            level += sum(map(_step, block.children()))
    places = [PLACE.fullmatch(path) for path in paths]
    return [at[place[2]] for place in places if place is not None]


def _step(module: nn.Module) -> int:
    """1 for a module that halves the latents, -1 for one that doubles them."""
    resampler = module.h_upd if getattr(module, "updown", False) else module
    return {"Downsample": 1, "Upsample": -1}.get(type(resampler).__name__, 0)


def checkpoint_hazard(model: nn.Module) -> str | None:
    """Say that the transformer blocks checkpoint reentrantly, if they do: then captured queries have no gradient."""
    for module in model.modules():
        if getattr(module, "checkpoint", None) is not True or not hasattr(module, "attn1"):
            continue
        if any(_is_reentrant(function) for _, function in _checkpoint_functions(module)):
            return (
                f"{type(module).__name__} runs under reentrant gradient checkpointing, where queries and keys carry no "
                "gradient, so the alignment loss would train nothing. Call "
                "cameo.adapters.sv3d.use_non_reentrant_checkpointing(model), or build the model with "
                "use_checkpoint=False"
            )
    return None


def use_non_reentrant_checkpointing(model: nn.Module) -> list[str]:
    """Let the blocks of `model` checkpoint with `use_reentrant=False`, for the whole process.

    SGM's blocks call a function `checkpoint` that their Python modules import from torch, with no way to choose; this
    puts another function under that name in these modules, so every model that uses them is changed too. Outputs and
    gradients stay the same, memory too. A second call changes nothing.

    Example:
        >>> from torch import nn
        >>> use_non_reentrant_checkpointing(nn.Linear(2, 2))  # has no such blocks
        []

    Returns:
        Names of the Python modules that were changed.
    """
    changed = []
    for module in model.modules():
        if True not in (getattr(module, "checkpoint", None), getattr(module, "use_checkpoint", None)):
            continue
        for name, function in _checkpoint_functions(module):
            if _is_reentrant(function):
                safe = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
                sys.modules[name].checkpoint = safe  # type: ignore[attr-defined]
                changed.append(name)
    return changed


def _checkpoint_functions(module: nn.Module) -> Iterator[tuple[str, object]]:
    """What is called `checkpoint` in the Python modules that define the class and its parents."""
    for kind in type(module).__mro__:
        if kind.__module__.partition(".")[0] != "torch" and kind.__module__ in sys.modules:
            yield kind.__module__, vars(sys.modules[kind.__module__]).get("checkpoint")


def _is_reentrant(function: object) -> bool:
    """Whether it is torch's function without `use_reentrant=False`; of a function of others nothing is said."""
    if isinstance(function, functools.partial):
        return _is_reentrant(function.func) and function.keywords.get("use_reentrant") is not False
    return function is torch.utils.checkpoint.checkpoint
