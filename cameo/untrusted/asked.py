"""What a configuration may ask for, before a model is built from it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cameo.errors import DataError
from cameo.untrusted.reading import check_weights, read_object

__all__ = ["INDEX", "LIMITS", "Limits", "check_asked", "check_classes", "check_pipeline"]


@dataclass
class Limits:
    """Bounds of the numbers in a configuration; who needs more for files of their own sets them in `LIMITS`.

    Example:
        >>> LIMITS.layers
        256

    Attributes:
        layers: layers, blocks and the like, each of which is built: of `num_layers`, `layers_per_block`, ....
        integer: every other whole number: channels, heads, vocabularies, noise levels.
        entries: entries of a list.
    """

    layers: int = 256
    integer: int = 1 << 20
    entries: int = 4096


LIMITS = Limits()
INDEX = "model_index.json"
# Settings that count modules.
COUNTS = re.compile(r"(^|_)(layers|blocks|depth)(_|$)")
# Token ids, lengths and byte counts of tokenizers, from which nothing is built.
NOT_BUILT = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "tokenizer.json")
# Libraries that a pipeline's components come from; the last is a module of diffusers.
LIBRARIES = ("diffusers", "transformers", "cameo", "stable_diffusion")


def check_asked(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration that asks for more than `LIMITS`.

    Example:
        >>> check_asked(Path("config.json"), {"block_out_channels": [32, 10**9]})
        Traceback (most recent call last):
        ...
        cameo.errors.DataError: config.json: block_out_channels: expected at most 1048576, got 1000000000. ...

    Raises:
        DataError: names the file, the setting, the bound and the cure.
    """
    for name, value in _numbers(path, "", config):
        most = LIMITS.layers if COUNTS.search(name.rpartition(".")[2]) else LIMITS.integer
        if abs(value) > most:
            raise DataError(
                f"{path}: {name}: expected at most {most}, got {str(value)[:40]}. A model of this size is not built "
                "from a file that others may have written; if it is your own, raise cameo.untrusted.asked.LIMITS"
            )


def _numbers(path: Path, name: str, value: object) -> Iterator[tuple[str, int]]:
    """The whole numbers in a configuration, each with the dotted name of its setting; ids and text are none."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in ("id2label", "label2id"):
                yield from _numbers(path, f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list):
        if len(value) > LIMITS.entries:
            raise DataError(f"{path}: {name}: expected at most {LIMITS.entries} entries, got {len(value)}")
        for inner in value:
            yield from _numbers(path, name, inner)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value
    elif isinstance(value, float) and value.is_integer():  # such as 1e9, which some settings take as a whole number
        yield name, int(value)


def check_pipeline(folder: Path) -> dict[str, Any]:
    """Check a pipeline in diffusers' layout as far as is possible without building it; returns its index.

    Links in the folder may lead out of it: those of the Hub's cache do.

    Raises:
        DataError: if a file is damaged or asks for more than `LIMITS`.
    """
    index = read_object(folder / INDEX)
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        raise DataError(f"{folder / INDEX}: _class_name: expected the name of a pipeline, got {kind!r}")
    for path in sorted(folder.glob("*/*.json")):
        if path.name in NOT_BUILT or not (path.name == "config.json" or path.name.endswith("_config.json")):
            continue
        check_asked(path, read_object(path))
    for path in sorted(folder.glob("*/*.safetensors")):
        check_weights(path)
    return index


def check_classes(folder: Path, package: str, given: Iterable[str] = ()) -> None:
    """Refuse a pipeline whose index names a class of another library, which diffusers would take from there.

    Args:
        folder: of the pipeline.
        package: whose classes are allowed beside those of diffusers, transformers and cameo.
        given: components that are not built.

    Raises:
        DataError: names the component, its class and the cure.
    """
    for name, place in read_object(folder / INDEX).items():
        is_class = isinstance(place, list) and len(place) == 2 and all(isinstance(part, str) for part in place)
        if not is_class or name.startswith("_") or name in given:
            continue
        library, kind = place
        if library.split(".")[0] not in {*LIBRARIES, package} or not kind.isidentifier():
            raise DataError(
                f"{folder / INDEX}: {name}: expected a class of diffusers, transformers or cameo, got "
                f"{'.'.join(place)!r}. Code that comes with a model is not run; pass that component, {name}=, as your "
                "own code loads it"
            )
