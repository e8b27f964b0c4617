"""The recipes from the command line to their output folders."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cameo.backbone import get_backbone
from cameo.config import CameoConfig
from cameo.data import EmbeddedScenes, RGBDSequence
from cameo.errors import DataError
from cameo.training.checkpoints.folder import list_checkpoints
from cameo.training.data import build_dataset
from cameo.training.settings import load_config
from cameo.training.setup import add_lora, load_pipeline, planned_runs
from cameo.training.trained_weights import load_trained
from cameo.wrap import attach
from tests.helpers.sequences import write_sequence
from tests.helpers.training_runs import RecipeProcess, make_config, read_lines, same_files

WEIGHTS = "pytorch_lora_weights.safetensors"


def test_lora_on_an_rgbd_folder_end_to_end(tmp_path: Path) -> None:
    sequence = write_sequence(tmp_path / "office")
    out = tmp_path / "out"
    settings: dict[str, Any] = {
        "train_data_dir": str(sequence),
        "max_train_steps": 4,
        "max_overlap": 0.99,
        "validation_steps": 2,
        "report_to": "tensorboard",
        "compare_without_cameo": True,
        "hub_token": "hf_secret",
    }
    run = RecipeProcess("lora_finetune", out, **settings)
    assert run.wait() == 0, run.output

    expected = {
        "adapter",
        "pictures",
        "report.html",
        "table.md",
        "validation.json",
        "metrics.jsonl",
        "config.yaml",
        "logs",
    }
    assert {path.name for path in out.iterdir()} >= expected
    assert len(read_lines(out / "metrics.jsonl")) == 4
    assert len(read_lines(out / "without_cameo" / "metrics.jsonl")) == 4
    validations = json.loads((out / "validation.json").read_text())
    assert {name: [entry["step"] for entry in entries] for name, entries in validations.items()} == {
        "without CAMEO": [0, 2, 4],
        "with CAMEO": [0, 2, 4],
    }
    assert validations["with CAMEO"][0]["loss"] == validations["without CAMEO"][0]["loss"]
    table = (out / "table.md").read_text()
    assert table in run.output
    assert table.splitlines()[0] == "| | step 0 | without CAMEO | with CAMEO |"
    assert f"{validations['with CAMEO'][-1]['psnr_covisible']:.2f}" in table
    for name in ("views.png", "attention.png"):
        with Image.open(out / "pictures" / name) as picture:
            picture.load()
    assert (out / "without_cameo" / "adapter" / WEIGHTS).is_file()
    assert load_config(out / "config.yaml").train_data_dir == str(sequence)
    for path in out.rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes(), path
    assert "hf_secret" not in run.output

    # The adapter loads with plain diffusers into a fresh base of the same seed and gives the trained model's output.
    config = make_config(tmp_path)
    plain, untrained, trained = (load_pipeline(config).unet for _ in range(3))
    plain.load_lora_adapter(out / "adapter", prefix="unet", weight_name=WEIGHTS)
    add_lora(trained, config)
    load_trained(attach(trained, CameoConfig.load(out / "adapter")), list_checkpoints(out)[-1])
    args, kwargs = get_backbone("cat3d").example_inputs(plain)
    with torch.no_grad():
        outputs = [unet.eval()(*args, **kwargs).sample for unet in (plain, trained, untrained)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert sorted(path.name for path in (out / "adapter").iterdir()) == [
        "README.md",
        "cameo_config.json",
        "pictures",
        WEIGHTS,
    ]


@pytest.mark.slow
def test_comparison_stopped_in_its_first_run_goes_on(tmp_path: Path) -> None:
    settings = {"max_train_steps": 6, "compare_without_cameo": True, "checkpointing_steps": 100}
    whole = RecipeProcess("lora_finetune", tmp_path / "whole", **settings)
    out = tmp_path / "out"
    run = RecipeProcess("lora_finetune", out, **settings, signal_at=(2, signal.SIGTERM))
    assert run.wait() == 0
    assert "of the run without CAMEO; continue with resume_from_checkpoint=latest" in run.output
    assert not (out / "adapter").exists()
    run = RecipeProcess("lora_finetune", out, **settings, resume_from_checkpoint="latest")
    assert run.wait() == 0, run.output
    assert whole.wait() == 0
    for file in ("metrics.jsonl", "without_cameo/metrics.jsonl", "validation.json", "table.md"):
        assert (out / file).read_text() == (tmp_path / "whole" / file).read_text()
    assert same_files(out / "adapter" / WEIGHTS, tmp_path / "whole" / "adapter" / WEIGHTS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_processes(out: Path, **settings: Any) -> list[RecipeProcess]:
    """What `torchrun --nproc_per_node 2` starts, with the variables that it sets."""
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        RecipeProcess("lora_finetune", out, environment={**together, "RANK": rank, "LOCAL_RANK": rank}, **settings)
        for rank in "01"
    ]


@pytest.mark.slow
def test_two_processes_train_one_adapter_and_resume(tmp_path: Path) -> None:
    settings = {"max_train_steps": 5, "gradient_accumulation_steps": 2, "lora_dropout": 0.1}
    whole, out = tmp_path / "whole", tmp_path / "out"
    runs = two_processes(whole, **settings, compare_without_cameo=True)
    assert [run.wait() for run in runs] == [0, 0], runs[0].output + runs[1].output
    assert [run.output.count("adapter in") for run in runs] == [1, 0]
    assert "on 2 processes (cpu)" in runs[0].output
    assert len(read_lines(whole / "without_cameo" / "metrics.jsonl")) == 5
    history = read_lines(whole / "metrics.jsonl")
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(entry["loss"]) and np.isfinite(entry["alignment_loss"]) for entry in history)

    # Two processes see in a step the samples that one sees with twice the accumulation.
    alone = RecipeProcess("lora_finetune", tmp_path / "alone", max_train_steps=2, gradient_accumulation_steps=4)

    # Only the first process receives the signal, since only it keeps records; both must stop, at the same step.
    runs = two_processes(out, **settings, signal_at=(2, signal.SIGTERM))
    assert [run.wait() for run in runs] == [0, 0], runs[0].output + runs[1].output
    assert "continue with resume_from_checkpoint=latest" in runs[0].output
    assert len(read_lines(out / "metrics.jsonl")) == 3
    runs = two_processes(out, **settings, resume_from_checkpoint="latest")
    assert [run.wait() for run in runs] == [0, 0], runs[0].output + runs[1].output
    assert read_lines(out / "metrics.jsonl") == history
    assert same_files(out / "adapter" / WEIGHTS, whole / "adapter" / WEIGHTS)

    assert alone.wait() == 0, alone.output
    seen = [entry["supervised"] for entry in read_lines(tmp_path / "alone" / "metrics.jsonl")]
    assert seen == [entry["supervised"] for entry in history[:2]]


def test_planned_runs_of_a_comparison(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert planned_runs(config) == {"with CAMEO": config}
    assert list(planned_runs(make_config(tmp_path, loss_weight=0.0))) == ["without CAMEO"]
    both = planned_runs(make_config(tmp_path, compare_without_cameo=True))
    assert {name: (run.loss_weight, run.output_dir) for name, run in both.items()} == {
        "without CAMEO": (0.0, str(tmp_path / "without_cameo")),
        "with CAMEO": (config.loss_weight, str(tmp_path)),
    }
    resumed = {"compare_without_cameo": True, "resume_from_checkpoint": "latest"}
    with pytest.raises(DataError, match="holds no complete checkpoint-N"):
        planned_runs(make_config(tmp_path, **resumed))
    done = tmp_path / "without_cameo" / "checkpoint-6"
    done.mkdir(parents=True)
    (done / "trainer_state.json").write_text("{}")
    again = planned_runs(make_config(tmp_path, **resumed))
    assert [run.resume_from_checkpoint for run in again.values()] == ["latest", None]
    with pytest.raises(DataError, match=r"without_cameo holds checkpoints of an earlier run"):
        planned_runs(make_config(tmp_path, compare_without_cameo=True))
    assert len(planned_runs(make_config(tmp_path, compare_without_cameo=True, overwrite_output_dir=True))) == 2
    with pytest.raises(ValueError, match="there are two runs; expected latest"):
        planned_runs(make_config(tmp_path, compare_without_cameo=True, resume_from_checkpoint="checkpoint-6"))


def test_data_folders_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", str(tmp_path / "cache"))
    sequence = write_sequence(tmp_path / "office")
    (sequence / "camera-intrinsics.txt").unlink()
    matrix = [[60.0, 0.0, 32.0], [0.0, 60.0, 24.0], [0.0, 0.0, 1.0]]
    settings = {"train_data_dir": str(sequence), "intrinsics": matrix, "depth_scale": 500.0}
    source = build_dataset(make_config(tmp_path, **settings), "train").source
    assert source.format == "rgbd"
    assert source.views().depth.unique().tolist() == [4.0]
    meshes = tmp_path / "objects"
    (meshes / "chairs").mkdir(parents=True)
    for number in range(9):
        lines = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 1 2 4\n"
        (meshes / "chairs" / f"{number}.obj").write_text(lines)
    settings = {"train_data_dir": str(meshes), "num_scenes": 1, "views_per_scene": 2, "resolution": 8}
    source = build_dataset(make_config(tmp_path, **settings), "train").source
    assert isinstance(source, EmbeddedScenes)
    assert len(source.meshes) == 8


def test_sequence_of_this_file_is_what_the_reader_expects(tmp_path: Path) -> None:
    views = RGBDSequence(write_sequence(tmp_path / "office"), size=(32, 32)).views()
    assert len(views) == 10
    assert views.depth.unique().tolist() == [2.0]
