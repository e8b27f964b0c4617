"""What cameo 0.1.0 saved loads, gives the recorded numbers, and continues; the files are in tests/assets."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import cameo
from cameo import Correspondence
from cameo.backbone import get_backbone
from cameo.data.matches import MatchReader
from tests.helpers.training_runs import RECIPES, fresh_accelerate, read_lines, scene_cache

SAVED = Path(__file__).parents[1] / "assets" / "saved_by_0.1.0"
# Numbers of order 1, recorded with AVX-512; the largest difference seen with AVX2 or without vectors is 9.6e-7.
OUTPUT = {"rtol": 1e-4, "atol": 1e-5}
# The weights that a run starts from are drawn, and its steps add up what processors round differently.
LOSS = 1e-3

UNET = {"block_out_channels": [32, 32], "heads": 2, "norm_num_groups": 8}


@dataclass(frozen=True)
class Case:
    """A backbone as it was saved: the preset and options that build its base, and the views of its example inputs."""

    backbone: str
    preset: str
    views: int
    options: dict[str, Any] = field(default_factory=dict)

    def base(self) -> nn.Module:
        """The denoiser, with weights that no random generator of another version can change."""
        return filled(get_backbone(self.backbone).build(self.preset, **self.options).denoiser)


CASES = {
    "cat3d-unet": Case("cat3d", "tiny", 2, {"image_size": 32, **UNET}),
    "cat3d-transformer": Case("cat3d", "transformer-tiny", 2, {"width": 32, "heads": 2, "blocks": 2}),
    "mvdream-text": Case("mvdream", "tiny", 2, UNET),
    "mvdream-image": Case("mvdream", "imagedream-tiny", 3, UNET),
    "zero123plus": Case("zero123plus", "tiny", 7, UNET),
    "sv3d-temporal": Case("sv3d", "tiny", 3, {"block_out_channels": [32, 32], "heads": 2}),
    "sv3d-inflated": Case("sv3d", "tiny", 3, {"block_out_channels": [32, 32], "heads": 2}),
}
every_case = pytest.mark.parametrize("name", CASES)
# Of class paths and settings that have been renamed since.
old_names = pytest.mark.filterwarnings("ignore::FutureWarning")


class Net(nn.Module):
    """A multi-view model that neither diffusers nor an adapter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key = (layer(tokens).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.to_q, self.to_k))
        return nn.functional.scaled_dot_product_attention(query, key, key)


def filled(module: nn.Module) -> nn.Module:
    """Fill a module with weights of the usual sizes that are the same on every machine."""
    for number, (name, parameter) in enumerate(sorted(module.named_parameters())):
        place = torch.arange(parameter.numel())
        values = (31 * place**2 + 7919 * place + 104729 * (number + 1)) % 10007 / 10007 - 0.5
        values = values.reshape(parameter.shape)
        inputs = parameter[0].numel() if parameter.ndim > 1 else 0
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = (values * (12 / inputs) ** 0.5 if inputs else 0.1 * values + is_norm).to(parameter)
    return module


def matches(grids: tuple[tuple[int, int], ...]) -> Correspondence:
    """Token t of view i matches token t of view i + 1 + t, counted round; layers along the views can have that too."""
    views, most = len(grids), max(height * width for height, width in grids)
    index = torch.full((1, views, views, most), -1)
    for i, (height, width) in enumerate(grids):
        for t in range(height * width):
            j = (i + 1 + t) % views
            if j != i:
                index[0, i, j, t] = t % (grids[j][0] * grids[j][1])
    return Correspondence(index, grids)


def tensors_of(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in (output.values() if isinstance(output, dict) else output) for tensor in tensors_of(part)]


def numbers(denoiser: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> list[float]:
    """Mean, mean square and some of the elements of an output."""
    torch.manual_seed(7)
    args, kwargs = copy.deepcopy(inputs)
    with torch.no_grad():
        flat = torch.cat([tensor.flatten() for tensor in tensors_of(denoiser.eval()(*args, **kwargs))]).double()
    some = flat[:: max(1, len(flat) // 8)][:8]
    return [flat.mean().item(), flat.square().mean().item(), *some.tolist()]


def alignment(model: cameo.CameoModel, inputs: tuple[tuple[Any, ...], dict[str, Any]], views: int) -> list[float]:
    """The alignment loss, and the root mean square of its gradient on the weights that make the supervised queries."""
    args, kwargs = copy.deepcopy(inputs)
    model.requires_grad_(True)
    model(*args, **kwargs, correspondence=matches(model.token_grids(32, 32, num_views=views)))
    loss = model.alignment_loss
    (gradient,) = torch.autograd.grad(loss, [dict(model.named_parameters())[_query(model)]])
    return [loss.item(), gradient.double().square().mean().sqrt().item()]


def _query(model: cameo.CameoModel) -> str:
    layer = model.cameo_config.layers[0]
    return next(name for name, _ in model.named_parameters() if f"{layer}.to_q" in name and name.endswith("weight"))


def recorded() -> dict[str, Any]:
    return json.loads((SAVED / "numbers.json").read_text())


def check(found: list[float], name: str) -> None:
    expected = torch.tensor(recorded()[name], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, **OUTPUT)


# What each entry of numbers.json was computed by; the test computes it again.


def adapter_numbers(name: str) -> list[float]:
    case = CASES[name]
    model = cameo.from_pretrained(SAVED / name / "adapter", base_model=case.base())
    inputs = get_backbone(case.backbone).example_inputs(model.base_model)
    return [*numbers(model, inputs), *alignment(model, inputs, case.views)]


def bundled_numbers() -> list[float]:
    model = cameo.from_pretrained(SAVED / "bundled" / "adapter")
    inputs = get_backbone("cat3d").example_inputs(model.base_model)
    return [*numbers(model, inputs), *alignment(model, inputs, views=2)]


def pipeline_numbers(name: str, folder: Path) -> list[float]:
    """Of a saved pipeline; its weights are those of the base, which are not kept here but put in again."""
    case = CASES[name]
    shutil.copytree(SAVED / name / "pipeline", folder)
    state = {key: value.contiguous() for key, value in case.base().state_dict().items()}
    save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    pipeline = get_backbone(case.backbone).load(str(folder))
    return numbers(pipeline.denoiser, get_backbone(case.backbone).example_inputs(pipeline.denoiser))


def full_numbers() -> list[float]:
    model = cameo.from_pretrained(SAVED / "full")
    inputs = get_backbone("cat3d").example_inputs(model.base_model)
    return [*numbers(model, inputs), *alignment(model, inputs, views=2)]


def module_numbers() -> list[float]:
    model = cameo.from_pretrained(SAVED / "module", base_model=Net())
    tokens = torch.linspace(-1, 1, 2 * 6 * 8).reshape(2, 6, 8)
    return numbers(model, ((tokens,), {}))


@every_case
def test_an_adapter_and_its_head(name: str) -> None:
    check(adapter_numbers(name), f"{name}/adapter")


@old_names
@every_case
def test_a_pipeline(name: str, tmp_path: Path) -> None:
    check(pipeline_numbers(name, tmp_path / "pipeline"), f"{name}/pipeline")


@old_names
@pytest.mark.parametrize("computed", [bundled_numbers, full_numbers, module_numbers])
def test_other_forms(computed: Callable[[], list[float]]) -> None:
    check(computed(), computed.__name__)


def test_the_files_hold_the_names_of_their_time() -> None:
    """A class path, keys and settings that were named otherwise later; without them the other tests prove little."""
    assert '"cameo.adapters.joint_dit"' in (SAVED / "cat3d-transformer" / "pipeline" / "model_index.json").read_text()
    assert '"cameo.adapters.sv3d_unet"' in (SAVED / "sv3d-temporal" / "pipeline" / "model_index.json").read_text()
    for path in SAVED.rglob("cameo_config.json"):
        assert {"normalise", "weight"} <= json.loads(path.read_text()).keys()
    state = json.loads((SAVED / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert {"normalise", "weight", "reduction"} <= state["settings"].keys()
    assert "hub_licence: apache-2.0" in (SAVED / "run" / "config.yaml").read_text()


@old_names
def test_a_run_continues_with_the_recorded_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    run = tmp_path / "run"
    shutil.copytree(SAVED / "run", run)
    arguments = [f"config={run / 'config.yaml'}", f"output_dir={run}", "resume_from_checkpoint=latest"]
    with fresh_accelerate():
        runpy.run_path(str(RECIPES / "lora_finetune.py"))["main"](arguments)
    found = read_lines(run / "metrics.jsonl")
    assert len(found) == 4
    for entry, expected in zip(found, recorded()["run"], strict=True):
        assert {key: entry[key] for key in expected} == pytest.approx(expected, rel=LOSS)


def test_a_folder_of_matches() -> None:
    expected = recorded()["matches"]
    grids = tuple(map(tuple, expected["grids"]))
    found = MatchReader(SAVED / "matches").read(expected["scene"], expected["views"], grids)
    assert found is not None
    assert found.index.tolist() == expected["index"]
