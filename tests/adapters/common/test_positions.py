"""The map of positions of models that are trained from scratch: its values, and what it survives."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn
from torch.utils.hooks import RemovableHandle

from cameo.adapters.common.positions import PositionMap, get_position, set_position, sincos
from cameo.adapters.zero123plus.denoiser import TilePositionMap
from cameo.backbone import get_backbone
from tests.helpers.batches import make_batch

NARROW: dict[str, Any] = {"block_out_channels": (32, 32), "heads": 2}
PRESETS = [
    ("cat3d", "tiny"),
    ("mvdream", "tiny"),
    ("mvdream", "imagedream-tiny"),
    ("zero123plus", "tiny"),
    ("sv3d", "tiny"),
]
every_family = pytest.mark.parametrize(("backbone", "preset"), PRESETS, ids=str)


def build(backbone: str, preset: str, **options: Any) -> Any:
    torch.manual_seed(0)
    built = get_backbone(backbone).build(preset, **NARROW, **options)
    built.unet.eval()
    return built


def run(backbone: str, unet: nn.Module) -> torch.Tensor:
    args, kwargs = get_backbone(backbone).example_inputs(unet)
    torch.manual_seed(3)  # Zero123++ draws noise
    with torch.no_grad():
        return unet(*args, **kwargs).sample


def added(unet: nn.Module, height: int, width: int) -> torch.Tensor:
    """What the map adds to the first features of a grid."""
    image = torch.zeros(1, unet.conv_in.in_channels, height, width)
    with torch.no_grad():
        return (unet.conv_in(image) - unet.conv_in.bias[:, None, None])[0]


def test_values_by_hand() -> None:
    y, x = 2.0, 5.0
    rates = (1.0, 10000**-0.5)
    expected = [f(v * rate) for v in (y, x) for f in (math.sin, math.cos) for rate in rates]
    found = sincos(torch.tensor([0.0, 2.0]), torch.tensor([5.0]), 8)
    assert found.shape == (8, 2, 1)
    torch.testing.assert_close(found[:, 1, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@every_family
def test_presets_have_the_map_and_their_weights_are_the_same(backbone: str, preset: str) -> None:
    with_map, without = build(backbone, preset), build(backbone, preset, position="none")
    assert (with_map.config.position, without.config.position) == ("sincos", "none")
    assert (get_position(with_map.unet), get_position(without.unet)) == ("sincos", "none")
    state = without.unet.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in with_map.unet.state_dict().items())
    assert len(state) == len(with_map.unet.state_dict())
    assert not torch.equal(run(backbone, with_map.unet), run(backbone, without.unet))
    get_backbone(backbone).set_position(without.unet, "sincos")
    assert torch.equal(run(backbone, with_map.unet), run(backbone, without.unet))


def test_every_unet_preset_of_a_family_has_it() -> None:
    for backbone in ("cat3d", "mvdream", "sv3d", "zero123plus"):
        presets = get_backbone(backbone).presets
        assert {name: values.get("position") for name, values in presets.items()} == {
            name: None if "transformer" in name else "sincos" for name in presets
        }


def test_the_map_is_that_of_any_grid_and_precision() -> None:
    unet = build("cat3d", "tiny").unet
    for height, width in ((8, 8), (4, 6)):  # the preset's is 16 x 16
        expected = sincos(torch.arange(height), torch.arange(width), 32)
        torch.testing.assert_close(added(unet, height, width), expected.float(), rtol=1e-6, atol=1e-6)
    half = unet.to(torch.bfloat16).conv_in(torch.zeros(1, unet.conv_in.in_channels, 4, 4, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16


def test_another_image_size_trains_and_samples() -> None:
    built = build("cat3d", "tiny")
    batch = make_batch(samples=1, views=2, size=32)  # the preset is made for 64
    inputs = built.training_inputs(batch)
    built.denoising_loss(built.unet(*inputs.args, **inputs.kwargs), inputs).mean().backward()
    assert built.unet.conv_in.weight.grad.abs().sum() > 0
    assert built.sample(batch, num_inference_steps=1).isfinite().all()


@every_family
def test_saved_with_the_pipeline(backbone: str, preset: str, tmp_path: Path) -> None:
    built = build(backbone, preset)
    built.save_pretrained(tmp_path)
    again = get_backbone(backbone).load(str(tmp_path))
    assert again.config.position == get_position(again.unet) == "sincos"
    assert torch.equal(run(backbone, again.unet.eval()), run(backbone, built.unet))
    index = tmp_path / "model_index.json"
    index.write_text("".join(line for line in index.read_text().splitlines(True) if '"position"' not in line))
    before = get_backbone(backbone).load(str(tmp_path))  # as a pipeline that was saved before there was a map
    assert before.config.position == get_position(before.unet) == "none"


def test_what_is_saved_is_what_the_unet_does(tmp_path: Path) -> None:
    built = build("cat3d", "tiny")
    set_position(built.unet, "none")
    built.save_pretrained(tmp_path)
    assert get_position(get_backbone("cat3d").load(str(tmp_path)).unet) == "none"


@every_family
def test_a_second_pipeline_adds_it_once_or_takes_it_off(backbone: str, preset: str) -> None:
    built = build(backbone, preset)
    expected = run(backbone, built.unet)
    config = {name: value for name, value in built.config.items() if name in ("condition", "reference_size")}
    again = type(built)(built.unet, built.scheduler, position="sincos", **config)
    assert torch.equal(run(backbone, again.unet), expected)
    assert len(again.unet.conv_in._forward_hooks) == 1
    without = type(built)(built.unet, built.scheduler, **config)
    assert get_position(without.unet) == "none"
    assert not without.unet.conv_in._forward_hooks
    assert not torch.equal(run(backbone, without.unet), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@every_family
def test_copies(backbone: str, preset: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    unet = build(backbone, preset).unet
    expected = run(backbone, unet)
    twin = copied(unet)
    assert torch.equal(run(backbone, twin), expected)
    get_backbone(backbone).set_position(twin, "none")
    assert not torch.equal(run(backbone, twin), expected)
    assert torch.equal(run(backbone, unet), expected)


def test_a_loaded_hook_is_not_overwritten_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch numbers hooks per process; a new one with the number of one that was loaded would take its place."""
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    stored = pickle.dumps(build("cat3d", "tiny").unet)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    loaded = pickle.loads(stored)
    for _ in range(8):
        loaded.conv_in.register_forward_hook(lambda *_: None)
    assert get_position(loaded) == "sincos"


@pytest.mark.parametrize("first", ["map", "lora"])
def test_lora_on_the_first_convolution(first: str) -> None:
    """Its update is added beside the map, which is there once and stays when the LoRA is taken off."""
    plain = build("cat3d", "tiny", position="none").unet
    expected = run("cat3d", build("cat3d", "tiny").unet)
    lora = LoraConfig(r=2, target_modules=["conv_in", "to_q"], init_lora_weights=True)  # its update is zero
    if first == "lora":
        plain.add_adapter(lora)
    set_position(plain, "sincos")
    if first == "map":
        plain.add_adapter(lora)
    set_position(plain, "sincos")
    assert get_position(plain) == "sincos"
    torch.testing.assert_close(run("cat3d", plain), expected)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "conv_in.lora_B" in name:
                parameter.fill_(0.1)
    assert not torch.allclose(run("cat3d", plain), expected)
    plain.unload_lora()
    assert get_position(plain) == "sincos"
    assert torch.equal(run("cat3d", plain), expected)


def test_gradient_checkpointing_xformers_and_compiling() -> None:
    built = build("cat3d", "tiny")
    expected = run("cat3d", built.unet)
    built.enable_xformers_memory_efficient_attention()
    assert get_position(built.unet) == "sincos"
    built.disable_xformers_memory_efficient_attention()
    assert torch.equal(run("cat3d", built.unet), expected)
    args, kwargs = get_backbone("cat3d").example_inputs(built.unet)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            built.unet.enable_gradient_checkpointing()
        built.unet.train().zero_grad()
        built.unet(*args, **kwargs).sample.square().mean().backward()
        gradients.append(built.unet.conv_in.weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("hook", [PositionMap(), TilePositionMap(4)], ids=["plain", "tiles"])
def test_compiled(hook: PositionMap) -> None:
    convolution = nn.Conv2d(3, 8, 1)
    convolution.register_forward_hook(hook)
    image = torch.randn(1, 3, 12, 8)
    compiled = torch.compile(convolution, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(image)
        assert not hook._kept
        assert torch.equal(found, convolution(image))


def test_maps_are_kept_but_not_those_of_a_trace() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    convolution, hook = nn.Conv2d(3, 8, 1), PositionMap()
    convolution.register_forward_hook(hook)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert convolution(mode.from_tensor(torch.zeros(1, 3, 4, 4))).shape == (1, 8, 4, 4)
    assert not hook._kept
    with torch.inference_mode():
        convolution(torch.zeros(1, 3, 4, 4))
    convolution(torch.zeros(1, 3, 4, 4)).sum().backward()
    assert len(hook._kept) == 1
    assert not pickle.loads(pickle.dumps(hook))._kept


def test_what_is_refused() -> None:
    unet = build("cat3d", "tiny").unet
    with pytest.raises(ValueError, match=r"unknown position 'sincoss': did you mean 'sincos'\? Known: none, sincos"):
        set_position(unet, "sincoss")
    with pytest.raises(ValueError, match=r"position='sincos': .* conv_in, which a Linear does not have"):
        set_position(nn.Linear(2, 2), "sincos")
    set_position(nn.Linear(2, 2), "none")
    odd = UNet2DConditionModel(
        attention_head_dim=2,
        block_out_channels=(6,),
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    with pytest.raises(ValueError, match=r"takes a multiple of 4 channels behind the first convolution, got 6"):
        set_position(odd, "sincos")
    with pytest.raises(ValueError, match=r"position: is an option of the U-Nets; the transformer of preset"):
        get_backbone("cat3d").build("transformer-tiny", position="sincos")
    transformer = get_backbone("cat3d").build("transformer-tiny", blocks=1)
    assert transformer.config.position == "none"
    with pytest.raises(ValueError, match=r"conv_in, which a JointDiT does not have"):
        type(transformer)(transformer.unet, transformer.scheduler, position="sincos")
