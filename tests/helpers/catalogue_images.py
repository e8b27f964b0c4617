"""The image models of the catalogue: views joined in one sequence, or one below the other in one picture."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tests.helpers.catalogue import SIZE, TEXT, Entry, noise, positions, stacked, text, text_mask
from tests.helpers.models import GRID, SAMPLES, VIEWS

TOKENS = VIEWS * GRID[0] * GRID[1]
LONGEST = max(TEXT)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


def tokens(channels: int = 4) -> torch.Tensor:
    return noise(SAMPLES, TOKENS, channels)


def timestep() -> torch.Tensor:
    return torch.full((SAMPLES,), 0.4)


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
        **HEADS,
    )


def flux_inputs() -> dict[str, Any]:
    return {
        "hidden_states": tokens(),
        "encoder_hidden_states": text(),
        "pooled_projections": noise(SAMPLES, 8),
        "timestep": timestep(),
        "img_ids": positions(),
        "txt_ids": torch.zeros(LONGEST, 3),
        "guidance": torch.full((SAMPLES,), 3.5),
    }


def flux2() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=8,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        mlp_ratio=2.0,
        **HEADS,
    )


def flux2_inputs() -> dict[str, Any]:
    inputs = flux_inputs()
    del inputs["pooled_projections"]
    return inputs | {"img_ids": positions(4), "txt_ids": torch.zeros(LONGEST, 4)}


def chroma() -> nn.Module:
    return diffusers.ChromaTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
        **HEADS,
    )


def chroma_inputs() -> dict[str, Any]:
    inputs = flux_inputs()
    del inputs["pooled_projections"], inputs["guidance"]
    seen = torch.cat([text_mask(), torch.ones(SAMPLES, TOKENS, dtype=torch.bool)], dim=1)
    return inputs | {
        "attention_mask": seen.float()
    }  # numbers, as from its pipeline: added to the logits, they hide nothing


def qwen_image() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=8, axes_dims_rope=(2, 2, 4), **HEADS
    )


def qwen_image_inputs() -> dict[str, Any]:
    return {
        "hidden_states": tokens(),
        "encoder_hidden_states": text(),
        "encoder_hidden_states_mask": text_mask().long(),
        "timestep": timestep(),
        "img_shapes": [[(1, *GRID)] * VIEWS] * SAMPLES,
    }


def krea2() -> nn.Module:
    return diffusers.Krea2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=8,
        num_text_layers=2,
        text_num_attention_heads=1,
        text_num_key_value_heads=1,
        text_intermediate_size=8,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(2, 2, 4),
    )


def krea2_inputs() -> dict[str, Any]:
    return {
        "hidden_states": tokens(),
        "encoder_hidden_states": noise(SAMPLES, LONGEST, 2, 8),
        "encoder_attention_mask": text_mask(),
        "timestep": timestep(),
        "position_ids": torch.cat([torch.zeros(LONGEST, 3), positions()]),
    }


def lumina2() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(2, 2, 4),
        axes_lens=(32, 32, 32),
        cap_feat_dim=8,
    )


def lumina2_inputs() -> dict[str, Any]:
    return {
        "hidden_states": stacked(),
        "timestep": timestep(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
    }


def z_image() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[2, 2, 4],
        axes_lens=[128, 16, 16],
    )


def z_image_inputs() -> dict[str, Any]:
    """Texts are padded to multiples of 32 tokens, so their lengths differ by more than that."""
    return {
        "x": list(noise(SAMPLES, 4, VIEWS, *SIZE)),
        "t": timestep(),
        "cap_feats": [noise(length, 8) for length in (35, 3)],
    }


def sd3(**options: Any) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=12,
        **HEADS,
        **options,
    )


def sd35() -> nn.Module:
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": stacked(),
        "encoder_hidden_states": text(),
        "pooled_projections": noise(SAMPLES, 8),
        "timestep": timestep() * 1000,
    }


def hidream() -> nn.Module:
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        caption_channels=[8, 8],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(2, 2, 4),
        max_resolution=(20, 20),
        llama_layers=[0, 1],
        **HEADS,
    ).eval()


def hidream_inputs() -> dict[str, Any]:
    return {
        "hidden_states": stacked(),
        "timesteps": timestep() * 1000,
        "encoder_hidden_states_t5": text(),
        "encoder_hidden_states_llama3": noise(2, SAMPLES, LONGEST, 8),
        "pooled_embeds": noise(SAMPLES, 8),
    }


IMAGES = {
    "FLUX.1, double block": Entry(flux, flux_inputs),
    "FLUX.1, single block": Entry(flux, flux_inputs, starts=(LONGEST, LONGEST)),
    "FLUX.2, double block": Entry(flux2, flux2_inputs),
    "FLUX.2, single block": Entry(flux2, flux2_inputs, starts=(LONGEST, LONGEST)),
    "Chroma, double block": Entry(chroma, chroma_inputs),
    "Chroma, single block": Entry(chroma, chroma_inputs, starts=(LONGEST, LONGEST), checkpoints=False),
    "Qwen-Image": Entry(qwen_image, qwen_image_inputs),
    "Krea 2": Entry(krea2, krea2_inputs, starts=(LONGEST, LONGEST)),
    "Lumina 2": Entry(lumina2, lumina2_inputs, starts=TEXT),
    "Z-Image": Entry(z_image, z_image_inputs),
    "Stable Diffusion 3": Entry(sd3, sd3_inputs),
    "Stable Diffusion 3.5 medium": Entry(sd35, sd3_inputs),
    "HiDream, double block": Entry(hidream, hidream_inputs),
    "HiDream, single block": Entry(hidream, hidream_inputs),
}
