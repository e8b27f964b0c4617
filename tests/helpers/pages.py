"""The pages of the documentation: their blocks of code, and the commands in them."""

from __future__ import annotations

import os
import re
import shlex
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from cameo.commands.main import COMMANDS
from tests.helpers.hub_server import OWNER, WRITE_TOKEN, LoopbackHub

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
RECIPES = {command.module.rpartition(".")[2]: name for name, command in COMMANDS.items()}


def text_of(page: str) -> str:
    """Text of a page, by its path from the root of the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language in their order; "" takes those without one."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.S | re.M)
    return [code for named, code in found if named == language]


class CommandLine(NamedTuple):
    """A line of a page that starts a command of `cameo` or a recipe."""

    launcher: str
    command: str
    arguments: list[str]
    line: str

    @property
    def module(self) -> ModuleType:
        return import_module(COMMANDS[self.command].module)


def command_lines(text: str) -> list[CommandLine]:
    """Lines of the shell blocks of a page that start a command, without their comments."""
    shell = [line for language in ("", "bash") for block in blocks(text, language) for line in block.splitlines()]
    return [found for line in shell if (found := parsed(line.split(" #")[0].strip())) is not None]


def parsed(line: str) -> CommandLine | None:
    """Read `cameo NAME ...`, `python recipes/FILE.py ...`, or a launcher with either of a recipe's names."""
    if not line.startswith(("cameo ", "python recipes/", "torchrun ", "accelerate ")):
        return None
    words = shlex.split(line)
    if words[0] == "cameo":
        return None if words[1].startswith("-") else CommandLine("cameo", words[1], words[2:], line)
    for place, word in enumerate(words):
        name = Path(word).stem if word.startswith("recipes/") else word.removeprefix("cameo.recipes.")
        if word.startswith(("recipes/", "cameo.recipes.")):
            return CommandLine(words[0], RECIPES.get(name, name), words[place + 1 :], line)
    raise AssertionError(f"{line}: starts no recipe")


def hub_environment(hub: LoopbackHub, folder: Path) -> dict[str, str]:
    """Environment of a process that takes a loopback Hub for the Hub."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": WRITE_TOKEN,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",  # the loopback Hub stores large files through LFS
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }


def with_owner(code: str) -> str:
    """Code with the name of the loopback Hub's only user in place of `you`."""
    return code.replace('"you/', f'"{OWNER}/')
