"""One command line for all recipes: `key=value`, `--key value`, `--help`, `--print-config`, `--dry-run`."""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cameo.errors import DataError, unknown_name
from cameo.settings.convert import FALSE, TRUE, members, setting_fields, types_of
from cameo.settings.fields import current_names
from cameo.settings.files import to_yaml
from cameo.settings.help import help_text
from cameo.settings.interpolation import shown_settings
from cameo.settings.text import Typed, merged

__all__ = ["CONFIG", "run_recipe", "split_arguments"]

CONFIG = "config"  # the settings file; every recipe takes it
HELP, PRINT = ("--help", "-h"), ("--print-config", "--print_config")
DRY_RUN = re.compile(r"--dry[-_]run(?:=(.*))?")
KEY = re.compile(r"(?:--)?([A-Za-z_][\w-]*)((?:\.[\w-]+)*)")
# Errors that a user can cause; any other error is a fault of the program.
MISTAKES = (ValueError, ImportError, OSError, FloatingPointError)


def split_arguments(arguments: Sequence[str], *kinds: type) -> tuple[dict[str, Typed], ...]:
    """Sort arguments by the dataclass that has the setting, the first one where several have it; values stay text.

    `config=file.yaml` goes to the last. Of a setting that is given twice the last value counts; those of a mapping are
    merged (`preset_options.heads=4`).

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Options:
        ...     output: str = "out"
        ...     perturb: bool = False
        >>> @dataclass
        ... class Run:
        ...     seed: int = 0
        >>> split_arguments(["--output", "here", "--perturb", "seed=1", "config=my.yaml"], Options, Run)
        ({'output': 'here', 'perturb': 'true'}, {'seed': '1', 'config': 'my.yaml'})

    Raises:
        ValueError: for an unknown setting, naming the nearest; for an argument that is not `key=value`.
    """
    owners = {name: place for place, kind in reversed(list(enumerate(kinds))) for name in _names(kind)}
    owners.setdefault(CONFIG, len(kinds) - 1)
    by_kind: list[dict[str, Typed]] = [{} for _ in kinds]
    positional = next(((place, name) for place, kind in enumerate(kinds) for name in _positional(kind)), None)
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        key, equals, value = argument.partition("=")
        match = KEY.fullmatch(key)
        named = match is not None and (equals or argument.startswith("--"))
        if positional and not named and not argument.startswith("--"):
            place, name = positional
            by_kind[place].setdefault(name, []).append(argument)
            continue
        if not named or match is None:
            raise ValueError(_not_a_setting(argument, arguments, kinds))
        name = match[1].replace("-", "_")
        if name not in owners:
            raise unknown_name("setting", name, owners)
        kind = kinds[owners[name]]
        if not equals:
            value = _following(name, kind, waiting)
        given = {name: _nested(value, match[2].split(".")[1:])}
        by_kind[owners[name]] = merged(by_kind[owners[name]], given if name == CONFIG else current_names(kind, given))
    return tuple(by_kind)


def _names(kind: type) -> list[str]:
    return [*setting_fields(kind), *getattr(kind, "renamed", {})]


def _positional(kind: type) -> list[str]:
    return [name for name, entry in setting_fields(kind).items() if entry.metadata.get("positional")]


def _nested(value: str, keys: Sequence[str]) -> Typed:
    """Return the mapping that `setting.a.b=value` means; without keys it is the value."""
    typed: Typed = value
    for key in reversed(keys):
        typed = {key: typed}
    return typed


def _following(name: str, kind: type, waiting: list[str]) -> str:
    """Return the value of `--name value`; a setting that is true or false needs none."""
    if bool in members(types_of(kind).get(name)):
        follows = bool(waiting) and waiting[0].lower() in TRUE + FALSE
        return waiting.pop(0) if follows else "true"
    if not waiting or waiting[0].startswith("--"):
        raise ValueError(f"--{name}: expected a value after it, as in {name}=value")
    return waiting.pop(0)


def _not_a_setting(argument: str, arguments: Sequence[str], kinds: Sequence[type]) -> str:
    """Build the message for an argument that is not a setting; does not show one that could be a secret."""
    place = list(arguments).index(argument)
    before = arguments[place - 1].lstrip("-").partition("=")[0] if place else ""
    secret = any(
        before in setting_fields(kind) and setting_fields(kind)[before].metadata.get("secret") for kind in kinds
    )
    shown = f"number {place + 1}" if secret or argument.startswith("hf_") else repr(argument)
    return f"argument {shown}: expected key=value, for example max_train_steps=100; --help lists all settings"


def run_recipe(
    main: Callable[[list[str]], None],
    read: Callable[[list[str]], Sequence[Any]],
    kinds: Sequence[type],
    *,
    about: str,
    arguments: Sequence[str] | None = None,
    dry_run: Callable[[list[str], str | None], None] | None = None,
) -> None:
    """Run a recipe: answer `--help`, `--print-config` and `--dry-run`, print a user's mistake as one paragraph.

    After a mistake the exit status is 2.

    Args:
        main: the recipe; gets the arguments.
        read: reads the arguments into settings, which `--print-config` prints; should import nothing slow.
        kinds: dataclasses of the settings, for `--help`.
        about: what the recipe does, its module's docstring.
        arguments: of the command line; None takes those of this process.
        dry_run: answers `--dry-run` and `--dry-run=DEVICE`; gets the other arguments and the device, None where none
            is given.

    Raises:
        SystemExit: with status 2 for a user's mistake. Any other exception is a fault of the program and is passed on.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not set(HELP).isdisjoint(given):
            print(help_text(about, kinds))
        elif not set(PRINT).isdisjoint(given):
            values: dict[str, Any] = {}
            for settings in read([argument for argument in given if argument not in PRINT]):
                values |= {name: value for name, value in shown_settings(settings).items() if name not in values}
            print(to_yaml(values), end="")
        elif dry_run and (asked := [match for argument in given if (match := DRY_RUN.fullmatch(argument))]):
            dry_run([argument for argument in given if not DRY_RUN.fullmatch(argument)], asked[-1][1])
        else:
            read(given)  # so that a mistake is reported before anything slow is imported
            main(given)
    except MISTAKES as error:
        if not _is_of_user(error):
            raise
        print(f"{Path(sys.argv[0]).name}: {_paragraph(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_of_user(error: BaseException) -> bool:
    """Tell whether an error was raised on purpose, by a `raise` of this library or a recipe, with a cure for the user.

    The same kind of error out of another library, or out of an expression, is a fault of the program.
    """
    if isinstance(error, DataError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code, module = trace.tb_frame.f_code, str(trace.tb_frame.f_globals.get("__name__"))
    line = linecache.getline(code.co_filename, trace.tb_lineno).lstrip()
    return (module == "__main__" or module.split(".")[0] == "cameo") and line.startswith("raise")


def _paragraph(error: BaseException) -> str:
    """Return the message of an error on one line, without the traceback of a data worker that it may contain."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split())
