"""diffusers' Hunyuan-DiT with joined views, attached by description at the paper's layer."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import HunyuanDiT2DModel
from diffusers.models.attention_processor import HunyuanAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb, get_2d_rotary_pos_embed
from torch import Tensor, nn

import cameo
from cameo import CameoModel
from cameo.adapters.hunyuan_dit import MultiViewHunyuanAttnProcessor, join_views
from cameo.errors import ShapeError
from tests.helpers.models import (
    GRID,
    SAMPLES,
    VIEWS,
    add_lora,
    check_bit_identical,
    check_layout,
    check_overfits,
    frames,
    next_view,
)

HEIGHT, WIDTH = GRID
PATCH, TEXT = 2, 3
RELEASED = {
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "hidden_size": 1408,
    "num_layers": 40,
    "mlp_ratio": 4.3637,
    "in_channels": 4,
    "patch_size": PATCH,
    "sample_size": 128,
    "use_style_cond_and_image_meta_size": False,
}


@functools.cache
def _transformer() -> HunyuanDiT2DModel:
    torch.manual_seed(0)
    model = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        hidden_size=16,
        num_layers=4,
        mlp_ratio=2.0,
        in_channels=4,
        patch_size=PATCH,
        sample_size=8,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=8,
        text_len=TEXT,
        text_len_t5=TEXT,
        use_style_cond_and_image_meta_size=False,
    )
    for name, parameter in model.named_parameters():  # trained norms are not ones and zeros, and make attention sharp
        if "norm_q" in name or "norm_k" in name:
            nn.init.uniform_(parameter, *((1, 3) if name.endswith("weight") else (-1, 1)))
    return model


def transformer() -> HunyuanDiT2DModel:
    return copy.deepcopy(_transformer())


def joined() -> HunyuanDiT2DModel:
    return join_views(transformer(), VIEWS)


def rotary(dimension: int = 8, height: int = HEIGHT, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    return get_2d_rotary_pos_embed(dimension, ((0, 0), (height, width)), (height, width), output_type="pt")


def arguments(images: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    number, text = len(images), torch.linspace(-1, 1, TEXT * 8).reshape(1, TEXT, 8)
    return (images, torch.full((number,), 400.0)), {
        "encoder_hidden_states": text.repeat(number, 1, 1),
        "text_embedding_mask": torch.ones(number, TEXT),
        "encoder_hidden_states_t5": text.repeat(number, 1, 1),
        "text_embedding_mask_t5": torch.ones(number, TEXT),
        "image_rotary_emb": rotary(),
    }


def denoise(model: nn.Module, **options: Any) -> Tensor:
    args, kwargs = arguments(frames(grid=(HEIGHT * PATCH, WIDTH * PATCH)))
    return model(*args, **kwargs, **options).sample


def wrap(model: nn.Module, **options: Any) -> CameoModel:
    return cameo.wrap(model, layer="blocks.3.attn1", layout="b (v h w)", stride=16, head="mean", **options)


def per_view_projections(attention: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of each view by itself: projected, normalized, then rotated by the cell in its own view."""
    found = []
    for linear, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k)):
        heads = linear(images.flatten(0, 1).flatten(1, 2)).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        rotated = apply_rotary_emb(norm(heads), rotary())
        found.append(rotated.transpose(1, 2).reshape(SAMPLES, VIEWS, HEIGHT, WIDTH, attention.heads, -1))
    return found[0], found[1]


def test_joined_views_attend_to_each_other() -> None:
    alone = transformer()
    assert torch.equal(denoise(join_views(transformer(), 1)), denoise(alone))
    images = frames(grid=(HEIGHT * PATCH, WIDTH * PATCH)).requires_grad_()
    for model, others in ((alone, False), (joined(), True)):
        embedded = model.pos_embed(images)
        output = model.blocks[0].attn1(embedded, image_rotary_emb=rotary())
        (gradient,) = torch.autograd.grad(output[VIEWS].square().sum(), images)  # first view of the second sample
        touched = gradient.flatten(1).abs().sum(1) > 0
        assert touched.tolist() == [False] * VIEWS + [True] + [others] * (VIEWS - 1)


def test_wrapped_is_bit_identical() -> None:
    check_bit_identical(joined, wrap, denoise, next_view())


def test_one_match_pulls_its_tokens_and_no_others() -> None:
    model = wrap(joined())
    attention = model.base_model.get_submodule("blocks.3.attn1")
    check_layout(
        model,
        denoise,
        lambda x: x.reshape(SAMPLES, VIEWS, HEIGHT, WIDTH, -1),
        query=(2, 1, 3),
        key=(0, 2, 1),
        reached=[(0, row, column) for row in range(HEIGHT) for column in range(WIDTH)],
        project=lambda images: per_view_projections(attention, images),
    )


def test_the_layout_is_found_to_fit() -> None:
    images = frames(grid=(HEIGHT * PATCH, WIDTH * PATCH)).unflatten(0, (SAMPLES, VIEWS))
    check = wrap(joined()).check_layout(lambda views: arguments(views.flatten(0, 1)), images)
    assert check.fits is True, check


def test_what_is_supervised_is_what_the_kernel_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(joined())
    attention = model.base_model.get_submodule("blocks.3.attn1")
    calls: list[tuple[Tensor, Tensor]] = []
    projected: list[Tensor] = []
    kernel = F.scaled_dot_product_attention

    def watch(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append((query, key))
        return kernel(query, key, *args, **options)

    attention.to_q.register_forward_hook(lambda *call: projected.append(call[-1]))
    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    with model.capture() as captured:
        denoise(model)
    seen = captured["blocks.3.attn1"]
    assert [query is seen.query and key is seen.key for query, key in calls].count(True) == 1
    assert seen.query.shape == (SAMPLES, 2, VIEWS * HEIGHT * WIDTH, 8)
    unrotated = projected[0].unflatten(-1, (2, 8)).transpose(1, 2)
    assert (seen.query - unrotated).abs().amax() > 0.1
    normalized = attention.norm_q(unrotated)
    assert (seen.query - normalized).abs().amax() > 0.1


def test_lora_overfits_one_batch() -> None:
    model = wrap(join_views(add_lora(transformer(), "blocks.3.attn1.to_q", "blocks.3.attn1.to_k"), VIEWS))
    check_overfits(model, denoise, next_view())


def test_joined_views_survive_copies_and_pickling() -> None:
    model = joined()
    expected = denoise(model)
    assert torch.equal(denoise(copy.deepcopy(model)), expected)
    assert torch.equal(denoise(pickle.loads(pickle.dumps(model))), expected)


@pytest.mark.parametrize("switch", ["set_default_attn_processor", "fuse_qkv_projections"])
def test_the_switches_of_diffusers_keep_the_views_joined(switch: str) -> None:
    model = joined()
    expected = denoise(model)
    kinds = {type(processor) for processor in model.attn_processors.values()}
    assert kinds == {HunyuanAttnProcessor2_0}
    getattr(model, switch)()
    torch.testing.assert_close(denoise(model), expected)
    wrapped = wrap(model)
    denoise(wrapped, correspondence=next_view())
    assert wrapped.num_supervised > 0


def test_a_transformer_pickled_by_an_earlier_release() -> None:
    expected, model = joined(), transformer()
    for block in model.blocks:
        processor = MultiViewHunyuanAttnProcessor.__new__(MultiViewHunyuanAttnProcessor)
        vars(processor).update(num_views=VIEWS, _attend=HunyuanAttnProcessor2_0())
        block.attn1.set_processor(processor)
    assert torch.equal(denoise(pickle.loads(pickle.dumps(model))), denoise(expected))
    with pytest.warns(FutureWarning, match=r"is replaced by .*join_views\(transformer, num_views\)"):
        MultiViewHunyuanAttnProcessor(2)


def test_wrong_number_of_views_and_wrong_model_are_refused() -> None:
    with pytest.raises(ShapeError, match="samples x 4 views"):
        denoise(join_views(transformer(), 4))
    with pytest.raises(ValueError, match="num_views: expected an integer of at least 1, got 0"):
        join_views(transformer(), 0)
    for other in (nn.Linear(2, 2), nn.Sequential()):
        with pytest.raises(ValueError, match=f"{type(other).__name__} has no self-attentions named blocks.N.attn1"):
            join_views(other, 2)


def test_layer_of_the_paper_in_the_released_size() -> None:
    views, tokens = 4, 32 * 32  # 512 px
    with torch.device("meta"):
        model = HunyuanDiT2DModel(**RELEASED)
        wrapped = cameo.wrap(join_views(model, views), layer="blocks.32.attn1", layout="b (v h w)", stride=16)
        with torch.no_grad(), wrapped.capture() as captured:
            model(
                torch.empty(views, 4, 64, 64),
                torch.empty(views),
                encoder_hidden_states=torch.empty(views, 77, 1024),
                text_embedding_mask=torch.empty(views, 77),
                encoder_hidden_states_t5=torch.empty(views, 256, 2048),
                text_embedding_mask_t5=torch.empty(views, 256),
                image_rotary_emb=(torch.empty(tokens, 88), torch.empty(tokens, 88)),
            )
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_499_952_032  # version 1.2
    assert len(model.blocks) == 40
    assert wrapped.supervised_layers[0].heads == 16
    assert wrapped.token_grid(512, 512) == (32, 32)
    assert captured["blocks.32.attn1"].query.shape == (1, 16, views * tokens, 88)
    assert captured["blocks.32.attn1"].key.shape == (1, 16, views * tokens, 88)
