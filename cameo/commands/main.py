"""The command `cameo`: `cameo lora`, `cameo explore`, ..., each of which is a module with a function `run`.

Needs nothing but the standard library until a command is chosen, so that `cameo --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module

from cameo.version import __version__

__all__ = ["COMMANDS", "main"]


@dataclass(frozen=True)
class Command:
    """A command: the module whose `run(arguments)` it is, and what it does."""

    module: str
    about: str


COMMANDS = {
    "lora": Command("cameo.recipes.lora_finetune", "train a LoRA with CAMEO; without settings a demonstration"),
    "full": Command("cameo.recipes.full_finetune", "train all weights with CAMEO, from a preset or released weights"),
    "check-data": Command("cameo.recipes.check_data", "say whether cameras, depth and images fit together"),
    "precompute": Command("cameo.recipes.precompute_correspondence", "compute the matches of a training set once"),
    "probe": Command("cameo.recipes.probe_layers", "find the layers whose attention matches the same surface point"),
    "evaluate": Command("cameo.recipes.evaluate", "measure a model, or compare models that were measured"),
    "explore": Command("cameo.recipes.explore", "write a page on which a click shows where a model looks"),
    "push": Command("cameo.recipes.push", "push a finished adapter or model to the Hugging Face Hub, with its card"),
    "doctor": Command("cameo.commands.doctor", "say what is installed, what can be used and what is missing for what"),
}


def usage() -> str:
    """Return what `cameo --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"cameo {__version__}: supervise the cross-view attention of multi-view diffusion models",
            "",
            "usage: cameo COMMAND [key=value ...]",
            "",
            *lines,
            "",
            "cameo COMMAND --help lists the settings of a command.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names with the others.

    Example:
        >>> main(["--version"])
        0.1.0

    Raises:
        SystemExit: with status 2 for a command that is not known, or a user's mistake.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else "--help"
    if name in ("--help", "-h", "help"):
        print(usage())
    elif name in ("--version", "-V"):
        print(__version__)
    elif name in COMMANDS:
        import_module(COMMANDS[name].module).run(given[1:])
    else:
        near = get_close_matches(name, COMMANDS, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        print(f"cameo: unknown command {name!r}, expected one of {', '.join(COMMANDS)}{meant}", file=sys.stderr)
        raise SystemExit(2)
