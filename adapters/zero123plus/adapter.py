"""Adapter for Zero123++: six tiled views whose self-attentions also read a reference image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from cameo.adapters.common.positions import get_position
from cameo.adapters.common.presets import preset_values, unet_2d
from cameo.adapters.common.unet_layers import checkpoints_reentrantly, default_layer_index
from cameo.adapters.zero123plus.layers import (
    LAYOUT,
    find_attentions,
    find_levels,
    is_published,
    latent_stride,
    reads_references,
    reference_size,
    unet_name,
)
from cameo.attention.capture import AttentionLayer
from cameo.backbone import Backbone, Release

__all__ = ["Zero123Plus"]


class Zero123Plus(Backbone):
    """One canvas of three rows and two columns of views; the reference view's tokens are keys only.

    In correspondences and batches the reference is view 0 and the views of the canvas are 1 to 6, row by row. Matches
    from these six, also to the reference, are supervised; those of the reference are not. Each layer runs twice in a
    forward, over the reference and over the canvas; the second run counts.

    Recognized are `ReferenceUNet`, the published `RefOnlyNoisedUNet`, and a U-Net after
    `set_reference_processors`. Presets: `tiny` (pixel space, 32 px views, CPU), `small` (pixel space, 128 px views,
    one GPU).
    """

    name = "zero123plus"
    pipeline_tag = "image-to-3d"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "image_size": 32,
            "reference_size": 48,
            "block_out_channels": (32, 64),
            "attention_levels": (False, True),
            "heads": 4,
            "norm_num_groups": 16,
            "position": "sincos",
        },
        "small": {
            "image_size": 128,
            "reference_size": 192,
            "block_out_channels": (128, 256, 384),
            "attention_levels": (False, True, True),
            "heads": 8,
            "layers_per_block": 2,
            "position": "sincos",
        },
    }
    preset_license = "apache-2.0"
    released: ClassVar[Mapping[str, Release]] = {
        "bundled:zero123plus-tiny": Release("apache-2.0", holds="`tiny`, small, that knows views a few degrees apart"),
        "sudo-ai/zero123plus-v1.1": Release("openrail", holds="Zero123++ v1.1"),
        "sudo-ai/zero123plus-v1.2": Release(
            "cc-by-nc-4.0", revision="2da07e89919e1a130c9b5add1584c70c7aa065fd", holds="Zero123++ v1.2"
        ),
    }

    def recognizes(self, model: nn.Module) -> bool:
        """Whether all self-attentions of a U-Net with SD's block names read references."""
        found = find_attentions(model).values()
        return bool(found) and all(map(reads_references, found))

    def explain_mismatch(self, model: nn.Module) -> str:
        """Name the missing blocks or the missing processors."""
        if find_attentions(model):
            return (
                f"the self-attentions of this {type(model).__name__} read no reference image. Build a "
                "Zero123PlusPipeline around the U-Net, call pipeline.prepare() on the published pipeline, or "
                "cameo.adapters.zero123plus.set_reference_processors(unet), after which no switch of processors "
                "takes the reference away"
            )
        return (
            f"{type(model).__name__} has no modules named like "
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1. Pass the U-Net (pipeline.unet), or the published "
            "RefOnlyNoisedUNet around it"
        )

    def attention_layers(self, model: nn.Module) -> list[AttentionLayer]:
        """All self-attentions in execution order: down, mid, up; 16 in the releases."""
        levels = find_levels(model)
        found = []
        for index, (path, attention) in enumerate(find_attentions(model).items()):
            stride = latent_stride(attention) * 2 ** levels[path]
            size = reference_size(attention)
            found.append(AttentionLayer(index, path, int(attention.heads), LAYOUT, stride, reference_size=size))
        return found

    def default_layer(self, model: nn.Module) -> int:
        """First attention of the up block one level below full resolution: 10 of 16 in the releases."""
        return default_layer_index(find_levels(model))

    def position(self, model: nn.Module) -> str:
        """Name the map behind the first convolution of the U-Net, see `cameo.adapters.common.positions`."""
        return get_position(model.get_submodule(unet_name(model)))

    def set_position(self, model: nn.Module, position: str) -> None:
        """Add the map "sincos", or take it off with "none"."""
        from cameo.adapters.zero123plus.denoiser import set_tile_position

        set_tile_position(model, position)

    def unsupported(self, model: nn.Module) -> str | None:
        """Name attentions that lost the reference, or gradient checkpointing that is published or reentrant."""
        if not self.recognizes(model):
            return self.explain_mismatch(model)
        if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            return None
        if any(is_published(getattr(attention, "processor", None)) for attention in find_attentions(model).values()):
            return (
                "gradient checkpointing: the published attention processors remove a reference when they read it, so "
                "the recomputation in the backward would end in a KeyError. Call "
                "cameo.adapters.zero123plus.keep_references(model), or disable gradient checkpointing"
            )
        if checkpoints_reentrantly(model):
            return (
                "gradient checkpointing: its function is reentrant, which runs both passes without a graph, so the "
                "alignment loss and the pass over the reference would train nothing. Call "
                "unet.enable_gradient_checkpointing() without a function, or give one with use_reentrant=False"
            )
        return None

    def example_inputs(self, model: nn.Module, *, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """One sample of 8x8 latent cells per view, with its reference at the size that the layers expect."""
        from cameo.adapters.zero123plus.denoiser import ReferenceUNet

        unet = model.get_submodule(unet_name(model))
        config, parameter = unet.config, next(unet.parameters())
        generator = torch.Generator().manual_seed(seed)
        attention = next(iter(find_attentions(model).values()))
        height, width = (side // latent_stride(attention) for side in reference_size(attention))
        channels = int(config.in_channels)  # type: ignore[union-attr,arg-type]

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(parameter)

        canvas, reference = draw(1, channels, 24, 16), draw(1, channels, height, width)
        noise = draw(*reference.shape)
        context = draw(1, 1, int(config.cross_attention_dim))  # type: ignore[union-attr,arg-type]
        args = (canvas, torch.tensor([500], device=parameter.device), context)
        if unet is not model or isinstance(model, ReferenceUNet):
            return args, {"cross_attention_kwargs": {"cond_lat": reference, "cond_noise": noise}}
        stored: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            model(reference, *args[1:], cross_attention_kwargs={"mode": "w", "ref_dict": stored})
        return args, {"cross_attention_kwargs": {"mode": "r", "ref_dict": stored}}

    def build(self, preset: str = "tiny", **options: Any) -> Any:
        """Build a pipeline with fresh weights, in pixel space and without encoders.

        Args:
            preset: "tiny" or "small".
            **options: override a preset's values: `image_size` and `reference_size` (pixels), `patch_size`,
                `block_out_channels`, `attention_levels` (per resolution, finest first), `layers_per_block`, `heads`,
                `norm_num_groups`, `position` ("sincos" or "none", see
                `cameo.adapters.zero123plus.denoiser.TilePositionMap`), `prediction_type` ("v_prediction" as released,
                "epsilon" or "sample", which are sampled by Euler steps that are not ancestral).
        """
        from cameo.adapters.common.noise_schedules import linear_euler, linear_euler_ancestral
        from cameo.adapters.zero123plus.pipeline import Zero123PlusPipeline

        kind = {"prediction_type": "v_prediction"}
        values = preset_values(self, preset, options, patch_size=4, layers_per_block=1, norm_num_groups=32, **kind)
        cell = values["image_size"] // values["patch_size"]
        unet = unet_2d(values, sample_size=(3 * cell, 2 * cell))
        settings = {name: values[name] for name in ("reference_size", "patch_size", "position")}
        kind = values["prediction_type"]
        scheduler = linear_euler_ancestral() if kind == "v_prediction" else linear_euler(kind)
        return Zero123PlusPipeline(unet, scheduler, **settings)

    def load(self, name_or_path: str, *, revision: str | None = None, **options: Any) -> Any:
        """Load a saved `Zero123PlusPipeline` or a release; code in the repository is not run.

        Args:
            name_or_path: Hub id or folder in diffusers layout, or `bundled:NAME`.
            revision: commit, tag or branch of a Hub id; default the one in `released`.
            **options: passed to `from_pretrained`, such as `torch_dtype` or another `unet`.

        Raises:
            DataError: for a folder or repository that holds something else.
        """
        from cameo.adapters.zero123plus.weights import load_pipeline

        return load_pipeline(name_or_path, revision=revision or self.revision(name_or_path), **options)

    def outline(self, name_or_path: str, *, revision: str | None = None, **options: Any) -> Any:
        """Build what `load` would return without its weights; takes the same arguments, and downloads nothing.

        Raises:
            DataError: for a Hub id whose architecture is not known here; says how to get its settings.
        """
        from cameo.adapters.common.outlines import outline_pipeline
        from cameo.adapters.zero123plus.weights import OUTLINES

        return outline_pipeline(self, name_or_path, OUTLINES, revision=revision, **options)
