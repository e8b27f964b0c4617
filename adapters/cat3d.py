"""Adapter for CAT3D-style models: a U-Net or a diffusion transformer whose self-attentions join all views."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from cameo.adapters.joint_dit import JointDiT, dit_attentions
from cameo.adapters.presets import preset_values, unet_2d
from cameo.adapters.released import licence_of, revision_of
from cameo.adapters.unet_layers import default_layer_index, level_of, self_attentions
from cameo.backbone import Backbone
from cameo.capture import AttentionSite
from cameo.errors import DataError, unknown_name
from cameo.layout import TokenLayout

__all__ = ["BUNDLED", "Cat3D"]

BUNDLED = "bundled:cat3d-transformer-tiny"
_WEIGHTS = Path(__file__).parent / "weights"


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
        },
        "small": {
            "image_size": 128,
            "block_out_channels": (128, 256, 384),
            "attention_levels": (False, True, True),
            "heads": 8,
            "layers_per_block": 2,
        },
        "transformer-tiny": {"image_size": 32, "heads": 4, "width": 128, "blocks": 6},
        "transformer-small": {"image_size": 64, "heads": 8, "width": 384, "blocks": 12},
    }

    def recognises(self, model: nn.Module) -> bool:
        """Whether the self-attentions of a U-Net with SD's block names, or of a `JointDiT`, join the views."""
        found = _attentions(model)
        return bool(found) and all(
            getattr(getattr(attention, "processor", None), "join", False) for attention in found.values()
        )

    def explain_mismatch(self, model: nn.Module) -> str:
        """Name the missing blocks or the missing inflation."""
        if _attentions(model):
            return (
                f"the self-attentions of this {type(model).__name__} see one view at a time. "
                "Call cameo.adapters.cat3d_pipeline.inflate(unet, latent_stride=8) first, where latent_stride is the "
                'number of image pixels per latent cell, and pass cross_attention_kwargs={"num_views": V} to each '
                "forward; or build a Cat3DPipeline around it, which does both"
            )
        return (
            f"{type(model).__name__} has no modules named like "
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1. Pass the U-Net itself (pipeline.unet), "
            "a UNet2DConditionModel with cross-attention blocks or a cameo.adapters.joint_dit.JointDiT"
        )

    def sites(self, model: nn.Module) -> list[AttentionSite]:
        """All self-attentions in execution order: of a U-Net down, mid, up."""
        layout = TokenLayout("b (v h w)")
        found = []
        for index, (path, attention) in enumerate(_attentions(model).items()):
            latent_stride = getattr(attention.processor, "latent_stride", None)
            cells = model.config.patch_size if isinstance(model, JointDiT) else 2 ** level_of(model, path)
            stride = latent_stride * cells if latent_stride else None
            heads = int(attention.heads)  # type: ignore[arg-type]
            found.append(AttentionSite(index, path, heads, layout, stride))
        return found

    def default_layer(self, model: nn.Module) -> int:
        """First attention of the up block one level below full resolution (SD 2.1: 10, the paper's best layer).

        Of a transformer the middle block, of two the first: there `transformer-tiny` finds most matches by itself.
        """
        if isinstance(model, JointDiT):
            return (len(model.transformer_blocks) - 1) // 2
        return default_layer_index(model, self_attentions(model))

    def example_inputs(self, model: nn.Module, *, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """One sample of two views with 8x8 latent cells."""
        generator = torch.Generator().manual_seed(seed)
        reference, config = next(model.parameters()), model.config
        shape = (2, int(config.in_channels), 8, 8)  # type: ignore[union-attr,arg-type]
        sample = torch.randn(shape, generator=generator).to(reference)
        timesteps = torch.tensor([500, 500], device=reference.device)
        options = {"cross_attention_kwargs": {"num_views": 2}}
        if isinstance(model, JointDiT):
            return (sample, timesteps), options
        context = torch.zeros(2, 1, int(config.cross_attention_dim)).to(reference)  # type: ignore[union-attr,arg-type]
        return (sample, timesteps, context), options

    def build(self, preset: str = "tiny", **options: Any) -> Any:
        """Build a pipeline with fresh weights.

        Args:
            preset: one of `presets`.
            **options: override a preset's values: `image_size`, `patch_size`, `heads`, `prediction_type`,
                `zero_terminal_snr`; of a U-Net also `block_out_channels`, `attention_levels` (per resolution, finest
                first), `layers_per_block`, `norm_num_groups`; of a transformer `width` and `blocks`.
        """
        from cameo.adapters.cat3d_pipeline import CONDITION_CHANNELS, Cat3DPipeline

        is_transformer = "blocks" in self.presets.get(preset, ())
        defaults = {} if is_transformer else {"layers_per_block": 1, "norm_num_groups": 32}
        schedule = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
        values = preset_values(self, preset, options, patch_size=4, **defaults, **schedule)
        channels = 3 * values["patch_size"] ** 2 + CONDITION_CHANNELS
        unet = joint_dit(values, channels) if is_transformer else unet_2d(values, in_channels=channels)
        scheduler = noise_schedule(values["prediction_type"], zero_terminal_snr=values["zero_terminal_snr"])
        return Cat3DPipeline(unet, scheduler, patch_size=values["patch_size"])

    def load(self, name_or_path: str, *, revision: str | None = None, **options: Any) -> Any:
        """Load a saved `Cat3DPipeline`, the bundled base, or start from Stable Diffusion.

        Args:
            name_or_path: Hub id or folder in diffusers layout, or `bundled:cat3d-transformer-tiny`.
            revision: commit, tag or branch of a Hub id; default the one in `cameo.adapters.released`.
            **options: passed to `from_pretrained`; for Stable Diffusion also `prediction_type`,
                `zero_terminal_snr`.
        """
        from diffusers import DiffusionPipeline

        from cameo.adapters.cat3d_pipeline import Cat3DPipeline

        if name_or_path.startswith("bundled:"):
            folder = _WEIGHTS / name_or_path.removeprefix("bundled:")
            if not folder.is_dir():
                known = [f"bundled:{path.name}" for path in _WEIGHTS.glob("*") if path.is_dir()]
                raise unknown_name("bundled weights", name_or_path, known)
            return Cat3DPipeline.from_pretrained(str(folder), **options)
        revision = revision or revision_of(name_or_path)
        kind = DiffusionPipeline.load_config(name_or_path, revision=revision).get("_class_name")
        if kind == "Cat3DPipeline":
            return Cat3DPipeline.from_pretrained(name_or_path, revision=revision, **options)
        if kind == "StableDiffusionPipeline":
            return from_stable_diffusion(name_or_path, revision=revision, **options)
        raise DataError(
            f"{name_or_path}: holds a {kind}; cat3d starts from a Cat3DPipeline or a StableDiffusionPipeline"
        )

    def licence(self, name_or_path: str | None) -> str | Mapping[str, str] | None:
        """Licence of the bundled base and of the releases listed in `cameo.adapters.released`."""
        return "apache-2.0" if name_or_path == BUNDLED else licence_of(name_or_path)

    def revision(self, name_or_path: str | None) -> str | None:
        """Revision of the releases listed in `cameo.adapters.released`."""
        return revision_of(name_or_path)


def _attentions(model: nn.Module) -> dict[str, nn.Module]:
    """List the self-attentions of either kind of denoiser by path, in execution order."""
    return dit_attentions(model) or self_attentions(model)


def joint_dit(values: Mapping[str, Any], in_channels: int) -> JointDiT:
    """Build the transformer of a preset in pixel space; its first prediction is zero, as in DiT.

    Raises:
        ValueError: if the width does not divide into the heads, the image into patches, or there is no block.
    """
    if values["blocks"] < 1:
        raise ValueError(f"blocks: expected at least 1, got {values['blocks']}")
    if values["image_size"] % values["patch_size"]:
        raise ValueError(
            f"image_size: expected a multiple of patch_size={values['patch_size']}, got {values['image_size']}"
        )
    if values["width"] % values["heads"]:
        raise ValueError(f"heads: expected a divisor of the width {values['width']}, got {values['heads']}")
    model = JointDiT(
        num_attention_heads=values["heads"],
        attention_head_dim=values["width"] // values["heads"],
        in_channels=in_channels,
        out_channels=3 * values["patch_size"] ** 2,
        num_layers=values["blocks"],
        sample_size=values["image_size"] // values["patch_size"],
        patch_size=1,  # the pixels of a patch are folded into the channels already
        num_embeds_ada_norm=1,
    )
    nn.init.zeros_(model.proj_out_2.weight)
    nn.init.zeros_(model.proj_out_2.bias)
    return model


def noise_schedule(prediction_type: str = "v_prediction", *, zero_terminal_snr: bool = True) -> Any:
    """Stable Diffusion's noise schedule as a `DDIMScheduler`, by default with zero terminal SNR (arXiv 2305.08891)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,  # the last step returns the predicted clean latents, without a rest of noise
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing="trailing",
    )


def from_stable_diffusion(
    name_or_path: str,
    *,
    revision: str | None = None,
    prediction_type: str = "v_prediction",
    zero_terminal_snr: bool = True,
    **options: Any,
) -> Any:
    """Start a `Cat3DPipeline` from Stable Diffusion's U-Net and VAE.

    The first convolution gets 7 more input channels with zero weights, so at the start the model ignores the
    cameras and each view is denoised as Stable Diffusion would with an empty cross-attention.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from cameo.adapters.cat3d_pipeline import CONDITION_CHANNELS, Cat3DPipeline

    unet = UNet2DConditionModel.from_pretrained(name_or_path, subfolder="unet", revision=revision, **options)
    vae = AutoencoderKL.from_pretrained(name_or_path, subfolder="vae", revision=revision, **options)
    old = unet.conv_in
    wide = nn.Conv2d(
        old.in_channels + CONDITION_CHANNELS, old.out_channels, old.kernel_size, old.stride, old.padding
    ).to(old.weight)
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, : old.in_channels] = old.weight
        wide.bias.copy_(old.bias)  # type: ignore[union-attr]
    unet.conv_in = wide
    unet.register_to_config(in_channels=wide.in_channels)
    schedule = noise_schedule(prediction_type, zero_terminal_snr=zero_terminal_snr)
    return Cat3DPipeline(unet, schedule, vae=vae)
