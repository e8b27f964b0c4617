"""The tutorial for a new backbone has the files that every backbone has, and its code is a package that works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cameo

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guides" / "add_a_backbone.md").read_text(encoding="utf-8")


def files() -> dict[str, str]:
    """Code blocks of the page, by the file name that is the last one in the sentence before each."""
    found = {}
    for caption, code in re.findall(r"([^\n]+)\n```\w+\n(.*?)```", PAGE, re.S):
        names = re.findall(r"`((?:\w+/)*\w+\.(?:toml|py))`", caption)
        found[names[-1]] = code
    return found


def install(package: Path, folder: Path) -> None:
    """What `pip install` leaves behind of this project: its package and a `.dist-info` with the entry points."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    information = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir(parents=True)
    metadata = {"Metadata-Version": "2.1", "Name": project["name"], "Version": project["version"]}
    (information / "METADATA").write_text("".join(f"{key}: {value}\n" for key, value in metadata.items()))
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (information / "entry_points.txt").write_text("\n".join(lines) + "\n")
    shutil.copytree(package / project["name"].replace("-", "_"), folder / project["name"].replace("-", "_"))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    for name, code in files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)
    return folder


def test_the_page_names_the_files_of_every_backbone() -> None:
    modules = [name.partition("cameo_hunyuan/")[2] for name in files() if name.startswith("cameo_hunyuan/")]
    table = re.findall(r"^\| `(\w+\.py)` \|", PAGE, re.M)
    for backbone in ("cat3d", "mvdream", "sv3d", "zero123plus"):
        assert {path.name for path in (ROOT / "adapters" / backbone).glob("*.py")} == {"__init__.py", *table}
    assert {"__init__.py", *table} - set(modules) == {"convert.py"}
    assert max(len(code.splitlines()) for code in files().values()) < 90


def test_package_of_the_page_works(package: Path, tmp_path: Path) -> None:
    assert "hunyuan" not in cameo.backbones()
    install(package, tmp_path / "installed")
    shutil.copy(ROOT / "tests" / "helpers" / "backbone_checks.py", package / "tests")
    report = (
        "print(cameo.backbones(), model.supervised_layers[0].path, model.num_supervised, model.alignment_loss.item())"
    )
    check = package / "tests" / "check.py"
    check.write_text(check.read_text() + report)
    path = os.pathsep.join([str(tmp_path / "installed"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(check)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "'hunyuan'" in done.stdout
    layer, matches, loss = done.stdout.split("]")[-1].split()
    assert (layer, matches) == ("blocks.3.attn1", "1")
    assert float(loss) > 0
