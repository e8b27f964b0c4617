"""A wheel, installed outside the repository: what it runs of the README without the files of a clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.helpers.training_runs import scene_cache

ROOT = Path(__file__).parents[2]
RUN = [
    "num_scenes=2",
    "num_validation_scenes=1",
    "num_validation_samples=1",
    "train_batch_size=1",
    "max_train_steps=2",
    "validation_steps=2",
    "compare_without_cameo=false",
    "report_to=none",
    "output_dir=run",
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that holds the wheel, and borrows the packages of this one by its path alone."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    source = folder / "source"  # a build leaves its files beside what it builds
    for name in ("cameo", "adapters", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, "wheel", *build, str(source)], check=True, cwd=folder)
    (wheel,) = folder.glob("cameo_diffusion-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    # Paths alone: an environment below a path would also run the hook by which it finds this clone.
    borrowed = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    return folder / "venv"


def run(environment: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment in a folder outside of the repository."""
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables = {**outside, "CAMEO_CACHE": scene_cache(), "HF_HUB_OFFLINE": "1"}
    program = [str(environment / "bin" / command[0]), *command[1:]]
    return subprocess.run(program, capture_output=True, text=True, cwd=folder, env=variables, check=False)


@pytest.mark.slow
def test_a_wheel_trains_and_shows_what_it_trained(environment: Path, tmp_path: Path) -> None:
    place = run(environment, tmp_path, "python", "-c", "import cameo; print(cameo.__file__)").stdout
    assert place.startswith(str(environment))
    named = run(environment, tmp_path, "cameo", "lora", "config=lora_cat3d_sd21", "--print-config")
    assert "pretrained_model_name_or_path:" in named.stdout, named.stderr
    trained = run(environment, tmp_path, "cameo", "lora", *RUN)
    assert trained.returncode == 0, trained.stderr
    assert "Traceback" not in trained.stderr
    assert "Warning" not in trained.stderr
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    explored = run(environment, tmp_path, "cameo", "explore", "run", "num_scenes_shown=1", "noise_levels=[1.0]")
    assert explored.returncode == 0, explored.stderr
    assert (tmp_path / "explore.html").stat().st_size > 10_000
