"""The layers of CAT3D-style U-Nets, and what their tokens mean."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo.adapters.common.joint_views import inflate
from cameo.backbone import get_backbone
from cameo.errors import ShapeError
from tests.helpers.backbone_checks import one_match
from tests.helpers.cat3d_models import NARROW, _pipeline, pipeline, run, stable_diffusion_unet


def executed(unet: nn.Module, sample: Tensor, views: int) -> list[str]:
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in unet.named_modules()
        if name.endswith("attn1")
    ]
    run(unet, sample, views)
    for handle in handles:
        handle.remove()
    return order


def test_layers_of_stable_diffusion() -> None:
    unet = inflate(stable_diffusion_unet(), latent_stride=8)
    adapter = get_backbone("cat3d")
    layers = adapter.attention_layers(unet)
    sample = torch.randn(3, 4, 16, 24)
    assert [layer.path for layer in layers] == executed(unet, sample, 3)
    assert [layer.index for layer in layers] == list(range(16))
    assert layers[10].path == "up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    assert adapter.default_layer(unet) == 10
    parts = ["".join(filter(str.isalpha, layer.path.split(".")[0])) for layer in layers]
    assert parts == ["downblocks"] * 6 + ["midblock"] + ["upblocks"] * 9
    model = cameo.wrap(unet, "cat3d")
    assert [layer.index for layer in model.supervised_layers] == [10]
    height, width = 16 * 8, 24 * 8
    with model.capture(layers) as captured:
        run(unet, sample, 3)
    for layer in layers:
        assert layer.stride is not None
        query = captured[layer.path].query
        assert query.shape[:3] == (1, layer.heads, 3 * (height // layer.stride) * (width // layer.stride)), layer
    assert {layer.stride for layer in layers} == {8, 16, 32, 64}
    assert model.token_grid(height, width) == (8, 12)


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_layers_of_the_presets(preset: str) -> None:
    built = get_backbone("cat3d").build(
        preset, **{**NARROW, "block_out_channels": (16, 32, 32)[: 2 + (preset == "small")]}
    )
    model = cameo.wrap(built.unet, "cat3d")
    args, kwargs = get_backbone("cat3d").example_inputs(built.unet)
    assert [layer.path for layer in model.attention_layers] == executed(
        built.unet, args[0], kwargs["cross_attention_kwargs"]["num_views"]
    )
    with model.capture(model.attention_layers) as captured:
        model(*args, **kwargs)
    for layer in model.attention_layers:
        assert captured[layer.path].query.shape[2] == 2 * (8 * 4 // layer.stride) ** 2


def test_several_transformer_blocks_in_one_attention_are_all_listed() -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=11,
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    layers = get_backbone("cat3d").attention_layers(inflate(unet))
    assert [layer.path for layer in layers] == executed(unet, torch.randn(2, 4, 8, 8), 2)
    assert len(layers) == 4 * 11  # 10 comes after 9, not after 1
    assert layers[0].stride is None


def test_a_plain_unet_is_refused_and_the_cure_works() -> None:
    unet = stable_diffusion_unet()
    with pytest.raises(ValueError, match="see one view at a time") as refused:
        cameo.wrap(unet, "cat3d")
    cure = re.search(r"Before cameo\.wrap: (.*?latent_stride=8\))", str(refused.value))
    assert cure, refused.value
    exec(cure[1], {"unet": unet})  # word for word what the message says
    model = cameo.wrap(unet, "cat3d")
    assert len(model.attention_layers) == 16
    assert model.token_grid(64, 64) == (4, 4)
    arguments = re.search(r"In each forward: cross_attention_kwargs=(\{.*?\})", str(refused.value))
    assert arguments, refused.value
    sample, context = torch.randn(2, 4, 8, 8), torch.zeros(2, 1, unet.config.cross_attention_dim)
    index = torch.full((1, 2, 2, 16), -1)
    index[0, 0, 1] = torch.arange(16)
    match = cameo.Correspondence(index, (model.token_grid(64, 64),) * 2)
    options = eval(arguments[1], {"V": 2})
    model(sample, 0, context, cross_attention_kwargs=options, correspondence=match)
    assert model.num_supervised == 16
    with pytest.raises(ShapeError, match=r'Each of the 2 views was attended alone.*num_views.*\{"num_views": 2\}'):
        model(sample, 0, context, correspondence=match)


def test_each_message_on_the_way_names_the_whole_cure() -> None:
    """Inflated without latent_stride, the token grid is not known; wrap takes no stride= of a backbone."""
    model = cameo.wrap(inflate(stable_diffusion_unet()), "cat3d")
    with pytest.raises(ValueError, match=r"pixels per token are not known; .*inflate\(unet, latent_stride=8\)"):
        model.token_grid(64, 64)


def test_views_see_each_other() -> None:
    unet = _pipeline().unet
    sample = torch.randn(4, unet.config.in_channels, 8, 8)  # two samples of two views
    changed = sample.clone()
    changed[1] += 1
    apart, joined = run(unet, sample, 1), run(unet, sample, 2)
    assert not torch.allclose(run(unet, changed, 2)[0], joined[0], atol=1e-4)
    assert torch.equal(run(unet, changed, 2)[2:], joined[2:])  # not across samples
    torch.testing.assert_close(run(unet, changed, 1)[0], apart[0])
    assert not torch.allclose(apart, joined, atol=1e-4)


def test_one_view_is_the_plain_unet() -> None:
    plain = stable_diffusion_unet()
    sample = torch.randn(2, 4, 8, 8)
    before = run(plain, sample, None)
    state = copy.deepcopy(plain.state_dict())
    assert torch.equal(run(inflate(plain), sample, 1), before)
    assert torch.equal(run(plain, sample, None), before)  # without the argument a view is alone
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_a_batch_that_does_not_divide_into_views() -> None:
    unet = _pipeline().unet
    with pytest.raises(ShapeError, match=r"num_views.*a divisor of the batch 4 = samples x views, got 3"):
        run(unet, torch.randn(4, unet.config.in_channels, 8, 8), 3)


def test_a_match_reaches_its_token_and_the_keys_of_its_view() -> None:
    built = pipeline()
    model = cameo.wrap(built.unet, "cat3d", head="mean")
    height, width, views = 4, 6, 3
    match = one_match(views, height, width)
    path = model.supervised_layers[0].path
    transformer = built.unet.get_submodule(path.removesuffix(".transformer_blocks.0.attn1"))
    transformer.norm = nn.Identity()  # a group norm would spread the gradient over the view
    entering: list[Tensor] = []
    keys: list[Tensor] = []
    transformer.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), entering.append(args[0]))[0])
    to_k = built.unet.get_submodule(path).to_k
    to_k.register_forward_hook(lambda *call: (call[-1].retain_grad(), keys.append(call[-1]))[0])
    noisy = torch.randn(2 * views, built.unet.config.in_channels, 2 * height, 2 * width)
    model(
        noisy,
        torch.full((2 * views,), 500),
        torch.zeros(2 * views, 1, 8),
        cross_attention_kwargs={"num_views": views},
        correspondence=match.correspondence,
    )
    model.alignment_loss.backward()
    reached = rearrange(entering[0].grad.abs().sum(1) > 0, "(b v) h w -> b v h w", v=views)
    assert torch.equal(reached, match.reached)
    # Of all keys only the matched one is pulled towards the query; the others are pushed away.
    pull = rearrange(keys[0].grad, "b (v h w) c -> b v h w c", v=views, h=height)[match.sample, match.key_view]
    towards = torch.einsum("hwc,c->hw", pull, pull[match.key_token])
    assert towards[match.key_token] > 0
    assert int((towards > 0).sum()) == 1
