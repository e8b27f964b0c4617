"""Adapter for SV3D: video U-Nets in which a query of the temporal attention reaches its own cell in every frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from cameo.adapters.common import joined_frames
from cameo.adapters.common.positions import get_position, set_position
from cameo.adapters.common.presets import block_settings, preset_values
from cameo.adapters.common.unet_layers import default_layer_index
from cameo.adapters.sv3d.layers import (
    embedding_width,
    find_attentions,
    find_levels,
    own_view_layout,
    reentrant_checkpointing,
    token_layout,
    token_strides,
)
from cameo.attention.capture import AttentionLayer
from cameo.backbone import Backbone, Release

__all__ = ["SV3D"]

LICENSE = {
    "license": "other",
    "license_name": "sv3d-nc-community",
    "license_link": "https://huggingface.co/stabilityai/sv3d",
}

STRIDE_CURE = "before cameo.wrap call unet.register_to_config(latent_stride=8), as an SV3DPipeline does"


class SV3D(Backbone):
    """An orbit around an object, from one image: all frames denoised together, the conditioning frame last.

    Recognizes diffusers' `UNetSpatioTemporalConditionModel`, `SV3DUNet` and SGM's `VideoUNet`. The layers are the
    temporal attentions, which reach one token of each frame; `inflate=True` offers the spatial ones instead and joins
    the frames in them. `own_view=True` offers the spatial ones as they are: every frame carries the latents of the
    reference in its input channels, so the match of a token in the reference is also a token of its own frame.

    Stable Video Diffusion has the same classes, but its conditioning frame is the first. A model is taken for Stable
    Video Diffusion if its added embedding takes three numbers (768 features), for SV3D otherwise (256 or 1280).

    Presets, in pixel space: `tiny` (32 px, CPU), `small` (64 px, one GPU).
    """

    name = "sv3d"
    pipeline_tag = "image-to-3d"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "image_size": 32,
            "block_out_channels": (32, 64),
            "attention_levels": (False, True),
            "heads": 4,
            "layers_per_block": 1,
            "embed_dim": 32,
            "position": "sincos",
        },
        "small": {
            "image_size": 64,
            "block_out_channels": (128, 256, 384),
            "attention_levels": (False, True, True),
            "heads": 8,
            "layers_per_block": 2,
            "embed_dim": 128,
            "position": "sincos",
        },
    }
    preset_license = "apache-2.0"
    released: ClassVar[Mapping[str, Release]] = {
        "bundled:sv3d-tiny": Release("apache-2.0", holds="`tiny`, small, that knows views a few degrees apart"),
        "chenguolin/sv3d-diffusers": Release(
            LICENSE, revision="cf4c88acda116901e1e21aa9afa61976a21363f8", holds="SV3D_p, diffusers layout"
        ),
        "stabilityai/sv3d": Release(LICENSE, holds="SV3D_p and SV3D_u, original checkpoints (gated)"),
    }

    def recognizes(self, model: nn.Module) -> bool:
        """Whether the model has temporal attentions beside its spatial ones, under the names of diffusers or SGM."""
        return bool(find_attentions(model, temporal=True))

    def explain_mismatch(self, model: nn.Module) -> str:
        """Name the modules that are missing."""
        return (
            f"{type(model).__name__} has no modules named like "
            "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1 (diffusers) or "
            "input_blocks.1.1.time_stack.0.attn1 (SGM). Pass the U-Net itself (pipeline.unet), a "
            "UNetSpatioTemporalConditionModel or a VideoUNet"
        )

    def attention_layers(self, model: nn.Module) -> list[AttentionLayer]:
        """List the temporal attentions in execution order; a query reaches its own cell in every frame."""
        return _attention_layers(model, temporal=True)

    def inflatable_layers(self, model: nn.Module) -> list[AttentionLayer]:
        """List the spatial self-attentions in execution order, with their layout once the frames are joined."""
        return _attention_layers(model, temporal=False)

    def own_view_layers(self, model: nn.Module) -> list[AttentionLayer]:
        """List the spatial self-attentions in execution order, as the attention within each frame."""
        return [replace(layer, layout=own_view_layout(model, layer.path)) for layer in self.inflatable_layers(model)]

    def inflate(self, model: nn.Module, path: str) -> None:
        """Join the frames in a spatial self-attention; an `SV3DUNet` keeps that in its config."""
        joined_frames.inflate(model, path)
        config = getattr(model, "config", None)
        if config is not None and "joined_layers" in config and path not in config["joined_layers"]:
            model.register_to_config(joined_layers=[*config["joined_layers"], path])  # type: ignore[operator]

    def deflate(self, model: nn.Module, path: str) -> None:
        """Undo `inflate`."""
        joined_frames.deflate(model, path)
        config = getattr(model, "config", None)
        if config is not None and path in config.get("joined_layers", ()):
            left = [other for other in config["joined_layers"] if other != path]
            model.register_to_config(joined_layers=left)  # type: ignore[operator]

    def position(self, model: nn.Module) -> str:
        """Name the map behind the first convolution of a U-Net of diffusers, see `cameo.adapters.common.positions`."""
        return get_position(model)

    def set_position(self, model: nn.Module, position: str) -> None:
        """Add the map "sincos", or take it off with "none"."""
        set_position(model, position)

    def unsupported(self, model: nn.Module) -> str | None:
        """Name SGM's reentrant gradient checkpointing, which hides the attention's queries from the loss."""
        return reentrant_checkpointing(model)

    def default_layer(self, model: nn.Module) -> int:
        """First attention of the up block one level below full resolution (10 in the released size)."""
        return default_layer_index(find_levels(model, temporal=True))

    def example_inputs(self, model: nn.Module, *, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """One sample of three frames with 8x8 latent cells.

        Raises:
            ValueError: for a module around SGM's U-Net, whose arguments are not known.
        """
        generator = torch.Generator().manual_seed(seed)
        parameter = next(model.parameters())
        if hasattr(model, "input_blocks"):
            features = embedding_width(model)
            context = next(m for n, m in model.named_modules() if n.endswith(".attn2.to_k")).in_features
            shapes: tuple[tuple[int, ...], ...] = ((3, int(model.in_channels), 8, 8), (3, 1, context), (3, features))  # type: ignore[arg-type]
            sample, context, numbers = (torch.randn(shape, generator=generator).to(parameter) for shape in shapes)
            level = torch.full((3,), 0.5).to(parameter)
            frames = {"num_video_frames": 3, "image_only_indicator": torch.zeros(1, 3).to(parameter)}
            return (sample, level, context, numbers), frames
        config: Any = getattr(model, "config", None)
        if not hasattr(model, "down_blocks") or config is None:
            raise ValueError(f"model: expected the U-Net itself, got {type(model).__name__} around it")
        counted = len(model.frame_features) if hasattr(model, "frame_features") else None  # type: ignore[arg-type]
        ids = (1, 3, counted) if counted else (1, embedding_width(model) // config.addition_time_embed_dim)
        shapes = ((1, 3, config.in_channels, 8, 8), (1, 1, config.cross_attention_dim), ids)
        sample, context, numbers = (torch.randn(shape, generator=generator).to(parameter) for shape in shapes)
        return (sample, torch.tensor([0.5]).to(parameter), context, numbers), {}

    def build(self, preset: str = "tiny", **options: Any) -> Any:
        """Build a pipeline with fresh weights.

        Args:
            preset: "tiny" or "small".
            **options: override a preset's values: `image_size`, `patch_size`, `block_out_channels` (multiples of 32),
                `attention_levels` (per resolution, finest first), `layers_per_block`, `heads`, `embed_dim` (Fourier
                features of one number), `camera` (False: without angles, as SV3D_u), `noise_mean`, `noise_deviation`,
                `position` ("sincos" or "none", see `cameo.adapters.common.positions`), `prediction_type`
                ("v_prediction" or "sample").
        """
        from cameo.adapters.common.noise_schedules import edm_euler
        from cameo.adapters.sv3d.denoiser import SV3DUNet
        from cameo.adapters.sv3d.pipeline import SV3DPipeline

        levels = {"noise_mean": 0.7, "noise_deviation": 1.6, "prediction_type": "v_prediction"}
        values = preset_values(self, preset, options, patch_size=4, camera=True, **levels)
        blocks = block_settings(values, "SpatioTemporal")
        if any(width % 32 for width in blocks["block_out_channels"]):
            raise ValueError(
                "block_out_channels: expected multiples of 32, the groups of its norms, got "
                f"{blocks['block_out_channels']}"
            )
        channels = 3 * values["patch_size"] ** 2
        unet = SV3DUNet(
            sample_size=values["image_size"] // values["patch_size"],
            in_channels=2 * channels,
            out_channels=channels,
            **blocks,
            num_attention_heads=values["heads"],
            cross_attention_dim=32,
            addition_time_embed_dim=values["embed_dim"],
            projection_class_embeddings_input_dim=values["embed_dim"] * (5 if values["camera"] else 1),
        )
        settings = {name: values[name] for name in ("patch_size", "position", *levels)}
        return SV3DPipeline(unet, edm_euler(), **settings)

    def load(self, name_or_path: str, *, revision: str | None = None, **options: Any) -> Any:
        """Load a saved `SV3DPipeline`, weights in diffusers' layout, or a checkpoint file of SGM.

        Args:
            name_or_path: `bundled:NAME`; Hub id or folder of an `SV3DPipeline` or of a conversion of SV3D to diffusers
                (chenguolin/sv3d-diffusers); or a local `.safetensors` file (stabilityai/sv3d).
            revision: commit, tag or branch of a Hub id; default the one in `released`.
            **options: passed to `from_pretrained`; for a checkpoint file the components `vae` and `image_encoder`.

        Raises:
            DataError: for a folder that holds something else, or nothing that can be read.
        """
        from cameo.adapters.sv3d.weights import load_pipeline

        return load_pipeline(name_or_path, revision=revision or self.revision(name_or_path), **options)

    def outline(self, name_or_path: str, *, revision: str | None = None, **options: Any) -> Any:
        """Build what `load` would return without its weights; takes the same arguments, and downloads nothing.

        Raises:
            DataError: for a Hub id whose architecture is not known here; says how to get its settings.
        """
        from cameo.adapters.common.outlines import outline_pipeline
        from cameo.adapters.sv3d.weights import OUTLINES

        return outline_pipeline(self, name_or_path, OUTLINES, revision=revision, **options)


def _attention_layers(model: nn.Module, *, temporal: bool) -> list[AttentionLayer]:
    attentions = find_attentions(model, temporal=temporal)
    if not attentions:
        return []
    layout, strides = token_layout(model, temporal=temporal), token_strides(model, temporal=temporal)
    return [
        AttentionLayer(index, path, int(attention.heads), layout, strides[path], stride_cure=STRIDE_CURE)
        for index, (path, attention) in enumerate(attentions.items())
    ]
