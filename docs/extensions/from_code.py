"""Parts of pages that are written from the code: public names, settings with their comments, and commands.

Each stands in a page as a fenced block with a name and at most one argument, and is replaced before the page is parsed:

    ```{public-names} cameo
    ```
    ```{settings} cameo.training.settings:TrainingConfig
    ```
    ```{commands}
    ```
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module

from sphinx.application import Sphinx

import cameo
from cameo.commands.main import COMMANDS
from cameo.settings import Settings
from cameo.settings.help import entries_by_component


def public_names(module_name: str) -> Iterator[str]:
    """Return a directive of autodoc for each name in `__all__` of a module, but for those of `cameo` itself."""
    module = import_module(module_name)
    elsewhere = set() if module is cameo else {id(getattr(cameo, name)) for name in cameo.__all__}
    yield "```{eval-rst}"
    for name in module.__all__:
        value = getattr(module, name)
        if id(value) in elsewhere:
            continue
        if inspect.isclass(value):
            yield f".. autoclass:: {module_name}.{name}\n   :members:\n"
        elif inspect.isfunction(value):
            yield f".. autofunction:: {module_name}.{name}\n"
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, dict) else str(value).replace("typing.", "")
            yield f".. py:data:: {module_name}.{name}\n\n   `{shown}`\n"
    yield "```"


def settings(kind: str) -> Iterator[str]:
    """Return every setting of a dataclass, `module:Class`, with its default, values and comment, by component."""
    module, _, name = kind.partition(":")
    return shown_settings([getattr(import_module(module), name)], "##")


def shown_settings(kinds: list[type], level: str) -> Iterator[str]:
    """Return the settings of dataclasses, a heading per component and an entry per setting."""
    for title, entries in entries_by_component(kinds):
        yield from (f"{level} {title}", "")
        for entry in entries:
            comment = PAGE.sub(r"[\1](../\1.md)", entry.comment)
            yield from (f"`{entry.name}={entry.default}` ({entry.values})", f": {comment}", "")


def commands(_: str) -> Iterator[str]:
    """Return for every command of `cameo` what its module says of it, and the settings that it alone has."""
    for name, command in COMMANDS.items():
        module = import_module(command.module)
        yield from (f"## cameo {name}", "")
        yield from as_markdown((inspect.getdoc(module) or "").splitlines())
        own = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, Settings)]
        yield from shown_settings([one for one in own if one.__module__ == module.__name__], "###")


def as_markdown(docstring: list[str]) -> Iterator[str]:
    """Return the lines of a docstring, with its indented commands as a block of code."""
    code = False
    for line in docstring:
        if line.strip() and line.startswith("    ") != code:
            code = not code
            yield "```text" if code else "```\n"
        yield line.removeprefix("    ") if code else line
    if code:
        yield "```"
    yield ""


PAGE = re.compile(
    r"\bdocs/([\w/]+)\.md"
)  # a page that a comment names, which becomes a link; the reference is in a folder
WRITERS: dict[str, Callable[[str], Iterator[str]]] = {
    "public-names": public_names,
    "settings": settings,
    "commands": commands,
}
BLOCK = re.compile(rf"^```\{{({'|'.join(WRITERS)})\}} *(\S*)\n```$", re.M)


def write_from_code(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the blocks of a page by what their writers return."""
    source[0] = BLOCK.sub(lambda block: "\n".join(WRITERS[block[1]](block[2])), source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the replacement."""
    app.connect("source-read", write_from_code)
    return {"parallel_read_safe": True}
