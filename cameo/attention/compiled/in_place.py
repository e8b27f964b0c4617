"""`torch.compile` of a model in place, so that the names of its weights and saved files stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["compile_in_place"]

# Number of graphs that torch keeps of one function before it gives up and runs it eagerly. The blocks of a U-Net share
# the code of their forward, and have a graph for each width, with and without a gradient and an alignment loss: more
# than the 8 of torch's default.
GRAPHS_OF_A_BLOCK = 64


def compile_in_place(model: nn.Module, core: nn.Module, torch_compile: str, **options: Any) -> None:
    """Compile a model in place, after LoRA was added to it; the work itself is done in its first forwards.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> dit = get_backbone("cat3d").build("transformer-tiny").unet
        >>> compile_in_place(dit, dit, "regional", backend="eager")
        >>> any("_orig_mod" in name for name in dit.state_dict())
        False

    Args:
        model: what is called.
        core: the model of diffusers within it; `model` itself, or what PEFT holds.
        torch_compile: "off", "default" for the whole model, or "regional" for each of its repeated blocks, which are
            the classes that the model lists as `_repeated_blocks`.
        options: of `torch.compile`.

    Raises:
        ValueError: "regional" for a model that lists no repeated blocks.
    """
    if torch_compile == "default":
        model.compile(**options)
    elif torch_compile == "regional":
        blocks: Any = core
        if not getattr(core, "_repeated_blocks", None):
            raise ValueError(
                f"torch_compile=regional: a {type(core).__name__} does not list its repeated blocks; give "
                "torch_compile=default"
            )
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, GRAPHS_OF_A_BLOCK)
        blocks.compile_repeated_blocks(**options)
