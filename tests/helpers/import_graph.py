"""Draw the rooms of a source tree from its imports: rooms, floors, arrows, circles, longest chain of files.

    python tests/helpers/import_graph.py                     # this tree
    python tests/helpers/import_graph.py --tree OTHER        # another checkout, an old one too
    python tests/helpers/import_graph.py --files             # every file with its floor

A *room* is a folder of the package, or a file that stands alone in `cameo/`. An *arrow* says that some file of one
room imports some file of another; imports inside functions and for type checkers count. The *floor* of a room is one
more than the highest floor that it imports. A *circle* is a set of rooms that import each other, on one floor.
"""

from __future__ import annotations

import argparse
import ast
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RULES = Path(__file__).with_name("rooms.toml")
# Folders whose files are scripts: they import the package and nothing imports them.
SCRIPTS = ("recipes", "benchmarks")
Graph = dict[str, set[str]]


@dataclass(frozen=True)
class Tree:
    """The source files of a checkout and who imports whom.

    Attributes:
        files: path of every file, relative to the checkout, by its module name.
        imports: for each file the files it imports.
    """

    files: Mapping[str, str]
    imports: Graph = field(default_factory=dict)


def read_tree(root: Path) -> Tree:
    """Parse every module of `cameo/`, `adapters/` and `recipes/` (installed below `cameo`), and the benchmarks."""
    files: dict[str, str] = {}
    for folder in ("cameo", "adapters", *SCRIPTS):
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            parts = relative.with_suffix("").parts
            if folder in ("adapters", "recipes"):
                parts = ("cameo", *parts)
            if parts[-1] == "__init__":
                parts = parts[:-1]
            files[".".join(parts)] = str(relative)
    imports: Graph = {}
    for module, name in files.items():
        package = module if name.endswith("__init__.py") else module.rpartition(".")[0]
        siblings = {one.removeprefix(package + "."): one for one in files if one.startswith(package + ".")}
        found = set(_imported(ast.parse((root / name).read_text(encoding="utf-8")), package, files))
        if name.startswith(SCRIPTS):  # scripts import the scripts beside them by their bare names
            found |= {siblings[one] for one in _bare_names(root / name) if one in siblings}
        imports[name] = {files[one] for one in found if one != module}
    return Tree(files, imports)


def _imported(tree: ast.AST, package: str, files: Mapping[str, str]) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            origin = ".".join([*around, node.module] if node.module else around)
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                if full in files:
                    yield full
                elif origin in files:
                    yield origin


def _bare_names(path: Path) -> Iterable[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def room_of(name: str) -> str:
    """Room of a file: its folder, or the file itself where it stands alone in `cameo/`.

    Example:
        >>> room_of("cameo/geometry/depth.py"), room_of("cameo/errors.py"), room_of("adapters/common/presets.py")
        ('cameo/geometry', 'cameo/errors.py', 'adapters/common')
    """
    folder = name.rpartition("/")[0]
    if folder.startswith(SCRIPTS):
        return folder.partition("/")[0]
    return name if folder == "cameo" else folder


def graph_of_rooms(tree: Tree) -> Graph:
    """Who imports whom among the rooms."""
    graph: Graph = {room_of(name): set() for name in tree.files.values()}
    for name, found in tree.imports.items():
        graph[room_of(name)] |= {room_of(one) for one in found} - {room_of(name)}
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Sets of nodes that reach each other (Tarjan's strongly connected components of two or more nodes)."""
    return [part for part in _components(graph) if len(part) > 1]


def floors(graph: Graph) -> dict[str, int]:
    """Floor of each node, from 1; the nodes of a circle share one."""
    found: dict[str, int] = {}
    for part in _components(graph):  # what is imported comes first
        below = [found[one] for node in part for one in graph[node] if one not in part]
        found |= dict.fromkeys(part, 1 + max(below, default=0))
    return found


def _components(graph: Graph) -> list[list[str]]:
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    parts: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            cut = stack.index(node)
            parts.append(sorted(stack[cut:]))
            del stack[cut:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return parts


def without_listed(tree: Tree, rules: Mapping[str, Any]) -> Tree:
    """The tree without the upward imports that `rooms.toml` lists."""
    listed = {(one["importer"], one["imported"]) for one in rules["upward"]}
    left = {name: {one for one in found if (name, one) not in listed} for name, found in tree.imports.items()}
    return Tree(tree.files, left)


def imported_names(path: Path, package: str) -> list[str]:
    """Modules of a package that a file imports, in whichever form, with its own package for relative imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            names += [f"{origin}.{alias.name}" for alias in node.names] + [origin]
    return [name for name in names if name.startswith((package, "."))]


def broken_rules(tree: Tree, rules: Mapping[str, Any]) -> list[str]:
    """Compare the imports with the order of `rooms.toml`; one sentence for each import that it does not allow."""
    order = {room: number for number, line in enumerate(rules["floors"]) for room in line}
    allowed = {(one["importer"], one["imported"]) for one in rules["upward"]}
    used = set()
    problems = []
    for name, found in sorted(tree.imports.items()):
        room = room_of(name)
        if room in SCRIPTS:
            continue
        if room not in order:
            problems.append(f"{name}: its room {room} is not in rooms.toml; add it to the floor where it belongs")
            continue
        for other in sorted(found):
            above = room_of(other)
            if above == room or order.get(above, len(order)) < order[room]:
                continue
            if (name, other) in allowed:
                used.add((name, other))
                continue
            problems.append(
                f"{name} imports {other}: the room {above} does not stand below {room}; move what is shared further "
                "down, or hand it over as an argument"
            )
    problems += [f"rooms.toml allows {one} to import {two}, which it does not" for one, two in sorted(allowed - used)]
    return problems


def main() -> None:
    """Print the figures of a tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to read (default: this one)")
    parser.add_argument("--files", action="store_true", help="list every file with its floor")
    options = parser.parse_args()
    tree = read_tree(options.tree)
    rooms = graph_of_rooms(tree)
    height, chain = floors(rooms), floors(tree.imports)
    for number in range(max(height.values()), 0, -1):
        print(f"{number:3}  " + "  ".join(room for room in sorted(height) if height[room] == number))
    arrows = sum(map(len, rooms.values()))
    print(f"{len(rooms)} rooms on {max(height.values())} floors, {arrows} arrows, {len(circles(rooms))} circles")
    _print_circles(rooms)
    print(f"{len(chain)} files, longest chain of imports {max(chain.values())}, {len(circles(tree.imports))} circles")
    _print_circles(tree.imports)
    rules = tomllib.loads(RULES.read_text(encoding="utf-8"))
    for one in rules["upward"] if options.tree == ROOT else ():
        print(f"  listed: {one['importer']} imports {one['imported']}: {one['reason']}")
    if options.files:
        for name in sorted(chain, key=lambda one: (chain[one], one)):
            print(f"{chain[name]:3}  {name}")


def _print_circles(graph: Graph) -> None:
    for circle in circles(graph):
        print("  circle: " + " <-> ".join(circle))


if __name__ == "__main__":
    main()
