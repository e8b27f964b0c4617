from __future__ import annotations

import functools

import pytest
from diffusers import UNetSpatioTemporalConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from cameo.adapters.common.unet_layers import (
    checkpoints_reentrantly,
    default_layer_index,
    level_of,
    levels_of,
    self_attentions,
)
from tests.helpers.zero123plus_models import stable_diffusion_unet

PARTS = {"down_blocks": 6, "mid_block": 1, "up_blocks": 9}


def test_layers_are_listed_down_mid_up() -> None:
    unet = stable_diffusion_unet()
    paths = list(self_attentions(unet))
    assert [path.split(".")[0] for path in paths] == [part for part, count in PARTS.items() for _ in range(count)]
    assert paths[10] == "up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    assert all(unet.get_submodule(path) is module for path, module in self_attentions(unet).items())
    assert [level_of(unet, path) for path in paths] == [0, 0, 1, 1, 2, 2, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    assert default_layer_index(levels_of(unet, paths)) == 10
    assert default_layer_index(levels_of(unet, paths[:10])) == 9  # there is none at that level: the last


def test_layers_of_a_unet_inside_another_module() -> None:
    model = nn.ModuleDict({"unet": stable_diffusion_unet(), "other": nn.ModuleDict({"unet": stable_diffusion_unet()})})
    assert not self_attentions(nn.Linear(1, 1))
    for prefix in ("unet", "other.unet"):
        paths = list(self_attentions(model, prefix=prefix))
        assert len(paths) == 16
        assert paths[6] == f"{prefix}.mid_block.attentions.0.transformer_blocks.0.attn1"
        assert [level_of(model, path) for path in paths[5:8]] == [2, 3, 2]
        assert default_layer_index(levels_of(model, paths)) == 10
    assert not self_attentions(model)  # a prefix is asked for
    assert not self_attentions(model, prefix="other")


def test_temporal_blocks_are_listed_on_their_own() -> None:
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        num_attention_heads=(2, 2),
        cross_attention_dim=8,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    temporal = list(self_attentions(unet, blocks="temporal_transformer_blocks"))
    spatial = list(self_attentions(unet))
    assert temporal == [path.replace("transformer_blocks", "temporal_transformer_blocks") for path in spatial]
    assert [level_of(unet, path) for path in temporal] == [0, 1, 0, 0]


def test_other_paths_have_no_level() -> None:
    with pytest.raises(ValueError, match=r"path: expected the attn1 of a down, mid or up block, got 'conv_in'"):
        level_of(stable_diffusion_unet(), "conv_in")


def test_reentrant_checkpointing() -> None:
    unet = stable_diffusion_unet()
    found = [checkpoints_reentrantly(unet)]
    for function in (None, *(functools.partial(checkpoint, use_reentrant=value) for value in (True, False))):
        unet.enable_gradient_checkpointing(function)
        found.append(checkpoints_reentrantly(unet))
    assert found == [False, False, True, False]
