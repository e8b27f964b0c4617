"""The layers of SV3D and Stable Video Diffusion, and what their tokens mean."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo.backbone import get_backbone
from tests.helpers.models import GRID, SAMPLES, VIEWS, check_layout, next_view
from tests.helpers.sv3d_models import BOTH, NARROW, batch, pipeline, plain_unet, run


def executed(model: nn.Module, kind: str) -> list[str]:
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
        if name.endswith(".attn1") and f".{kind}." in name
    ]
    args, kwargs = get_backbone("sv3d").example_inputs(model)
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return order


def test_layers_of_stable_video_diffusion() -> None:
    adapter = get_backbone("sv3d")
    unet = plain_unet(block_out_channels=(32,) * 4, num_attention_heads=(1, 2, 2, 2), cross_attention_dim=8)
    layers, spatial = adapter.attention_layers(unet), adapter.inflatable_layers(unet)
    assert [layer.path for layer in layers] == executed(unet, "temporal_transformer_blocks")
    assert [layer.path for layer in spatial] == executed(unet, "transformer_blocks")
    assert [layer.index for layer in layers] == [layer.index for layer in spatial] == list(range(16))
    assert adapter.default_layer(unet) == 10
    assert layers[10].path == "up_blocks.2.attentions.0.temporal_transformer_blocks.0.attn1"
    assert spatial[10].path == "up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    assert [layer.stride for layer in layers] == [8, 8, 16, 16, 32, 32, 64, 32, 32, 32, 16, 16, 16, 8, 8, 8]
    assert [layers[index].heads for index in (0, 2, 6)] == [1, 2, 2]


@pytest.mark.parametrize(("features", "last"), [(256, 1), (768, 0), (1280, 1)])
def test_where_the_conditioning_frame_is(features: int, last: int) -> None:
    adapter, unet = get_backbone("sv3d"), plain_unet(features)
    assert {
        layer.layout.references_last for layer in [*adapter.attention_layers(unet), *adapter.inflatable_layers(unet)]
    } == {last}


@pytest.mark.parametrize("preset", ["tiny", "small"])
@BOTH
def test_layers_of_the_presets(preset: str, inflate: bool) -> None:
    widths = (32, 32, 32)[: 2 + (preset == "small")]
    built = get_backbone("sv3d").build(preset, **{**NARROW, "block_out_channels": widths})
    size = built.unet.config.sample_size * built.latent_stride
    model = cameo.wrap(built.unet, "sv3d", inflate=inflate)
    assert model.token_grid(size, size) == (size // 8, size // 8)
    assert model.cameo_config.normalize == ("per_view" if inflate else "all_views")
    given = batch(samples=1, size=size)
    inputs = built.training_inputs(given)
    for layer in model.attention_layers:  # joined one by one
        if inflate:
            get_backbone("sv3d").inflate(built.unet, layer.path)
    with model.capture(model.attention_layers) as captured, torch.no_grad():
        model(*inputs.args, **inputs.kwargs)
    for layer in model.attention_layers:
        cells = (size // layer.stride) ** 2
        expected = (1, layer.heads, 3 * cells) if inflate else (cells, layer.heads, 3)
        assert captured[layer.path].query.shape[:3] == expected, layer


def test_other_models_are_not_recognized() -> None:
    adapter = get_backbone("sv3d")
    other = get_backbone("cat3d").build("tiny").unet
    assert isinstance(other, UNet2DConditionModel)
    assert not adapter.recognizes(other)
    with pytest.raises(
        ValueError, match=r"UNet2DConditionModel has no modules named like .*temporal_transformer_blocks"
    ):
        cameo.wrap(other, "sv3d")
    assert adapter.unsupported(plain_unet()) is None


@BOTH
def test_output_is_bit_identical(inflate: bool) -> None:
    unet = pipeline().unet
    before = run(unet)
    model = cameo.wrap(unet, "sv3d", inflate=inflate)
    now = run(unet)
    assert torch.equal(now, before) is not inflate
    assert torch.equal(run(model), now)
    assert torch.equal(run(model, correspondence=next_view(shift=0)), now)
    assert model.num_supervised > 0
    assert model.unwrap() is unet
    assert torch.equal(run(unet), now)  # unwrapping leaves the layers joined
    for path in list(unet.config.joined_layers):
        get_backbone("sv3d").deflate(unet, path)
    assert list(unet.config.joined_layers) == []
    assert torch.equal(run(unet), before)


def project(attention: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    query, key = (
        rearrange(linear(images), "b v h w (k d) -> b v h w k d", k=attention.heads)
        for linear in (attention.to_q, attention.to_k)
    )
    return query, key


@pytest.mark.parametrize("released", [False, True])
def test_a_temporal_query_sees_its_own_cell_of_the_other_frames(released: bool) -> None:
    unet = plain_unet() if released else pipeline().unet
    model = cameo.wrap(unet, "sv3d", head="mean")

    def to_images(tokens: Tensor) -> Tensor:
        images = rearrange(tokens, "(b h w) t c -> b t h w c", h=GRID[0], w=GRID[1])
        return images if released else torch.stack([images[:, 2], images[:, 0], images[:, 1]], dim=1)

    check_layout(
        model,
        run,
        to_images,
        query=(1, 1, 3),
        key=(0, 1, 3),
        reached=[(0, 1, 3), (2, 1, 3)],
        project=functools.partial(project, unet.get_submodule(model.supervised_layers[0].path)),
    )


def test_an_inflated_query_sees_all_tokens_of_the_view_looked_at() -> None:
    unet = pipeline().unet
    model = cameo.wrap(unet, "sv3d", head="mean", inflate=True)

    def to_images(tokens: Tensor) -> Tensor:
        tokens = rearrange(tokens, "b (t s) c -> (b t) s c", t=VIEWS) if tokens.shape[0] == SAMPLES else tokens
        images = rearrange(tokens, "(b t) (h w) c -> b t h w c", t=VIEWS, h=GRID[0])
        return torch.stack([images[:, 2], images[:, 0], images[:, 1]], dim=1)

    check_layout(
        model,
        run,
        to_images,
        query=(2, 0, 1),
        key=(0, 2, 1),
        reached=[(0, row, column) for row in range(GRID[0]) for column in range(GRID[1])],
        project=functools.partial(project, unet.get_submodule(model.supervised_layers[0].path)),
    )


def test_inflation_is_attention_over_all_frames() -> None:
    unet = pipeline().unet
    seen: list[Tensor] = []
    model = cameo.wrap(unet, "sv3d", inflate=True)
    attention = unet.get_submodule(model.supervised_layers[0].path)
    attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    attention.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        run(unet)
        tokens, output = seen
        assert tokens.shape[:2] == (SAMPLES, VIEWS * GRID[0] * GRID[1])
        query, key, value = (
            rearrange(linear(tokens), "b l (k d) -> b k l d", k=attention.heads)
            for linear in (attention.to_q, attention.to_k, attention.to_v)
        )
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        expected = attention.to_out[0](rearrange(weights @ value, "b k l d -> b l (k d)"))
    torch.testing.assert_close(output, rearrange(expected, "b (t s) c -> (b t) s c", t=VIEWS))
