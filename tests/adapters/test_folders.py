"""The folders of the backbones have the same files, and all of them are installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BACKBONES = ("cat3d", "mvdream", "sv3d", "zero123plus")
FILES = {
    "__init__.py",
    "adapter.py",
    "cameras.py",
    "convert.py",
    "denoiser.py",
    "layers.py",
    "pipeline.py",
    "weights.py",
}
IMPORT = re.compile(r"^\s*(?:from|import) cameo\.adapters\.(\w+)", re.M)


def test_every_backbone_has_the_same_files() -> None:
    folders = {path.parent.name for path in (ROOT / "adapters").glob("*/adapter.py")}
    assert folders == set(BACKBONES)
    for backbone in BACKBONES:
        assert {path.name for path in (ROOT / "adapters" / backbone).glob("*.py")} == FILES


@pytest.mark.parametrize("folder", [*BACKBONES, "common"])
def test_a_backbone_knows_itself_and_what_all_share(folder: str) -> None:
    for path in (ROOT / "adapters" / folder).glob("*.py"):
        assert set(IMPORT.findall(path.read_text())) <= {folder, "common"}, path
