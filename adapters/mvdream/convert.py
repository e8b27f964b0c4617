"""Between the weights of the original MVDream and ImageDream (ldm names) and those of diffusers' U-Net.

The names are derived from the structure, so that every depth and width converts: Stable Diffusion 2.1 and 1.5 shapes
as well as small ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["from_ldm", "to_ldm", "unet_config"]

PREFIX = "model.diffusion_model."
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "camera_embed.0": "class_embedding.linear_1",
    "camera_embed.2": "class_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
# ImageDream turns the image prompt's CLIP tokens into 16 more tokens of context: its resampler is IP-Adapter Plus's.
RESAMPLER, PROJECTION = "image_embed", "encoder_hid_proj.image_projection_layers.0"
RESAMPLER_LAYER = {
    "0.norm1": "ln0",
    "0.norm2": "ln1",
    "0.to_q": "attn.to_q",
    "0.to_out": "attn.to_out.0",
    "1.0": "ff.0",
    "1.1": "ff.1.net.0.proj",
    "1.3": "ff.1.net.2",
}
IMAGE_KEYS = {"attn2.to_k_ip": "attn2.processor.to_k_ip.0", "attn2.to_v_ip": "attn2.processor.to_v_ip.0"}

Level = tuple[list[bool], bool]  # whether an attention follows each residual block; whether the level is resampled


def from_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an original U-Net for diffusers' `UNet2DConditionModel`; the tensors are not copied.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("mvdream").build("tiny").unet
        >>> original = to_ldm(unet.state_dict())
        >>> "camera_embed.0.weight" in original
        True
        >>> from_ldm(original).keys() == unet.state_dict().keys()
        True

    Args:
        state: state dict of a `MultiViewUNetModel`, or a whole checkpoint, whose other parts are left aside.

    Raises:
        ValueError: if a name is not part of such a model, or the camera embedding is missing; says which.
    """
    state = unet_part(state)
    names = _names(_levels_of_ldm(state), state)
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if match := re.fullmatch(rf"{RESAMPLER}\.layers\.(\d+)\.0\.to_kv\.weight", key):
            for name, half in zip(("to_k", "to_v"), value.chunk(2), strict=True):
                converted[f"{PROJECTION}.layers.{match[1]}.attn.{name}.weight"] = half
        else:
            converted[_rename(key, names)] = value
    return converted


def to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of our U-Net for the original `MultiViewUNetModel`; the inverse of `from_ldm`, bit for bit.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> state = get_backbone("mvdream").build("tiny").unet.state_dict()
        >>> all(value is state[key] for key, value in from_ldm(to_ldm(state)).items())
        True

    Raises:
        ValueError: if a name is not part of such a model; says which.
    """
    names = {ours: theirs for theirs, ours in _names(_levels_of_diffusers(state), state).items()}
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(rf"{re.escape(PROJECTION)}\.layers\.(\d+)\.attn\.to_(k|v)\.weight", key)
        if not match:
            converted[_rename(key, names)] = value
        elif match[2] == "k":
            halves = [value, state[key.replace("to_k", "to_v")]]
            converted[f"{RESAMPLER}.layers.{match[1]}.0.to_kv.weight"] = torch.cat(halves)
    return converted


def unet_config(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, num_head_channels: int | None = None
) -> dict[str, Any]:
    """Arguments of the diffusers U-Net that fits an original state dict.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("mvdream").build("tiny").unet
        >>> unet_config(to_ldm(unet.state_dict()), num_heads=4)["attention_head_dim"]
        (4, 4)

    Args:
        state: state dict of a `MultiViewUNetModel`, or a whole checkpoint.
        num_heads: attention heads of every layer; the weights do not tell.
        num_head_channels: channels per head instead. Default for both: those of the releases, 64 channels where the
            projections are linear (Stable Diffusion 2.1), else 8 heads (1.5).

    Raises:
        ValueError: if this is not MVDream's structure.
    """
    state = unet_part(state)
    down, _ = _levels_of_ldm(state)
    converted = from_ldm(state)
    widths = tuple(converted[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(len(down)))
    depths = {len(resnets) for resnets, _ in down}
    if len(depths) != 1 or any(len(set(resnets)) != 1 for resnets, _ in down):
        raise ValueError(f"state: expected equal levels with attention in every block of a level or none, got {down}")
    attends = [resnets[0] for resnets, _ in down]
    linear = converted["mid_block.attentions.0.proj_in.weight"].ndim == 2
    if num_heads is None and num_head_channels is None:
        num_heads, num_head_channels = (None, 64) if linear else (8, None)
    config: dict[str, Any] = {
        "in_channels": converted["conv_in.weight"].shape[1],
        "out_channels": converted["conv_out.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": depths.pop(),
        "down_block_types": tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attends)),
        # diffusers' historical name for the number of heads
        "attention_head_dim": tuple(num_heads or width // (num_head_channels or 1) for width in widths),
        "transformer_layers_per_block": _depth(converted),
        "cross_attention_dim": converted["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "use_linear_projection": linear,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": converted["class_embedding.linear_1.weight"].shape[1],
    }
    if f"{PROJECTION}.latents" in converted:
        config |= {
            "encoder_hid_dim_type": "ip_image_proj",
            "encoder_hid_dim": converted[f"{PROJECTION}.proj_in.weight"].shape[1],
        }
    return config


def unet_part(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Part of a checkpoint that is the U-Net, without its prefix `model.diffusion_model.`."""
    inner = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    inner = inner or dict(state)
    if "camera_embed.0.weight" not in inner or "input_blocks.0.0.weight" not in inner:
        raise ValueError(
            "state: expected the names of MVDream's U-Net (input_blocks.0.0.weight, camera_embed.0.weight), with or "
            f"without the prefix {PREFIX}, got {sorted(state)[:3]}"
        )
    return inner


def _levels_of_ldm(state: Mapping[str, Tensor]) -> tuple[list[Level], list[Level]]:
    """Read the levels, in execution order, from the numbered blocks."""

    def read(part: str, first: int, resample: tuple[str, ...]) -> list[Level]:
        levels: list[Level] = []
        attends: list[bool] = []
        for number in range(first, 1 + max(_numbers(state, part), default=-1)):
            block = f"{part}.{number}"
            resampled = any(f"{block}.{name}.weight" in state for name in resample)
            if f"{block}.0.in_layers.0.weight" in state:
                attends.append(f"{block}.1.norm.weight" in state)
            if resampled:
                levels.append((attends, True))
                attends = []
        return [*levels, (attends, False)]

    return read("input_blocks", 1, ("0.op",)), read("output_blocks", 0, ("1.conv", "2.conv"))


def _levels_of_diffusers(state: Mapping[str, Tensor]) -> tuple[list[Level], list[Level]]:
    def read(part: str, resample: str) -> list[Level]:
        return [
            (
                [
                    f"{part}.{level}.attentions.{number}.norm.weight" in state
                    for number in sorted(_numbers(state, f"{part}.{level}.resnets"))
                ],
                f"{part}.{level}.{resample}.0.conv.weight" in state,
            )
            for level in sorted(_numbers(state, part))
        ]

    return read("down_blocks", "downsamplers"), read("up_blocks", "upsamplers")


def _names(levels: tuple[list[Level], list[Level]], state: Iterable[str]) -> dict[str, str]:
    """Module names, theirs to ours; what stands behind them is named alike."""
    names = dict(OUTSIDE)

    def resnet(theirs: str, ours: str) -> None:
        names.update({f"{theirs}.{inner}": f"{ours}.{name}" for inner, name in RESNET.items()})

    def attention(theirs: str, ours: str) -> None:
        names[theirs] = ours
        for depth in range(64):
            block = f"transformer_blocks.{depth}"
            if not any(f"{prefix}.{block}.norm1.weight" in known for prefix in (theirs, ours)):
                break
            names.update({f"{theirs}.{block}.{inner}": f"{ours}.{block}.{name}" for inner, name in IMAGE_KEYS.items()})

    known = set(state)
    resnet("middle_block.0", "mid_block.resnets.0")
    attention("middle_block.1", "mid_block.attentions.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    for part, number, name, of in (("input", 1, "down", levels[0]), ("output", 0, "up", levels[1])):
        for level, (attends, resampled) in enumerate(of):
            for index, attended in enumerate(attends):
                resnet(f"{part}_blocks.{number}.0", f"{name}_blocks.{level}.resnets.{index}")
                if attended:
                    attention(f"{part}_blocks.{number}.1", f"{name}_blocks.{level}.attentions.{index}")
                number += 1
            if resampled and name == "down":  # a block of its own
                names[f"input_blocks.{number}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
                number += 1
            elif resampled:  # the last module of the level's last block
                place = 1 + attends[-1]
                names[f"output_blocks.{number - 1}.{place}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    for inner in ("latents", "proj_in", "proj_out", "norm_out"):
        names[f"{RESAMPLER}.{inner}"] = f"{PROJECTION}.{inner}"
    for layer in _numbers(known, f"{RESAMPLER}.layers") | _numbers(known, f"{PROJECTION}.layers"):
        for inner, name in RESAMPLER_LAYER.items():
            names[f"{RESAMPLER}.layers.{layer}.{inner}"] = f"{PROJECTION}.layers.{layer}.{name}"
    return names


def _rename(key: str, names: Mapping[str, str]) -> str:
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        if (module := ".".join(parts[:count])) in names:
            return ".".join([names[module], *parts[count:]])
    cure = ""
    if key.startswith((f"{RESAMPLER}.", "encoder_hid_proj.")):
        cure = ". Of ImageDream's image adapters only local_resample is known, which all its releases use"
    raise ValueError(f"state: {key} is not part of MVDream's or ImageDream's U-Net{cure}")


def _numbers(state: Iterable[str], part: str) -> set[int]:
    pattern = re.compile(rf"{re.escape(part)}\.(\d+)\.")
    return {int(match[1]) for key in state if (match := pattern.match(key))}


def _depth(converted: Mapping[str, Tensor]) -> int:
    return len(_numbers(converted, "mid_block.attentions.0.transformer_blocks"))
