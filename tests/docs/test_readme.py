"""What the README and the pages say is so: commands exist once each, the first example runs, links lead somewhere."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from cameo.backbone import get_backbone
from cameo.hub.card import PAPER
from tests.helpers.pages import DOCS, PAGES, ROOT, text_of

README = text_of("README.md")


def test_two_commands_install_and_run() -> None:
    blocks = [block.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)]
    assert len(blocks) == 2
    assert all(block.startswith("python3 -m venv") and "\n" not in block for block in blocks)
    assert blocks[0].endswith("python recipes/lora_finetune.py")
    assert blocks[1].endswith("python -m pytest")


def test_first_example_runs(batch: dict[str, Any]) -> None:
    pipeline = get_backbone("cat3d").build("tiny")
    inputs = pipeline.training_inputs(batch, generator=torch.Generator().manual_seed(0))
    names = {
        "torch": torch,
        "pipeline": pipeline,
        "loader": [batch],
        "height": 64,
        "width": 64,
        "args": inputs.args,
        "kwargs": inputs.kwargs,
        "mse": F.mse_loss,
        "target": inputs.target.flatten(0, 1),
    }
    example = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    exec(example, names)
    assert names["loss"].requires_grad
    optimized = {id(one) for group in names["optimizer"].param_groups for one in group["params"]}
    assert {id(one) for one in names["model"].alignment_heads.parameters()} <= optimized
    assert names["unet"] is pipeline.unet


def test_the_readme_is_short_and_shows_one_figure() -> None:
    assert len(README.splitlines()) <= 120
    assert len(re.findall(r"!\[", README)) == 1


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, *ROOT.glob("benchmarks/**/*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_test_that_a_page_names_exists() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)[\[`]", page.read_text(encoding="utf-8"))}
    assert len(named) > 10
    for name in named:
        assert re.search(rf"def {name}\(", code), name


def test_every_picture_is_in_the_gallery() -> None:
    gallery = text_of("docs/gallery.md")
    shown = re.findall(r"!\[[^\]]+\]\(images/([^)]+)\)", gallery)
    assert sorted(shown) == sorted(path.name for path in (DOCS / "images").iterdir())


def test_every_command_of_a_page_names_a_script() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in [*PAGES, *ROOT.glob("benchmarks/**/*.md")])
    modules = set(re.findall(r"python -m (benchmarks[.\w]*)", text))
    files = set(re.findall(r"python ((?:benchmarks|docs|recipes|tests)/[/.\w]*)", text))
    assert {"benchmarks.pages", "benchmarks.convergence.study"} <= modules
    assert "recipes/lora_finetune.py" in files
    places = {name: ROOT / name.replace(".", "/") for name in modules}
    missing = {
        name
        for name, place in places.items()
        if not place.with_suffix(".py").is_file() and not (place / "__main__.py").is_file()
    }
    missing |= {name for name in files if not (ROOT / name).is_file()}
    assert not missing


def test_contributing_lists_the_rooms_in_their_order() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = re.search(r"\| rooms \| .*?\n\n", page, re.S)
    assert table
    lines = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table[0].strip().splitlines()[2:]]
    floors = tomllib.loads((ROOT / "tests" / "helpers" / "rooms.toml").read_text(encoding="utf-8"))["floors"]
    assert [sorted(line) for line in lines] == [*map(sorted, floors), ["benchmarks", "recipes"]]


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= citation.keys()
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["identifiers"][0]["value"] == f"arXiv:{PAPER}"
    assert paper["url"].endswith(PAPER)
    assert f"## {project['version']} (unreleased)" in text_of("CHANGELOG.md")
