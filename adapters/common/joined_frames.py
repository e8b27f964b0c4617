"""Let a video U-Net's per-frame self-attention attend to the tokens of all frames of a sample, by hooks.

Axes: b samples, t frames, s tokens of one frame, c channels. Works on diffusers' `TransformerSpatioTemporalModel`
and on SGM's `SpatialVideoTransformer`: both run `transformer_blocks.N.attn1` on `(b t) s c` and receive the
number of frames, which a hook on them passes on.
"""

from __future__ import annotations

import inspect
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from cameo.errors import ShapeError

__all__ = ["deflate", "inflate", "is_inflated"]


class _TellFrames:
    """Pre-hook of the transformer: pass the number of frames of this forward on to one of its attention layers.

    A class and not a closure, so that the model can be pickled. It holds the name of the layer and not the layer, so
    that in a deep copy it finds the layer of the copy.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(type(transformer).forward).bind_partial(transformer, *args, **kwargs).arguments
        frames = next((given[name] for name in ("timesteps", "num_frames") if isinstance(given.get(name), int)), None)
        indicator = given.get("image_only_indicator")  # [b, t], where diffusers' blocks find the number of frames
        if frames is None and isinstance(indicator, Tensor):
            frames = indicator.shape[-1]
        transformer.get_submodule(self.name).joined_frames = frames  # type: ignore[assignment]


def inflate(model: nn.Module, path: str) -> None:
    """Join the frames in the self-attention at `path`, in place; its weights and state dict stay as they are.

    The number of frames is that of the latest forward, also for a recomputation under non-reentrant checkpointing;
    a forward with another number of frames between a forward and its backward makes torch raise an error about shapes.

    Example:
        >>> import torch
        >>> from cameo.backbone import get_backbone
        >>> adapter = get_backbone("sv3d")
        >>> unet = adapter.build("tiny").unet
        >>> path = adapter.inflatable_layers(unet)[0].path
        >>> inflate(unet, path)
        >>> is_inflated(unet, path), deflate(unet, path), is_inflated(unet, path)
        (True, None, False)

    Raises:
        ValueError: if the path does not name an attention inside a video transformer.
    """
    owner, inside, name = path.rpartition(".transformer_blocks.")
    if not inside:
        raise ValueError(f"path: expected '... .transformer_blocks.N.attn1', got {path!r}")
    name = f"transformer_blocks.{name}"
    attention, transformer = model.get_submodule(path), model.get_submodule(owner)
    if is_inflated(model, path):
        return
    attention.joined_frames = None  # type: ignore[assignment]
    # The handles are kept to remove the hooks. Pickled with the module they also keep the ids of its hooks from being
    # given a second time in another process.
    attention.frame_hooks = [  # type: ignore[assignment]
        transformer.register_forward_pre_hook(_TellFrames(name), with_kwargs=True),
        attention.register_forward_pre_hook(_join),
        attention.register_forward_hook(_separate),
    ]


def deflate(model: nn.Module, path: str) -> None:
    """Let the layer at `path` attend within one frame again; does nothing where it already does."""
    attention = model.get_submodule(path)
    if not is_inflated(model, path):
        return
    for handle in attention.frame_hooks:  # type: ignore[union-attr]
        handle.remove()
    del attention.frame_hooks, attention.joined_frames


def is_inflated(model: nn.Module, path: str) -> bool:
    """Whether the frames are joined in the layer at `path`."""
    return hasattr(model.get_submodule(path), "frame_hooks")


def _join(attention: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    tokens, *rest = args
    frames: Any = attention.joined_frames
    if frames is None:
        raise RuntimeError(
            "an inflated attention does not know the number of frames: call it through its transformer, with "
            "image_only_indicator [b, t] (diffusers) or timesteps=t (SGM)"
        )
    if tokens.shape[0] % frames:
        raise ShapeError(
            "hidden states of an inflated attention",
            expected=f"[(b t), s, c] with t = {frames} frames",
            got=tokens.shape,
            cure="Run the backward of a forward before the next forward with another number of frames",
        )
    return rearrange(tokens, "(b t) s c -> b (t s) c", t=frames), *rest


def _separate(attention: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return rearrange(output, "b (t s) c -> (b t) s c", t=attention.joined_frames)
