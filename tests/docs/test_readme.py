"""What the README says is so: its commands exist once each, its first example runs, its links lead somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cameo.backbone import get_backbone

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_links_lead_somewhere() -> None:
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("benchmarks/**/*.md"),
    ]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_test_that_the_readme_names_exists() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)[\[`]", README)
    assert len(set(named)) > 10
    for name in named:
        assert re.search(rf"def {name}\(", code), name


def test_every_command_of_a_page_names_a_script() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    modules = set(re.findall(r"python -m (benchmarks[.\w]*)", text))
    files = set(re.findall(r"python ((?:benchmarks|recipes|tests)/[/.\w]*)", text))
    assert {"benchmarks.pages", "benchmarks.convergence.study"} <= modules
    assert "recipes/lora_finetune.py" in files
    missing = {name for name in modules if not (ROOT / (name.replace(".", "/") + ".py")).is_file()}
    missing |= {name for name in files if not (ROOT / name).is_file()}
    assert not missing


def test_contributing_lists_the_rooms_in_their_order() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = re.search(r"\| rooms \| .*?\n\n", page, re.S)
    assert table
    lines = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table[0].strip().splitlines()[2:]]
    floors = tomllib.loads((ROOT / "tests" / "helpers" / "rooms.toml").read_text(encoding="utf-8"))["floors"]
    assert [sorted(line) for line in lines] == [*map(sorted, floors), ["benchmarks", "recipes"]]
