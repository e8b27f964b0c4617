"""Weights of SGM's `VideoUNet` under the names of diffusers' `UNetSpatioTemporalConditionModel`, and back.

Only names differ: no tensor is reshaped, so a round trip is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cameo.errors import DataError
from cameo.untrusted.reading import check_weights

__all__ = ["from_sgm", "read_sgm_checkpoint", "settings_from_sgm", "to_sgm"]

PREFIX = "model.diffusion_model."
ROOT = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
RESNET = {
    **{old: f"spatial_res_block.{new}" for old, new in RESIDUAL.items()},
    **{f"time_stack.{old}": f"temporal_res_block.{new}" for old, new in RESIDUAL.items()},
    "time_mixer": "time_mixer",
}
TRANSFORMER = {
    **{name: name for name in ("norm", "proj_in", "transformer_blocks", "time_mixer", "proj_out")},
    "time_stack": "temporal_transformer_blocks",
    "time_pos_embed.0": "time_pos_embed.linear_1",
    "time_pos_embed.2": "time_pos_embed.linear_2",
}


def settings_from_sgm(
    weights: Mapping[str, Tensor], *, head_channels: int = 64, addition_time_embed_dim: int = 256
) -> dict[str, Any]:
    """Read the settings of `SV3DUNet` off the shapes of a `VideoUNet`.

    Args:
        weights: state dict of the `VideoUNet`, without a prefix.
        head_channels: channels of an attention head, which no shape tells; 64 in the release.
        addition_time_embed_dim: features of one number, 256 in the release.

    Raises:
        DataError: if a weight is missing, or the projections around the attention are convolutions.
    """
    try:
        channels, attends, layers = [_outputs(weights, "input_blocks.1.0")], [False], [0]
        index = 1
        while f"input_blocks.{index}.0.in_layers.2.weight" in weights or f"input_blocks.{index}.0.op.weight" in weights:
            if f"input_blocks.{index}.0.op.weight" in weights:
                channels, attends, layers = [*channels, 0], [*attends, False], [*layers, 0]
            else:
                channels[-1] = _outputs(weights, f"input_blocks.{index}.0")
                attends[-1] = f"input_blocks.{index}.1.norm.weight" in weights
                layers[-1] += 1
            index += 1
        depth = 1
        while f"middle_block.1.transformer_blocks.{depth}.norm1.weight" in weights:
            depth += 1
        if weights["middle_block.1.proj_in.weight"].ndim != 2:
            raise DataError("weights: expected linear projections around the attentions, got convolutions")
        down = tuple(f"{'CrossAttn' if on else ''}DownBlockSpatioTemporal" for on in attends)
        up = tuple(f"{'CrossAttn' if on else ''}UpBlockSpatioTemporal" for on in reversed(attends))
        return {
            "in_channels": weights["input_blocks.0.0.weight"].shape[1],
            "out_channels": weights["out.2.weight"].shape[0],
            "block_out_channels": tuple(channels),
            "down_block_types": down,
            "up_block_types": up,
            "layers_per_block": layers[0],
            "transformer_layers_per_block": depth,
            "num_attention_heads": tuple(count // head_channels for count in channels),
            "cross_attention_dim": weights["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
            "addition_time_embed_dim": addition_time_embed_dim,
            "projection_class_embeddings_input_dim": weights["label_emb.0.0.weight"].shape[1],
        }
    except KeyError as error:
        raise DataError(f"weights: expected those of SGM's VideoUNet, got none called {error}") from error


def from_sgm(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name the weights of a `VideoUNet` as diffusers does.

    Example:
        >>> import torch
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("sv3d").build("tiny").unet
        >>> sgm = to_sgm(unet.state_dict(), unet.config)
        >>> sorted(sgm)[0], from_sgm(sgm, unet.config).keys() == unet.state_dict().keys()
        ('input_blocks.0.0.bias', True)

    Args:
        weights: state dict without a prefix.
        settings: `unet.config`, or what `settings_from_sgm` returns.

    Raises:
        DataError: for a weight that has no name there.
    """
    return _renamed(weights, _modules(settings))


def to_sgm(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Undo `from_sgm`."""
    return _renamed(weights, {new: old for old, new in _modules(settings).items()})


def read_sgm_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Weights of the `VideoUNet` in a `.safetensors` file of SGM's engine, or of the U-Net alone; without prefix."""
    from safetensors import safe_open

    check_weights(Path(path))
    with safe_open(str(path), "pt") as file:
        names = list(file.keys())
        prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)}


def _modules(settings: Mapping[str, Any]) -> dict[str, str]:
    """SGM's names of the parts of the U-Net, to diffusers' names."""
    levels, layers = len(settings["block_out_channels"]), settings["layers_per_block"]
    attends = ["CrossAttn" in kind for kind in settings["down_block_types"]]
    names, index = dict(ROOT), 0

    def add(old: str, new: str, parts: Mapping[str, str]) -> None:
        names.update({f"{old}.{theirs}": f"{new}.{ours}" for theirs, ours in parts.items()})

    for level in range(levels):
        for layer in range(layers):
            index += 1
            add(f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{layer}", RESNET)
            if attends[level]:
                add(f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{layer}", TRANSFORMER)
        if level < levels - 1:
            index += 1
            names[f"input_blocks.{index}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    add("middle_block.0", "mid_block.resnets.0", RESNET)
    add("middle_block.1", "mid_block.attentions.0", TRANSFORMER)
    add("middle_block.2", "mid_block.resnets.1", RESNET)
    index = -1
    for block, attending in enumerate(reversed(attends)):
        for layer in range(layers + 1):
            index += 1
            add(f"output_blocks.{index}.0", f"up_blocks.{block}.resnets.{layer}", RESNET)
            if attending:
                add(f"output_blocks.{index}.1", f"up_blocks.{block}.attentions.{layer}", TRANSFORMER)
        if block < levels - 1:
            names[f"output_blocks.{index}.{1 + attending}.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
    return names


def _renamed(weights: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in weights.items():
        head, rest = name, ""
        while head not in modules:
            head, _, last = head.rpartition(".")
            rest = f".{last}{rest}"
            if not head:
                raise DataError(f"weights: {name!r} has no counterpart; the settings are those of another U-Net")
        renamed[modules[head] + rest] = value
    return renamed


def _outputs(weights: Mapping[str, Tensor], block: str) -> int:
    return int(weights[f"{block}.in_layers.2.weight"].shape[0])
