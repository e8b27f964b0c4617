"""What the adapters' `build` have in common: the values of a preset, and the U-Net that they describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cameo.backbone import Backbone
from cameo.errors import unknown_name

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["block_settings", "preset_values", "unet_2d"]


def preset_values(adapter: Backbone, preset: str, options: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Values of a preset over an adapter's defaults, and the caller's options over both.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> preset_values(get_backbone("cat3d"), "tiny", {"heads": 8}, patch_size=4)["heads"]
        8

    Raises:
        ValueError: for a preset or an option that the adapter does not have; lists those it has.
    """
    if preset not in adapter.presets:
        raise unknown_name(f"preset of {adapter.name}", preset, adapter.presets)
    values = {**defaults, **adapter.presets[preset]}
    for name in options:
        if name not in values:
            raise unknown_name(f"option of {adapter.name}", name, values)
    return {**values, **options}


def block_settings(values: Mapping[str, Any], kind: str = "2D") -> dict[str, Any]:
    """Settings of a diffusers U-Net for its resolutions, finest first; `kind` ends the names of its blocks.

    Example:
        >>> values = {"block_out_channels": (32, 64), "attention_levels": (False, True), "layers_per_block": 1}
        >>> block_settings(values)["up_block_types"]
        ('CrossAttnUpBlock2D', 'UpBlock2D')

    Raises:
        ValueError: unless there is one flag of attention per width.
    """
    widths, attends = tuple(values["block_out_channels"]), tuple(values["attention_levels"])
    if len(widths) != len(attends):
        raise ValueError(f"attention_levels: expected one flag per width {widths}, got {attends}")
    return {
        "block_out_channels": widths,
        "layers_per_block": values["layers_per_block"],
        "down_block_types": tuple(f"{'CrossAttn' if on else ''}DownBlock{kind}" for on in attends),
        "up_block_types": tuple(f"{'CrossAttn' if on else ''}UpBlock{kind}" for on in reversed(attends)),
    }


def unet_2d(values: Mapping[str, Any], **settings: Any) -> UNet2DConditionModel:
    """Build the U-Net of a preset in pixel space, with fresh weights; `settings` are of diffusers' class."""
    from diffusers import UNet2DConditionModel

    channels = 3 * values["patch_size"] ** 2
    defaults = {
        "sample_size": values["image_size"] // values["patch_size"],
        "in_channels": channels,
        "out_channels": channels,
        "attention_head_dim": values["heads"],  # diffusers' historical name for the number of heads
        "cross_attention_dim": 8,
        "norm_num_groups": values["norm_num_groups"],
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**{**defaults, **block_settings(values), **settings})
