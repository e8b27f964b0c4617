"""The rooms of the house: what each may import, how many files it holds, how long they are."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import import_graph as graph

RULES: dict[str, Any] = tomllib.loads(graph.RULES.read_text(encoding="utf-8"))
TREE = graph.read_tree(graph.ROOT)


def test_imports_follow_the_order_of_the_rooms() -> None:
    assert not graph.broken_rules(TREE, RULES)


def test_there_is_no_circle_but_for_the_listed_imports() -> None:
    rooms = graph.graph_of_rooms(graph.without_listed(TREE, RULES))
    assert not graph.circles(rooms)
    assert not graph.circles(graph.without_listed(TREE, RULES).imports)


def test_at_most_ten_floors_of_rooms() -> None:
    assert max(graph.floors(graph.graph_of_rooms(TREE)).values()) <= 10


def test_the_list_of_upward_imports_is_short_and_gives_reasons() -> None:
    assert len(RULES["upward"]) <= 3
    assert all(len(exception["reason"]) > 20 for exception in RULES["upward"])


def test_a_room_holds_few_files_and_a_file_few_lines() -> None:
    rooms: dict[str, list[str]] = {}
    for name in TREE.files.values():
        room = "cameo" if graph.room_of(name) == name else graph.room_of(name)
        rooms.setdefault(room, []).append(name)
    crowded = {
        room: len(names)
        for room, names in rooms.items()
        if room not in graph.SCRIPTS and len(names) > RULES["most_files_in_a_room"]
    }
    assert not crowded
    lines = {name: len((graph.ROOT / name).read_text(encoding="utf-8").splitlines()) for name in TREE.files.values()}
    long = {name for name, count in lines.items() if count > RULES["most_lines_in_a_file"]}
    assert long == set(RULES["longer"])


def test_files_of_the_tests_are_short_and_import_helpers_only() -> None:
    files = sorted((graph.ROOT / "tests").rglob("*.py"))
    assert len(files) > 50
    long = [path.name for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 400]
    assert not long
    for path in files:
        borrowed = graph.imported_names(path, "tests")
        wrong = [name for name in borrowed if ".test_" in name or name.endswith("conftest")]
        assert not wrong, f"{path.name} imports {wrong[0]}; what several tests need belongs into tests/helpers"


@pytest.mark.parametrize(
    ("importer", "imported", "says"),
    [
        ("cameo/geometry/depth.py", "cameo/model.py", "cameo/geometry/depth.py imports cameo/model.py"),
        ("cameo/probing/probe.py", "cameo/hub/card.py", "cameo/probing/probe.py imports cameo/hub/card.py"),
        ("cameo/hub/card.py", "cameo/training/trainer.py", "cameo/hub/card.py imports cameo/training/trainer.py"),
        ("cameo/new_room/file.py", "cameo/errors.py", "cameo/new_room is not in rooms.toml"),
    ],
)
def test_a_wrong_import_is_told_with_both_names(importer: str, imported: str, says: str) -> None:
    tree = graph.Tree(TREE.files, copy.deepcopy(TREE.imports))
    tree.imports.setdefault(importer, set()).add(imported)
    (problem,) = graph.broken_rules(tree, RULES)
    assert says in problem


def test_every_form_of_import_is_read(tmp_path: Path) -> None:
    modules = {
        "cameo/__init__.py": "",
        "cameo/model.py": "",
        "cameo/room/__init__.py": "from . import beside",
        "cameo/room/beside.py": "",
        "cameo/room/absolute.py": "import cameo.model\nfrom cameo.room.beside import name",
        "cameo/room/relative.py": "from .. import model\nfrom .beside import name",
        "cameo/room/late.py": "def function():\n    from ..model import name",
    }
    for name, text in modules.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    imports = graph.read_tree(tmp_path).imports
    assert imports["cameo/room/__init__.py"] == {"cameo/room/beside.py"}
    assert imports["cameo/room/absolute.py"] == {"cameo/model.py", "cameo/room/beside.py"}
    assert imports["cameo/room/relative.py"] == {"cameo/model.py", "cameo/room/beside.py"}
    assert imports["cameo/room/late.py"] == {"cameo/model.py"}


def test_a_listed_import_that_is_gone_is_told() -> None:
    rules = copy.deepcopy(RULES)
    rules["upward"].append({"importer": "cameo/files.py", "imported": "cameo/model.py", "reason": "none"})
    assert graph.broken_rules(TREE, rules) == [
        "rooms.toml allows cameo/files.py to import cameo/model.py, which it does not"
    ]
