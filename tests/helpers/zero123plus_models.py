"""Small random parts of a Zero123++ release, a folder in exactly its layout, and the proof of the token layout."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from cameo import CameoModel, Correspondence
from cameo.adapters.zero123plus.pipeline import Zero123PlusPipeline
from cameo.backbone import get_backbone
from cameo.scenes.rigs import rig_cameras
from tests.helpers.batches import make_batch

Place = tuple[int, int, int]  # view, row, column
WIDTH, TOKENS = 16, 5  # of the context
RAMP = [0.0, 0.3, 0.5, 0.9, 1.2]
REFERENCE = 48  # pixels; the releases have 512
MATCHES = [  # for tiles of at least 4 x 4 tokens and a reference of at least 6 x 6
    pytest.param((4, 1, 3), (1, 2, 0), id="4-1"),
    pytest.param((1, 0, 2), (6, 3, 3), id="1-6"),
    pytest.param((6, 3, 0), (0, 5, 4), id="6-reference"),
    pytest.param((3, 2, 1), (0, 0, 5), id="3-reference"),
]


SIZE = 32  # pixels of a view


@functools.cache
def _pipeline(**options: Any) -> Zero123PlusPipeline:
    torch.manual_seed(0)
    narrow = {"block_out_channels": (16, 32), "heads": 2, "norm_num_groups": 8}
    return get_backbone("zero123plus").build("tiny", **narrow, **options)


def pipeline(**options: Any) -> Zero123PlusPipeline:
    """The preset `tiny`, narrower: views of 8 x 8 and a reference of 12 x 12 latent cells."""
    return copy.deepcopy(_pipeline(**options))


def batch(samples: int = 2, rig: str = "zero123plus-v1.2") -> dict[str, Any]:
    """Random pictures at the poses of a release."""
    given = make_batch(samples=samples, views=7, size=SIZE)
    cameras = [rig_cameras(rig, np.random.default_rng(seed), (SIZE, SIZE)) for seed in range(samples)]
    intrinsics, extrinsics = (torch.tensor(np.stack(one)).float() for one in zip(*cameras, strict=True))
    return {**given, "intrinsics": intrinsics, "extrinsics": extrinsics}


def stable_diffusion_unet(width: int = 8) -> UNet2DConditionModel:
    """Stable Diffusion 2.1's U-Net, but narrow: 16 self-attentions."""
    torch.manual_seed(0)
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        layers_per_block=2,
        down_block_types=(cross, cross, cross, plain),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 2, 4, 4),
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
        use_linear_projection=True,
    )


def two_level_unet(**options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 4,
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**settings | options)


def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=0.18215,
    ).eval()


def vision_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(2)
    settings = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(settings).eval()


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(3)
    settings = CLIPTextConfig(
        vocab_size=4,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(settings).eval()


def tokenizer() -> CLIPTokenizer:
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def image_processor(side: int, **options: Any) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **options)


def sampler(**options: Any) -> EulerAncestralDiscreteScheduler:
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "linspace",
        "steps_offset": 1,
    }
    return EulerAncestralDiscreteScheduler(**settings | options)


def components() -> dict[str, Any]:
    return {
        "unet": two_level_unet(),
        "scheduler": sampler(),
        "vae": vae(),
        "vision_encoder": vision_encoder(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "feature_extractor_clip": image_processor(16),
        "feature_extractor_vae": image_processor(REFERENCE, image_mean=0.5, image_std=0.8),
    }


def write_release(folder: Path) -> Path:
    """A folder as the Hub has it: the index names a pipeline class that diffusers does not have."""
    index: dict[str, Any] = {
        "_class_name": "Zero123PlusPipeline",
        "_diffusers_version": "0.20.2",
        "ramping_coefficients": RAMP,
        "safety_checker": [None, None],
    }
    for name, part in components().items():
        part.save_pretrained(folder / name)
        library = "transformers" if type(part).__name__.startswith("CLIP") else "diffusers"
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def check_reach(
    model: CameoModel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    query: Place,
    key: Place,
    tile: tuple[int, int],
    reference: tuple[int, int],
) -> None:
    """One match: whom does the loss pull, by the gradient of the hidden states of both passes as images?

    Where the views lie in the canvas is written out by hand; `tile` and `reference` are token grids of the supervised
    layer. `model` has to be wrapped with `head="mean"`.
    """
    height, width = tile
    path = model.supervised_layers[0].path
    transformer = model.base_model.get_submodule(path.removesuffix(".transformer_blocks.0.attn1"))
    transformer.norm = nn.Identity()  # a group norm would spread the gradient over the image
    entering: list[Tensor] = []
    keys: list[Tensor] = []

    def cut_off(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Leaves, so that the gradient at the canvas holds nothing that came by way of the earlier layers.
        entering.append(args[0].detach().requires_grad_())
        return (entering[-1], *args[1:])

    transformer.register_forward_pre_hook(cut_off)
    to_k = model.base_model.get_submodule(f"{path}.to_k")
    to_k.register_forward_hook(lambda _, __, output: (output.retain_grad(), keys.append(output))[0])
    grids = (reference,) + (tile,) * 6
    index = torch.full((1, 7, 7, max(height * width, reference[0] * reference[1])), -1)
    index[0, query[0], key[0], query[1] * width + query[2]] = key[1] * grids[key[0]][1] + key[2]
    model(*args, **kwargs, correspondence=Correspondence(index, grids))
    assert model.num_supervised == 1
    model.alignment_loss.backward()

    writing, reading = entering
    assert writing.shape[-2:] == reference
    assert reading.shape[-2:] == (3 * height, 2 * width)
    corners = {1: (0, 0), 2: (0, 1), 3: (1, 0), 4: (1, 1), 5: (2, 0), 6: (2, 1)}  # rows of two
    on_canvas = torch.zeros(3 * height, 2 * width, dtype=torch.bool)
    on_reference = torch.zeros(reference, dtype=torch.bool)
    row, column = corners[query[0]]
    on_canvas[row * height + query[1], column * width + query[2]] = True
    if key[0] == 0:
        on_reference[:] = True
        position = 6 * height * width + key[1] * reference[1] + key[2]  # the reference comes after the canvas
    else:
        row, column = corners[key[0]]
        top, left = row * height, column * width
        on_canvas[top : top + height, left : left + width] = True
        position = (top + key[1]) * 2 * width + left + key[2]
    for states, expected in ((reading, on_canvas), (writing, on_reference)):
        pulled = torch.zeros_like(expected) if states.grad is None else states.grad[0].abs().sum(0) > 0
        assert torch.equal(pulled, expected), (pulled != expected).nonzero().tolist()
    # Of all keys only the matched one is pulled towards the query; the others of its view are pushed away.
    gradient = keys[1].grad
    assert gradient is not None
    towards = gradient[0] @ gradient[0, position]
    assert (towards > 0).nonzero().tolist() == [[position]]
    assert int((towards < 0).sum()) == grids[key[0]][0] * grids[key[0]][1] - 1


def random_matches(grids: tuple[tuple[int, int], ...]) -> Correspondence:
    """Every token of the six views matches a random token of every other view."""
    tokens, generator = max(height * width for height, width in grids), torch.Generator().manual_seed(0)
    index = torch.full((1, 7, 7, tokens), -1)
    for i in range(1, 7):
        for j in set(range(7)) - {i}:
            count = grids[i][0] * grids[i][1]
            index[0, i, j, :count] = torch.randint(grids[j][0] * grids[j][1], (count,), generator=generator)
    return Correspondence(index, grids)
