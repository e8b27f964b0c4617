"""Small MVDream and ImageDream models with encoders, and their batches."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

import cameo
from cameo import Correspondence
from cameo.adapters.common.noise_schedules import ddim
from cameo.adapters.mvdream.denoiser import ImageDreamUNet
from cameo.adapters.mvdream.pipeline import MVDreamPipeline
from cameo.backbone import get_backbone
from tests.helpers.batches import make_batch

SIZE = 32
NARROW: dict[str, Any] = {"block_out_channels": (16, 32), "heads": 2, "norm_num_groups": 8, "image_size": SIZE}
PRESETS = ("tiny", "imagedream-tiny")


@functools.cache
def _pipeline(preset: str, **options: Any) -> MVDreamPipeline:
    torch.manual_seed(0)
    return get_backbone("mvdream").build(preset, **NARROW, **options)


def pipeline(preset: str = "tiny", **options: Any) -> MVDreamPipeline:
    return copy.deepcopy(_pipeline(preset, **options))


def batch(built: MVDreamPipeline, **options: Any) -> dict[str, Any]:
    return {**make_batch(size=SIZE, **options), "num_reference_views": built.num_reference_views}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def views_of(tensor: Tensor, samples: int = 2) -> Tensor:
    return rearrange(tensor, "(b v) ... -> b v ...", b=samples)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def image_dream_unet(**options: Any) -> ImageDreamUNet:
    torch.manual_seed(0)
    return ImageDreamUNet(
        **{
            "sample_size": 8,
            "in_channels": 48,
            "out_channels": 48,
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 2,
            "cross_attention_dim": 8,
            "use_linear_projection": True,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 16,
            "encoder_hid_dim_type": "ip_image_proj",
            "encoder_hid_dim": 8,
            **options,
        }
    )


@functools.cache
def encoders() -> dict[str, Any]:
    """CLIP as the releases have it, tiny: letters for words."""
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {token: index for index, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    vocabulary |= {"<|startoftext|>": 52, "<|endoftext|>": 53}
    narrow = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = CLIPTextConfig(
        vocab_size=54, max_position_embeddings=7, bos_token_id=52, eos_token_id=53, pad_token_id=53, **narrow
    )
    return {
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=7),
        "image_encoder": CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **narrow)).eval(),
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    }


@functools.cache
def tiny_kl() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=0.2,
    )


def with_text() -> MVDreamPipeline:
    plain = pipeline()
    text = {name: encoders()[name] for name in ("text_encoder", "tokenizer")}
    return MVDreamPipeline(plain.unet, plain.scheduler, **text)


def with_image_tokens() -> MVDreamPipeline:
    return MVDreamPipeline(image_dream_unet(), ddim(), condition="image", **encoders())


def check_match_in_images(
    model: cameo.CameoModel,
    run: Callable[[Correspondence], Any],
    transformer: nn.Module,
    *,
    views: int,
    grid: tuple[int, int],
    attention_view: Callable[[int], int],
) -> None:
    """A match of view 2 with view 1 must pull these views of the images that enter the transformer, and no other.

    The images are `[(b v), c, h, w]` in the attention's order, before any token exists. `model` has head="mean".
    """
    height, width = grid
    sample, query_view, key_view, query_token, key_token = 1, 2, 1, (1, 4), (3, 2)
    index = torch.full((2, views, views, height * width), -1)
    index[sample, query_view, key_view, query_token[0] * width + query_token[1]] = key_token[0] * width + key_token[1]
    transformer.norm = nn.Identity()  # a group norm would spread the gradient over the view
    entering: list[Tensor] = []
    keys: list[Tensor] = []
    transformer.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), entering.append(args[0]))[0])
    to_k = model.base_model.get_submodule(model.supervised_layers[0].path).to_k
    to_k.register_forward_hook(lambda *call: (call[-1].retain_grad(), keys.append(call[-1]))[0])
    run(Correspondence(index, (grid,) * views))
    assert model.num_supervised == 1
    model.alignment_loss.backward()
    reached = rearrange(entering[0].grad.abs().sum(1) > 0, "(b v) h w -> b v h w", v=views)
    expected = torch.zeros(2, views, height, width, dtype=torch.bool)
    expected[sample, attention_view(query_view), query_token[0], query_token[1]] = True
    expected[sample, attention_view(key_view)] = True
    assert torch.equal(reached, expected)
    # Of all keys only the matched one is pulled towards the query; the others are pushed away.
    by_view = rearrange(keys[0].grad, "b (v h w) c -> b v h w c", v=views, h=height)
    pull = by_view[sample, attention_view(key_view)]
    towards = torch.einsum("hwc,c->hw", pull, pull[key_token])
    assert towards[key_token] > 0
    assert int((towards > 0).sum()) == 1


def check_single_match(
    model: cameo.CameoModel,
    run: Callable[[Correspondence], Any],
    *,
    pair: tuple[int, int],
    views: int,
    grid: tuple[int, int],
) -> None:
    """One match must give a gradient to its query and to the keys of the matched view, and to nothing else.

    The image prompt is view 0 of the correspondence and the last view of the attention.
    """
    height, width = grid
    sample, query_token, key_token = 1, 1 * width + 4, 3 * width + 2
    index = torch.full((2, views, views, height * width), -1)
    index[sample, pair[0], pair[1], query_token] = key_token
    layer = model.supervised_layers[0]
    projected: dict[str, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for name in ("to_q", "to_k", "to_v"):

            def keep(*call: Any, name: str = name) -> None:
                call[-1].retain_grad()
                projected[name] = call[-1]

            projection = model.base_model.get_submodule(f"{layer.path}.{name}")
            hooks.callback(projection.register_forward_hook(keep).remove)
        run(Correspondence(index, (grid,) * views))
    assert model.num_supervised == 1
    model.alignment_loss.backward()
    expected = {name: torch.zeros(2, views, height * width, dtype=torch.bool) for name in ("to_q", "to_k")}
    expected["to_q"][sample, pair[0] - 1, query_token] = True  # -1 is the last view of the attention
    expected["to_k"][sample, pair[1] - 1] = True
    for name, tokens in expected.items():
        gradient = projected[name].grad
        assert gradient is not None
        assert torch.equal(rearrange(gradient != 0, "b (v n) c -> b v n c", v=views).any(-1), tokens), name
    assert projected["to_v"].grad is None  # values come after the attention map


def executed(model: nn.Module, args: Any, kwargs: Any) -> list[str]:
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
        if name.endswith("attn1")
    ]
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return order
