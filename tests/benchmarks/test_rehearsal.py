"""Runs of all backbones on a pretended accelerator: none mixes devices or types, and a step does not wait anew."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from benchmarks.step import pretend_device
from cameo.tables import markdown_table
from tests.helpers.pretended_steps import run_apart
from tests.helpers.rehearsal import STEPS, SUBJECTS
from tests.helpers.training_runs import read_lines, same_files, scene_cache

pytestmark = pytest.mark.skipif(not pretend_device.available(), reason="devices made in Python need torch 2.10")

# CAT3D calls the fewest operators of its own.
TIERS = [pytest.param(name, marks=pytest.mark.long if "cat3d" in name else pytest.mark.slow) for name in SUBJECTS]

# Where the host waits in a step, and how often, for every backbone.
WAITS = {
    # Tensors of the batch: to CUDA they are copied in the background, beside the step before.
    "cameo/data/batches.py _moved": 5,
    "cameo/memory.py __init__": 1,  # how many rows there are, which were counted before the forward
    "cameo/training/trainer.py _exchange": 1,  # the figures of the step
}
# What a backbone waits for beside. Maps of positions are kept from step to step, but not on a device made in Python.
MORE_WAITS: dict[str, dict[str, int]] = {
    "cat3d": {"adapters/common/positions.py __call__": 1, "cameo/geometry/cameras.py _check_camera_values": 2},
    "cat3d-transformer": {"cameo/geometry/cameras.py _check_camera_values": 2},
    "mvdream": {
        "adapters/common/positions.py __call__": 1,
        "cameo/geometry/cameras.py _check_camera_values": 1,
        "cameo/geometry/orbits.py orbit_centre": 1,
        "cameo/geometry/orbits.py <genexpr>": 2,
        "adapters/mvdream/cameras.py _vectors": 2,
        "adapters/mvdream/cameras.py camera_vectors": 1,
        "adapters/mvdream/cameras.py _up_to_z": 1,
        "adapters/mvdream/pipeline.py training_inputs": 1,
    },
    "zero123plus": {
        "adapters/common/positions.py __call__": 2,
        "adapters/zero123plus/pipeline.py training_inputs": 1,
        "adapters/zero123plus/pipeline.py _noise_from": 2,
    },
    "sv3d": {
        "adapters/common/positions.py __call__": 1,
        "adapters/sv3d/pipeline.py noise_levels": 2,
        "cameo/geometry/orbits.py orbit_centre": 1,
        "cameo/geometry/orbits.py <genexpr>": 2,
        "cameo/geometry/orbits.py spherical_angles": 1,
    },
}
# Launches of the last step, of the kinds of training.
LAUNCHES: dict[str, dict[str, int]] = {
    "cat3d": {"lora": 3150, "full": 4300},
    "cat3d-transformer": {"lora": 2800, "full": 3300},
    "mvdream": {"lora": 3700, "full": 3800},
    "zero123plus": {"lora": 5250, "full": 4950},
    "sv3d": {"lora": 6900, "full": 7100},
}


@pytest.fixture(scope="module", params=TIERS)
def rehearsal(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Any]]:
    """Name of a backbone, the folder with its runs, and what was counted in them."""
    folder = tmp_path_factory.mktemp(request.param)
    printed = run_apart("tests.helpers.rehearsal", request.param, str(folder), CAMEO_CACHE=scene_cache())
    return request.param, folder, json.loads(printed)


def test_runs_on_a_device_end_with_finite_figures_and_all_their_files(
    rehearsal: tuple[str, Path, dict[str, Any]],
) -> None:
    _, folder, found = rehearsal
    for kind, saved in {"lora": "adapter", "full": "model"}.items():
        output, metrics = folder / kind, found[kind]["metrics"]
        assert [entry["step"] for entry in metrics] == list(range(1, STEPS + 1))
        assert all(entry["supervised"] > 0 for entry in metrics)
        assert all(math.isfinite(entry[name]) for entry in metrics for name in ("loss", "alignment_loss"))
        validations = read_lines(output / "validations.jsonl")
        assert [entry["step"] for entry in validations] == [0, STEPS]
        assert all(math.isfinite(entry[name]) for entry in validations for name in ("loss", "psnr_all"))
        assert (output / "pictures" / "views.png").stat().st_size > 1000
        assert (output / "report.html").is_file()
        files = list((output / saved).rglob("*.safetensors"))
        assert files
        assert all(tensor.isfinite().all() for file in files for tensor in load_file(file).values())
    weights = "pytorch_lora_weights.safetensors"
    assert same_files(folder / "lora" / "adapter" / weights, folder / "lora" / f"checkpoint-{STEPS}" / weights)
    if "resumed" in found:
        last = found["full"]["metrics"][-1]
        assert found["resumed"]["metrics"][-1] == last
        assert len(found["resumed"]["steps"]) == 1


def test_a_step_waits_where_it_did_before_and_launches_as_little(rehearsal: tuple[str, Path, dict[str, Any]]) -> None:
    subject, _, found = rehearsal
    rows = [
        [subject, kind, number, step["launches"], sum(step["waits"].values())]
        for kind, run in found.items()
        for number, step in enumerate(run["steps"], start=1)
    ]
    print(markdown_table(["backbone", "run", "step", "launches", "waits"], rows))
    known = Counter(WAITS) + Counter(MORE_WAITS[subject])
    for kind, most in LAUNCHES[subject].items():
        step = found[kind]["steps"][-1]  # the first ones check what their attention calls, too
        counted = Counter[str]()
        for line, count in step["waits"].items():
            counted[place(line)] += count
        new = {line: count for line, count in step["waits"].items() if counted[place(line)] > known[place(line)]}
        assert not new, f"{subject}, {kind}: a step waits for the device where it did not, or more often: {new}"
        assert most / 2 < step["launches"] <= most, (
            f"{subject}, {kind}: {step['launches']} launches in a step, more than {most}"
        )


def place(wait: str) -> str:
    """File and function of a wait, without the number of the line."""
    where = wait.partition(" at ")[2]
    file, _, rest = where.partition(":")
    return f"{file} {rest.split()[1]}" if rest else where
