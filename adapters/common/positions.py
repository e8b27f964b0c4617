"""A fixed map of positions behind the first convolution of a U-Net that is trained from scratch.

A small U-Net whose attention works on few cells has neither the depth nor the pretraining from which the released ones
know where a token is, and without that it does not learn to copy from another view. The map has no parameters, so the
weights and the state dict stay those of the U-Net. It is no part of them either: what loads the U-Net alone has to
call `set_position`, as the pipelines of this package do.

Axes: B images, C channels, h w cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cameo.errors import unknown_name

__all__ = ["POSITIONS", "PositionMap", "get_position", "set_position", "sincos"]

POSITIONS = ("none", "sincos")
BASE = 10000.0  # of the wave lengths, as in DiT


def sincos(rows: Tensor, columns: Tensor, channels: int) -> Tensor:
    """Sines and cosines of two coordinates, `[C, h, w]` in float64: half of the channels for y, half for x.

    Example:
        >>> [round(value, 2) for value in sincos(torch.arange(2), torch.arange(3), 8)[:, 1, 2].tolist()]
        [0.84, 0.01, 0.54, 1.0, 0.91, 0.02, -0.42, 1.0]

    Args:
        rows, columns: y `[h]` and x `[w]`, in cells.
        channels: C, a multiple of 4.

    Source: Scalable Diffusion Models with Transformers, arXiv 2212.09748, whose map this is but for its order of axes.
    """
    quarter = channels // 4
    rates = BASE ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    halves = []
    for coordinates in (rows, columns):
        angles = coordinates.double() * rates[:, None]
        halves.append(torch.cat([angles.sin(), angles.cos()]))
    y, x = halves
    return torch.cat([y[:, :, None].expand(-1, -1, len(columns)), x[:, None].expand(-1, len(rows), -1)])


class PositionMap:
    """Forward hook of a first convolution: add the map of `sincos` at cell indices to its output.

    Example:
        >>> convolution = nn.Conv2d(3, 8, 3, padding=1)
        >>> image = torch.zeros(1, 3, 4, 5)
        >>> before = convolution(image)
        >>> handle = convolution.register_forward_hook(PositionMap())
        >>> torch.equal(convolution(image), before + sincos(torch.arange(4), torch.arange(5), 8).float())
        True

    A class and not a closure, so that the model can be pickled and copied. A family whose first convolution runs on
    other grids than one view's overrides `build`. Maps are kept by shape, precision and device, and not copied along.
    """

    kind = "sincos"

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, convolution: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add the map to the output `[B, C, h, w]`, in its precision."""
        channels, height, width = output.shape[-3:]
        if torch.compiler.is_compiling() or type(output) is not Tensor:  # what is traced must not be kept
            return output + self.build(channels, height, width).to(output)
        key = (channels, height, width, output.dtype, output.device)
        if key not in self._kept:
            with torch.inference_mode(False), torch.no_grad():  # a kept map serves sampling and training
                self._kept[key] = self.build(channels, height, width).to(output)
        return output + self._kept[key]

    def __getstate__(self) -> Mapping[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def build(self, channels: int, height: int, width: int) -> Tensor:
        """Map `[C, h, w]` of a grid, in float64 on the CPU."""
        return sincos(torch.arange(height), torch.arange(width), channels)


def set_position(unet: nn.Module, position: str, hook: PositionMap | None = None) -> None:
    """Let the first convolution of a U-Net add a map of positions, or no longer, in place; the weights stay.

    A second call adds it no second time. The map is behind the convolution itself, inside of a LoRA on it.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("cat3d").build("tiny", position="none").unet
        >>> set_position(unet, "sincos")
        >>> get_position(unet)
        'sincos'

    Args:
        unet: a U-Net of diffusers, whose first convolution is `conv_in`.
        position: "none" or "sincos".
        hook: builds the map; default `PositionMap()`.

    Raises:
        ValueError: for another position, for a model without such a convolution, or a width that is no multiple of 4.
    """
    if position not in POSITIONS:
        raise unknown_name("position", position, POSITIONS)
    convolution = _first_convolution(unet)
    if position == "none":
        _remove(convolution)
        return
    if convolution is None:
        raise ValueError(
            f"position={position!r}: is added behind the first convolution of a U-Net, conv_in, which a "
            f"{type(unet).__name__} does not have; expected position='none'"
        )
    channels = int(convolution.out_channels)  # type: ignore[arg-type]
    if channels % 4:
        raise ValueError(
            f"position={position!r}: takes a multiple of 4 channels behind the first convolution, got {channels}; "
            "change block_out_channels, or build with position='none'"
        )
    _remove(convolution)
    # Pickled with the module, the handle keeps the id of its hook from being given again in another process.
    convolution.position_hook = convolution.register_forward_hook(hook or PositionMap())  # type: ignore[assignment]


def get_position(unet: nn.Module) -> str:
    """Tell which map of positions the first convolution of a model adds, "none" where it has no such convolution."""
    convolution = _first_convolution(unet)
    hooks: Sequence[Any] = () if convolution is None else list(convolution._forward_hooks.values())
    return next((hook.kind for hook in hooks if isinstance(hook, PositionMap)), "none")


def _remove(convolution: nn.Module | None) -> None:
    if convolution is not None and hasattr(convolution, "position_hook"):
        convolution.position_hook.remove()  # type: ignore[operator,union-attr]
        del convolution.position_hook


def _first_convolution(unet: nn.Module) -> nn.Module | None:
    """`conv_in`, without the LoRA around it: the map is to stay when the LoRA is taken off."""
    convolution: Any = getattr(unet, "conv_in", None)
    if hasattr(convolution, "get_base_layer"):
        convolution = convolution.get_base_layer()
    return convolution if isinstance(convolution, nn.Conv2d) else None
