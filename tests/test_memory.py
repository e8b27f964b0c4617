"""Loaded models give the output of the saved ones bit for bit, wherever a file or a model holds its tensors."""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import ModelMixin
from diffusers.models import modeling_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cameo
from cameo.backbone import get_backbone
from cameo.hub.publish import verify
from cameo.memory import ALIGNMENT, align, in_precision, placed_like
from tests.helpers import backbone_checks as checks


def places(module: nn.Module) -> set[int]:
    return {tensor.data_ptr() % ALIGNMENT for tensor in chain(module.parameters(), module.buffers())}


def shift(path: Path) -> None:
    """Lengthen the header of a safetensors file, so that its tensors begin 8 bytes after a multiple of 64."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
    for length in range(0, ALIGNMENT, 8):
        save_file(tensors, path, metadata={**metadata, "padding": "-" * length})
        if (8 + int.from_bytes(path.read_bytes()[:8], "little")) % ALIGNMENT == 8:
            return
    raise AssertionError("a longer header does not move the tensors")


def misplace(module: nn.Module) -> nn.Module:
    """Move all tensors to 8 bytes after a multiple of 64, as a file may hold them."""
    like = torch.zeros(4)[2:]
    for tensor in chain(module.parameters(), module.buffers()):
        tensor.data = placed_like(tensor.data, like)
    return module


def output(backbone: str, denoiser: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return checks.run(denoiser.eval(), get_backbone(backbone).example_inputs(denoiser))


# Of the backbones' small models these are the ones whose outputs were seen to differ, by 1e-6.
SENSITIVE = pytest.mark.parametrize("backbone", ["sv3d", "zero123plus"])


@SENSITIVE
def test_a_loaded_pipeline_gives_the_output_of_the_saved_one(backbone: str, tmp_path: Path) -> None:
    built = checks.build_pipeline(backbone, "tiny")
    built.save_pretrained(tmp_path)
    shift(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = get_backbone(backbone).load(str(tmp_path)).denoiser
    assert places(loaded) == {0}
    assert checks.same(output(backbone, loaded), output(backbone, built.denoiser))


def test_a_full_model_of_diffusers_is_loaded_into_memory_of_its_own(tmp_path: Path) -> None:
    unet = get_backbone("mvdream").build("tiny", block_out_channels=(32, 32)).denoiser
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1"
    folder = cameo.wrap(unet, layer=layer, layout="b (v h w)").save_pretrained(tmp_path)  # without a backbone
    shift(folder / "diffusion_pytorch_model.safetensors")
    assert places(cameo.from_pretrained(folder).base_model) == {0}


def test_what_is_pushed_reproduces_a_model_that_lies_anywhere(tmp_path: Path) -> None:
    model = cameo.wrap(misplace(checks.build_pipeline("sv3d", "tiny").denoiser), backbone="sv3d")
    assert places(model.base_model) == {8}
    model.cameo_config.base_model = "preset:tiny"
    folder = model.save_pretrained(tmp_path / "model")
    loaded: list[Any] = []

    def load(base: nn.Module | None) -> nn.Module:
        loaded.append(cameo.from_pretrained(folder, base_model=base).unwrap())
        return loaded[-1]

    verify(model.base_model, model.cameo_config, folder, load)  # raises where the output differs in one bit
    assert places(loaded[0]) == {8}


def test_tensors_that_share_memory_still_do() -> None:
    whole = torch.arange(8.0)
    first, second, aligned = whole[1:], whole[1:], torch.zeros(2)
    place = aligned.data_ptr()
    align([first, second, aligned])
    assert first.data_ptr() == second.data_ptr()
    assert first.data_ptr() % ALIGNMENT == 0
    assert first.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert aligned.data_ptr() == place


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_copy_elsewhere_keeps_values_and_order(order: torch.memory_format) -> None:
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=order)
    found = placed_like(tensor, torch.zeros(20)[3:])
    assert found.data_ptr() % ALIGNMENT == 12
    assert torch.equal(found, tensor)
    assert found.stride() == tensor.stride()
    assert placed_like(tensor, copy.deepcopy(tensor)) is tensor


def test_half_precision_leaves_what_the_model_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_utils.logger, "warning", pytest.fail)

    class Model(ModelMixin):
        _keep_in_fp32_modules: ClassVar = ["norm", "table"]

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.norm_out = nn.LayerNorm(2), nn.Linear(2, 2)
            self.table = nn.Parameter(torch.zeros(2))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    model = Model()
    assert in_precision(model, torch.bfloat16) is model
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {"norm.weight", "norm.bias", "table"}
    assert dtypes["norm_out.weight"] == torch.bfloat16
    assert dtypes["count"] == torch.int64
    assert in_precision(nn.Linear(2, 2), torch.float16).bias.dtype == torch.float16
