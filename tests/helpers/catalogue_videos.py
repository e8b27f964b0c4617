"""The video models of the catalogue: views are latent frames."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tests.helpers.catalogue import PATCH, SIZE, TEXT, Entry, frames, noise, text, text_mask
from tests.helpers.models import GRID, SAMPLES, VIEWS

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
LONGEST = max(TEXT)


def timestep() -> torch.Tensor:
    return torch.full((SAMPLES,), 400)


def hunyuan_video() -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
        **HEADS,
    )


def hunyuan_video_inputs() -> dict[str, Any]:
    return {
        "hidden_states": frames(),
        "timestep": timestep(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
        "pooled_projections": noise(SAMPLES, 8),
        "guidance": torch.full((SAMPLES,), 6000.0),
    }


def hunyuan_video15() -> nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=PATCH,
        text_embed_dim=8,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(2, 2, 4),
        **HEADS,
    )


def hunyuan_video15_inputs() -> dict[str, Any]:
    return {
        "hidden_states": frames(),
        "timestep": timestep().float(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
        "encoder_hidden_states_2": text(length=4),
        "encoder_attention_mask_2": text_mask((4, 1)),
        "image_embeds": torch.zeros(SAMPLES, 2, 8),  # from text alone: hidden as well
    }


def mochi() -> nn.Module:
    return diffusers.MochiTransformer3DModel(
        in_channels=4,
        num_layers=3,
        pooled_projection_dim=8,
        text_embed_dim=8,
        time_embed_dim=8,
        max_sequence_length=LONGEST,
        **HEADS,
    )


def mochi_inputs() -> dict[str, Any]:
    return {
        "hidden_states": frames(),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "encoder_attention_mask": text_mask(),
    }


WAN = {
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 2,
    "rope_max_seq_len": 16,
    **HEADS,
}


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(**WAN)


def wan_inputs(views: int = VIEWS) -> dict[str, Any]:
    return {"hidden_states": frames(views=views), "timestep": timestep(), "encoder_hidden_states": text()}


def wan_vace() -> nn.Module:
    return diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=4)


def wan_vace_inputs() -> dict[str, Any]:
    return wan_inputs() | {"control_hidden_states": frames()}


def skyreels() -> nn.Module:
    return diffusers.SkyReelsV2Transformer3DModel(**WAN)


def skyreels_causal() -> nn.Module:
    return diffusers.SkyReelsV2Transformer3DModel(**WAN, num_frame_per_block=2)


def cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=2,
        sample_width=SIZE[1],
        sample_height=SIZE[0],
        sample_frames=4 * VIEWS - 3,
        max_text_seq_length=LONGEST,
        **HEADS,
    )


def cogvideox_inputs() -> dict[str, Any]:
    return {
        "hidden_states": frames().transpose(1, 2),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
    }


def ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, cross_attention_dim=16, num_layers=2, caption_channels=8, **HEADS
    )


def ltx_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(SAMPLES, VIEWS * GRID[0] * GRID[1], 4),
        "encoder_hidden_states": text(),
        "timestep": timestep(),
        "encoder_attention_mask": text_mask(),
        "num_frames": VIEWS,
        "height": GRID[0],
        "width": GRID[1],
    }


def cosmos() -> nn.Module:
    return diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=8,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        num_attention_heads=2,
        attention_head_dim=12,
    )


def cosmos_inputs() -> dict[str, Any]:
    return wan_inputs() | {"fps": 24, "padding_mask": torch.zeros(1, 1, *SIZE)}


def kandinsky5() -> nn.Module:
    return diffusers.Kandinsky5Transformer3DModel(
        in_text_dim=8,
        in_text_dim2=8,
        time_dim=8,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(2, 2, 4),
    )


def kandinsky5_inputs() -> dict[str, Any]:
    return {
        "hidden_states": frames().permute(0, 2, 3, 4, 1),
        "encoder_hidden_states": text(),
        "timestep": timestep().float(),
        "pooled_projections": noise(SAMPLES, 8),
        "visual_rope_pos": [torch.arange(count) for count in (VIEWS, *GRID)],
        "text_rope_pos": torch.arange(LONGEST),
    }


VIDEOS = {
    "HunyuanVideo, double block": Entry(hunyuan_video, hunyuan_video_inputs),
    "HunyuanVideo, single block": Entry(hunyuan_video, hunyuan_video_inputs),
    "HunyuanVideo 1.5": Entry(hunyuan_video15, hunyuan_video15_inputs),
    "Mochi": Entry(mochi, mochi_inputs),
    "Wan 2.1, 2.2": Entry(wan, wan_inputs),
    "Wan VACE": Entry(wan_vace, wan_vace_inputs),
    "SkyReels V2": Entry(skyreels, wan_inputs),
    "SkyReels V2, causal blocks": Entry(skyreels_causal, lambda: wan_inputs(views=4), views=4),
    "CogVideoX": Entry(cogvideox, cogvideox_inputs),
    "LTX-Video": Entry(ltx, ltx_inputs),
    "Cosmos": Entry(cosmos, cosmos_inputs),
    "Kandinsky 5": Entry(kandinsky5, kandinsky5_inputs),
}
