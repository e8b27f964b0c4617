"""Ways to damage a data set: edits of its text, JSON, arrays and images."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Damage = Callable[[Path], Any]


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut(name: str, keep: int) -> Damage:
    """Keep the first bytes alone."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def patched(name: str, at: int, content: bytes) -> Damage:
    """Overwrite some bytes."""

    def act(folder: Path) -> None:
        old = (folder / name).read_bytes()
        (folder / name).write_bytes(old[:at] + content + old[at + len(content) :])

    return act


def all_of(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def written(name: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def replaced(name: str, old: str, new: str) -> Damage:
    def act(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text, f"{old!r} is not in {name}"
        (folder / name).write_text(text.replace(old, new, 1))

    return act


def resized(name: str, width: int = 30, height: int = 20) -> Damage:
    return lambda folder: Image.new("RGB", (width, height)).save(folder / name)


def saved(name: str, array: Any) -> Damage:
    return lambda folder: np.save(folder / name, np.array(array), allow_pickle=True)


def edited(name: str, edit: Callable[[Any], Any]) -> Damage:
    """Edit JSON in place, or by what the function returns; `.jgz` is packed again."""

    def act(folder: Path) -> None:
        path = folder / name
        packed = name.endswith(".jgz")
        content = json.loads(gzip.decompress(path.read_bytes()) if packed else path.read_text())
        changed = edit(content)
        text = json.dumps(content if changed is None else changed)
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())

    return act


def repacked(edit: Callable[[dict[str, bytes]], Any], name: str = "scenes-00000.tar") -> Damage:
    """Edit the members of a tar by their names."""

    def act(folder: Path) -> None:
        with tarfile.open(folder / name) as archive:
            members = {one.name: archive.extractfile(one).read() for one in archive.getmembers()}  # type: ignore[union-attr]
        edit(members)
        with tarfile.open(folder / name, "w") as archive:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))

    return act


def set_in(*path: Any, value: Any) -> Callable[[Any], None]:
    """Return an edit that sets what lies at a path of keys."""

    def edit(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return edit
