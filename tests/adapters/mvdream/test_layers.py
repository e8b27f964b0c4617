"""The layers of MVDream and ImageDream, and the checkpointing of the original code."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo import Correspondence, TokenLayout
from cameo.adapters.mvdream import disable_checkpointing, set_image_view
from cameo.adapters.mvdream.denoiser import prepare
from cameo.backbone import get_backbone
from cameo.errors import CaptureError
from tests.helpers.models import Attention
from tests.helpers.mvdream_models import (
    NARROW,
    PRESETS,
    SIZE,
    batch,
    check_match_in_images,
    check_single_match,
    executed,
    pipeline,
    seeded,
)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_match_reaches_its_token_and_the_keys_of_its_view(preset: str) -> None:
    built, views = pipeline(preset), 3
    model = cameo.wrap(built.unet, "mvdream", head="mean")
    noisy = torch.randn(2 * views, built.unet.config.in_channels, 8, 12)
    context, cameras = torch.zeros(2 * views, 1, 8), torch.randn(2 * views, 16)

    def run(match: Correspondence) -> None:
        kwargs = {"class_labels": cameras, "cross_attention_kwargs": {"num_views": views}}
        model(noisy, torch.full((2 * views,), 500), context, **kwargs, correspondence=match)

    path = model.supervised_layers[0].path.removesuffix(".transformer_blocks.0.attn1")
    shift = built.num_reference_views  # the image prompt, first in the batch, is the last view of the attention
    check_match_in_images(
        model,
        run,
        built.unet.get_submodule(path),
        views=views,
        grid=(4, 6),
        attention_view=lambda view: (view - shift) % views,
    )


@pytest.mark.parametrize("pair", [(2, 0), (0, 2), (1, 2)])
def test_a_match_with_the_image_prompt_is_supervised_like_any_other(pair: tuple[int, int]) -> None:
    built = pipeline("imagedream-tiny")
    model = cameo.wrap(built.unet, "mvdream")
    inputs = built.training_inputs(batch(built), generator=seeded())
    check_single_match(
        model,
        lambda match: model(*inputs.args, **inputs.kwargs, correspondence=match),
        pair=pair,
        views=3,
        grid=(4, 4),
    )


def test_the_image_prompt_has_no_denoising_loss() -> None:
    built = pipeline("imagedream-tiny")
    inputs = built.training_inputs(batch(built), generator=seeded())
    output = torch.randn(6, *inputs.target.shape[-3:], generator=seeded(1)).requires_grad_()
    built.denoising_loss(UNet2DConditionOutput(sample=output), inputs).sum().backward()
    reached = rearrange(output.grad, "(b v) c h w -> b v (c h w)", v=3).any(-1)
    assert reached.tolist() == [[True, True, False]] * 2  # in the attention's order the prompt is the last view


@pytest.mark.parametrize("preset", [*PRESETS, "small", "imagedream-small"])
def test_layers_of_the_presets(preset: str) -> None:
    widths = {"block_out_channels": (16, 32, 32)[: 2 + ("small" in preset)]}
    built = get_backbone("mvdream").build(preset, **{**NARROW, **widths})
    adapter = get_backbone("mvdream")
    args, kwargs = adapter.example_inputs(built.unet)
    layers = adapter.attention_layers(built.unet)
    assert [layer.path for layer in layers] == executed(built.unet, args, kwargs)
    views = 3 if "image" in preset else 2
    model = cameo.wrap(built.unet, "mvdream")
    with model.capture(layers) as captured:
        model(*args, **kwargs)
    for layer in layers:
        assert layer.layout == TokenLayout("b (v h w)", references_last=int("image" in preset))
        assert captured[layer.path].query.shape[2] == views * (8 * 4 // layer.stride) ** 2
    default = layers[adapter.default_layer(built.unet)]
    assert default.path == f"up_blocks.{len(widths['block_out_channels']) - 2}.attentions.0.transformer_blocks.0.attn1"
    assert model.supervised_layers == [default]
    assert model.token_grid(SIZE, SIZE) == (4, 4)


def test_other_models_are_refused_and_the_cure_works() -> None:
    adapter = get_backbone("mvdream")
    cat3d = get_backbone("cat3d").build("tiny", **NARROW).unet
    assert not adapter.recognizes(cat3d)
    with pytest.raises(ValueError, match=r"has no camera embedding .*use backbone 'cat3d'"):
        cameo.wrap(cat3d, "mvdream")
    with pytest.raises(ValueError, match=r"Linear has neither MVDream's blocks .* nor those of diffusers"):
        cameo.wrap(nn.Linear(2, 2), "mvdream")
    unet = UNet2DConditionModel.from_config(pipeline().unet.config)
    with pytest.raises(ValueError, match="see one view at a time") as refused:
        cameo.wrap(unet, "mvdream")
    cure = re.search(r"Before cameo\.wrap: (.*?latent_stride=8\))", str(refused.value))
    assert cure, refused.value
    exec(cure[1], {"unet": unet})  # word for word what the message says
    model = cameo.wrap(unet, "mvdream")
    assert len(model.attention_layers) == 4
    assert model.token_grid(64, 64) == (4, 4)
    without = cameo.wrap(prepare(model.unwrap(), image_view=False), "mvdream")
    with pytest.raises(ValueError, match=r"pixels per token are not known; .*latent_stride=8"):
        without.token_grid(64, 64)
    with pytest.raises(ValueError, match=r"unet: has no camera embedding; expected .*input_dim=16"):
        prepare(cat3d, image_view=False)


def test_the_image_view_can_be_switched_off() -> None:
    unet = pipeline("imagedream-tiny").unet
    adapter = get_backbone("mvdream")
    assert adapter.attention_layers(set_image_view(unet, False))[0].layout == TokenLayout("b (v h w)")
    for again in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert adapter.attention_layers(again)[0].layout == TokenLayout("b (v h w)")
        assert adapter.attention_layers(set_image_view(again, True))[0].layout.references_last == 1


class CheckpointedBlock(nn.Module):
    """Has the names of the original's transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.checkpoint = Attention(4, heads=2), True

    def forward(self, x: Tensor, context: Tensor | None = None, num_frames: int = 1) -> Tensor:
        return self.attn1(x)


class CheckpointedUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        transformer = nn.Module()
        transformer.transformer_blocks = nn.ModuleList([CheckpointedBlock()])
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Identity()])])
        self.middle_block = nn.ModuleList([nn.Identity(), transformer, nn.Identity()])
        self.output_blocks = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        return self.middle_block[1].transformer_blocks[0](x)


def test_the_originals_checkpointing_is_refused_with_a_cure_that_works() -> None:
    unet, adapter = CheckpointedUNet(), get_backbone("mvdream")
    assert adapter.recognizes(unet)
    model = cameo.wrap(unet, "mvdream", layer=0)
    nothing = Correspondence(torch.full((1, 2, 2, 4), -1), ((2, 2),) * 2)
    with pytest.raises(CaptureError, match=r"1 blocks of this CheckpointedUNet .*Call .*disable_checkpointing"):
        model(torch.zeros(1, 8, 4), correspondence=nothing)
    assert adapter.unsupported(disable_checkpointing(unet)) is None
    model(torch.zeros(1, 8, 4), correspondence=nothing)
