"""The site builds offline without a warning; it holds every public name, setting, command and file that it links to."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

import cameo
from cameo.commands.main import COMMANDS
from cameo.settings.convert import setting_fields
from cameo.training.settings import TrainingConfig
from tests.helpers.pages import DOCS, PAGES, ROOT

NEEDED = ("sphinx", "furo", "myst_parser")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f'needs {", ".join(MISSING)}: pip install -e ".[docs]"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "-d", str(folder / "doctrees"), "docs", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def read(site: Path, page: str) -> str:
    return unescape((site / page).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_reference_holds_everything(site: Path) -> None:
    names = read(site, "reference/names.html")
    assert [name for name in cameo.__all__ if f'id="cameo.{name}"' not in names] == []
    text = re.sub(r"<[^>]+>", "", read(site, "reference/settings.html"))
    assert [name for name in setting_fields(TrainingConfig) if f"{name}=" not in text] == []
    commands = read(site, "reference/commands.html")
    assert [name for name in COMMANDS if f"<h2>cameo {name}<" not in commands] == []


@pytest.mark.slow
def test_every_name_of_a_module_that_a_page_imports_is_in_the_reference(site: Path) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    imported = {
        f"{module}.{name}"
        for module, names in re.findall(r"^from (cameo(?:\.\w+)*) import ([\w, ]+)$", text, re.M)
        for name in names.split(", ")
    }
    reference = read(site, "reference/modules.html") + read(site, "reference/names.html")
    without = [name for name in sorted(imported) if f'id="{name}"' not in reference]
    assert len(imported) > 15
    assert without == []


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if "_static" not in page.parts]
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    broken = []
    for page in pages:
        for target in re.findall(r'(?:href|src)="([^"#?]+)[^"]*"', page.read_text(encoding="utf-8")):
            if not re.match(r"\w+:", target) and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(site)}: {target}")
    assert broken == []
