"""A CAT3D-style diffusion transformer for the study: diffusers' `DiTTransformer2DModel`, views joined in all blocks.

None of the library's adapters knows it; it is attached as any third-party model would be, by an adapter of its own.
Importing this module registers the backbone `cat3d_transformer`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import DiTTransformer2DModel
from einops import rearrange, repeat
from torch import Tensor, nn

from cameo import TokenLayout, register_backbone
from cameo.adapters.cat3d import noise_schedule
from cameo.adapters.cat3d_pipeline import CONDITION_CHANNELS, Cat3DPipeline
from cameo.adapters.joint_views import JointViewAttnProcessor
from cameo.adapters.presets import preset_values
from cameo.backbone import Backbone
from cameo.capture import AttentionSite

__all__ = ["Cat3DTransformer", "JointTransformer", "TransformerPipeline"]


class JointTransformer(DiTTransformer2DModel):
    """A `DiTTransformer2DModel` whose processors can be listed and set, as those of a U-Net."""

    @property
    def attn_processors(self) -> dict[str, Any]:
        """Attention processors by name."""
        blocks = enumerate(self.transformer_blocks)
        return {f"transformer_blocks.{i}.attn1.processor": block.attn1.processor for i, block in blocks}

    def set_attn_processor(self, processors: dict[str, Any]) -> None:
        """Set the processor of each attention."""
        for name, processor in processors.items():
            self.get_submodule(name.removesuffix(".processor")).set_processor(processor)


class TransformerPipeline(Cat3DPipeline):
    """`Cat3DPipeline` around a transformer: the same rays, mask, noise and sampler."""

    backbone = "cat3d_transformer"

    @property
    def size_multiple(self) -> int:
        """Pixels that the sides of an image must be a multiple of."""
        return self.latent_stride

    def _unet_arguments(
        self, noisy: Tensor, condition: Tensor, timesteps: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        views = noisy.shape[1]
        sample = rearrange(torch.cat([noisy, condition.to(noisy)], dim=2), "b v c h w -> (b v) c h w")
        steps = repeat(timesteps, "b -> (b v)", v=views)
        labels = torch.zeros_like(steps)  # diffusers' class knows no model without classes
        return (sample, steps, labels), {"cross_attention_kwargs": {"num_views": views}}


@register_backbone("cat3d_transformer")
class Cat3DTransformer(Backbone):
    """Adapter of `JointTransformer`; preset `tiny`: 6 blocks of width 128, images of 32 px in patches of 4."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"image_size": 32, "patch_size": 4, "heads": 4, "width": 128, "blocks": 6},
        "small": {"image_size": 64, "patch_size": 4, "heads": 8, "width": 384, "blocks": 12},
    }

    def recognises(self, model: nn.Module) -> bool:
        """Whether the views are joined in a `JointTransformer`."""
        return isinstance(model, JointTransformer) and all(
            isinstance(processor, JointViewAttnProcessor) for processor in model.attn_processors.values()
        )

    def sites(self, model: nn.Module) -> list[AttentionSite]:
        """List the self-attentions of all blocks."""
        assert isinstance(model, JointTransformer)
        layout, heads = TokenLayout("b (v h w)"), int(model.config["num_attention_heads"])
        strides = [processor.latent_stride for processor in model.attn_processors.values()]
        return [
            AttentionSite(index, f"transformer_blocks.{index}.attn1", heads, layout, stride)
            for index, stride in enumerate(strides)
        ]

    def default_layer(self, model: nn.Module) -> int:
        """Return the middle block."""
        return len(self.sites(model)) // 2

    def build(self, preset: str = "tiny", **options: Any) -> TransformerPipeline:
        """Build a pipeline with fresh weights."""
        values = preset_values(self, preset, options)
        channels = 3 * values["patch_size"] ** 2
        transformer = JointTransformer(
            num_attention_heads=values["heads"],
            attention_head_dim=values["width"] // values["heads"],
            in_channels=channels + CONDITION_CHANNELS,
            out_channels=channels,
            num_layers=values["blocks"],
            sample_size=values["image_size"] // values["patch_size"],
            patch_size=1,
            attention_bias=True,
            num_embeds_ada_norm=1,
        )
        nn.init.zeros_(transformer.proj_out_2.weight)
        nn.init.zeros_(transformer.proj_out_2.bias)
        return TransformerPipeline(transformer, noise_schedule(), patch_size=values["patch_size"])
