"""The layers of Zero123++, and what a match reaches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cameo
from cameo import Correspondence
from cameo.adapters.zero123plus import set_reference_processors
from cameo.adapters.zero123plus.denoiser import ReferenceUNet
from cameo.backbone import get_backbone
from tests.helpers import zero123plus_models as parts
from tests.helpers.zero123plus_models import SIZE, batch, pipeline
from tests.helpers.zero123plus_published import ADAPTER


def test_layers_of_stable_diffusion() -> None:
    unet = ReferenceUNet.from_unet(parts.stable_diffusion_unet(), reference_size=(128, 128))
    order: list[str] = []
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    model = cameo.wrap(unet, "zero123plus")
    layers = model.attention_layers
    args, kwargs = ADAPTER.example_inputs(unet)  # tiles of 64 x 64 pixels
    with model.capture(layers) as captured, torch.no_grad():
        model(*args, **kwargs)
    assert order == [layer.path for layer in layers] * 2
    assert [layer.index for layer in layers] == list(range(16))
    assert layers[10].path == "up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    assert ADAPTER.default_layer(unet) == 10
    assert [layer.index for layer in model.supervised_layers] == [10]
    assert [layer.stride for layer in layers] == [8, 8, 16, 16, 32, 32, 64, 32, 32, 32, 16, 16, 16, 8, 8, 8]
    for layer in layers:
        assert layer.stride is not None
        tile, reference = (64 // layer.stride) ** 2, (128 // layer.stride) ** 2
        seen = captured[layer.path]
        assert seen.query.shape[:3] == (1, layer.heads, 6 * tile)
        assert seen.key.shape[:3] == (1, layer.heads, 6 * tile + reference)
        grids = layer.token_grids(64, 64, 7)
        assert [height * width for height, width in grids] == [reference] + [tile] * 6


def test_layers_at_the_released_size() -> None:
    layers = ADAPTER.attention_layers(ReferenceUNet.from_unet(parts.stable_diffusion_unet()))
    assert layers[10].token_grids(320, 320, 7) == ((32, 32),) + ((20, 20),) * 6
    assert layers[10].layout.shape("query", batch=2, token_grids=layers[10].token_grids(320, 320, 7)) == (2, 2400)
    assert layers[10].layout.shape("key", batch=2, token_grids=layers[10].token_grids(320, 320, 7)) == (2, 3424)
    assert layers[6].token_grids(320, 320, 7) == ((8, 8),) + ((5, 5),) * 6


def test_what_the_pipeline_does_is_what_the_layers_expect() -> None:
    built = pipeline()
    model = cameo.wrap(built.unet, "zero123plus")
    assert model.token_grids(SIZE, SIZE, 7) == ((6, 6),) + ((4, 4),) * 6
    inputs = built.training_inputs(batch())
    with model.capture(model.attention_layers) as captured:
        model(*inputs.args, **inputs.kwargs)
    for layer in model.attention_layers:
        token_grids = layer.token_grids(SIZE, SIZE, 7)
        for of, tensor in (("query", captured[layer.path].query), ("key", captured[layer.path].key)):
            attention_batch, tokens = layer.layout.shape(of, batch=2, token_grids=token_grids)
            assert (tensor.shape[0], tensor.shape[2]) == (attention_batch, tokens)


def test_the_second_run_of_a_layer_is_the_one_that_counts() -> None:
    unet = pipeline().unet
    model = cameo.wrap(unet, "zero123plus")
    (layer,) = model.supervised_layers
    seen: list[Tensor] = []
    unet.get_submodule(f"{layer.path}.to_q").register_forward_hook(lambda _, __, output: seen.append(output))
    args, kwargs = ADAPTER.example_inputs(unet)
    with model.capture() as captured, torch.no_grad():
        model(*args, **kwargs)
    writing, reading = seen
    assert writing.shape[1] == 6 * 6
    assert reading.shape[1] == 12 * 8
    query = captured[layer.path].query.transpose(1, 2).flatten(2)
    assert torch.equal(query, reading)


def test_other_models_are_refused_with_the_cure() -> None:
    plain = parts.two_level_unet()
    with pytest.raises(ValueError, match=r"read no reference image.*set_reference_processors\(unet\)"):
        cameo.wrap(plain, "zero123plus")
    assert not ADAPTER.recognizes(get_backbone("cat3d").build("tiny").unet)
    assert not ADAPTER.recognizes(nn.Linear(2, 2))
    assert "Pass the U-Net (pipeline.unet)" in ADAPTER.explain_mismatch(nn.Linear(2, 2))
    assert ADAPTER.recognizes(set_reference_processors(plain))


def test_the_processor_is_a_softmax_over_own_and_stored_tokens() -> None:
    unet = set_reference_processors(parts.two_level_unet())
    path = ADAPTER.attention_layers(unet)[0].path
    attention = unet.get_submodule(path)
    own, stored = torch.randn(2, 12, 8), torch.randn(2, 9, 8)
    references: dict[str, Tensor] = {}
    attention(stored, mode="w", ref_dict=references)
    assert list(references) == [f"{path}.processor"]
    for _ in range(2):  # a reference can be read again
        output = attention(own, mode="r", ref_dict=references)
    query, key, value = (
        layer(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for layer, tokens in (
            (attention.to_q, own),
            (attention.to_k, torch.cat([own, stored], dim=1)),
            (attention.to_v, torch.cat([own, stored], dim=1)),
        )
    )
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    expected = attention.to_out[0]((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(("query", "key"), parts.MATCHES)
def test_a_match_reaches_its_token_and_the_keys_of_its_view(query: parts.Place, key: parts.Place) -> None:
    unet = pipeline().unet
    model = cameo.wrap(unet, "zero123plus", head="mean")
    parts.check_reach(model, *ADAPTER.example_inputs(unet), query=query, key=key, tile=(4, 4), reference=(6, 6))


def test_the_reference_asks_for_no_matches() -> None:
    unet = pipeline().unet
    model = cameo.wrap(unet, "zero123plus", head="mean")
    index = torch.full((1, 7, 7, 36), -1)
    index[0, 0, 3, :] = 2
    args, kwargs = ADAPTER.example_inputs(unet)
    model(*args, **kwargs, correspondence=Correspondence(index, ((6, 6),) + ((4, 4),) * 6))
    assert model.num_supervised == 0
    assert model.alignment_loss == 0
