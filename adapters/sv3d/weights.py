"""Load SV3D: our own pipelines, conversions of the release to diffusers' folder layout, and SGM's checkpoint files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from cameo.adapters.common import outlines
from cameo.adapters.common.noise_schedules import edm_euler
from cameo.adapters.common.places import place_of, read_index, unbundled
from cameo.adapters.sv3d.convert import from_sgm, read_sgm_checkpoint, settings_from_sgm
from cameo.adapters.sv3d.denoiser import SV3DUNet
from cameo.adapters.sv3d.pipeline import SV3DPipeline
from cameo.errors import DataError
from cameo.memory import in_precision

__all__ = ["OUTLINES", "from_checkpoint", "from_diffusers", "load_pipeline"]


def load_pipeline(name_or_path: str, *, revision: str | None = None, **options: Any) -> SV3DPipeline:
    """Load a pipeline; see `SV3D.load` for the arguments.

    Example:
        >>> load_pipeline("chenguolin/sv3d-diffusers", torch_dtype=torch.float16)  # doctest: +SKIP
    """
    name_or_path = unbundled(name_or_path)
    if Path(name_or_path).suffix == ".safetensors":
        components = {name: value for name, value in options.items() if name not in place_of(options)}
        return from_checkpoint(name_or_path, **components)
    try:
        index = read_index(name_or_path, revision, options)
    except OSError as error:
        raise DataError(
            f"{name_or_path}: {error} A checkpoint of SGM is passed as a local file (sv3d_p.safetensors, "
            "downloaded from stabilityai/sv3d), with vae="
        ) from error
    if index.get("_class_name") == "SV3DPipeline":
        return SV3DPipeline.from_pretrained(name_or_path, revision=revision, **options)
    if "SpatioTemporal" in json.dumps(index.get("unet")):
        return from_diffusers(name_or_path, index, revision=revision, **options)
    raise DataError(
        f"{name_or_path}: holds a {index.get('_class_name')} with the U-Net {index.get('unet')}; sv3d starts from "
        "an SV3DPipeline, or a pipeline with an SV3DUNetSpatioTemporalConditionModel"
    )


def from_diffusers(
    name_or_path: str, index: Mapping[str, Any], *, revision: str | None = None, **options: Any
) -> SV3DPipeline:
    """Load U-Net, VAE and image encoder of a conversion to diffusers, without its code; the scheduler is our own.

    Args:
        name_or_path: Hub id or folder.
        index: contents of its `model_index.json`.
        revision: of a Hub id.
        **options: passed to every `from_pretrained`, such as `torch_dtype`.
    """
    from transformers import CLIPVisionModelWithProjection

    place = {"revision": revision, **options}
    kind = (index.get("vae") or (None, ""))[1]
    if kind not in ("AutoencoderKL", "AutoencoderKLTemporalDecoder"):
        raise DataError(f"{name_or_path}: its vae is a {kind}; expected AutoencoderKL or AutoencoderKLTemporalDecoder")
    encoder = None
    if (index.get("image_encoder") or (None, None))[1]:
        encoder = CLIPVisionModelWithProjection.from_pretrained(name_or_path, subfolder="image_encoder", **place)
    return SV3DPipeline(
        SV3DUNet.from_pretrained(name_or_path, subfolder="unet", **place),
        edm_euler(),
        vae=getattr(diffusers, kind).from_pretrained(name_or_path, subfolder="vae", **place),
        image_encoder=encoder,
    )


def from_checkpoint(
    path: str,
    *,
    vae: Any = None,
    image_encoder: Any = None,
    head_channels: int = 64,
    addition_time_embed_dim: int = 256,
    torch_dtype: torch.dtype | None = None,
) -> SV3DPipeline:
    """Load the U-Net of a checkpoint file of SGM's engine; `vae` and `image_encoder` are passed in diffusers' form.

    Args:
        path: `.safetensors` file.
        vae: `AutoencoderKL` or `AutoencoderKLTemporalDecoder`, such as that of Stable Video Diffusion.
        image_encoder: `CLIPVisionModelWithProjection`; None leaves the image embedding out.
        head_channels, addition_time_embed_dim: see `settings_from_sgm`.
        torch_dtype: of the U-Net; default as stored.
    """
    if vae is None:
        raise ValueError(
            f"vae: {path} is read for its U-Net only; pass the VAE, for example AutoencoderKLTemporalDecoder."
            "from_pretrained('stabilityai/stable-video-diffusion-img2vid', subfolder='vae')"
        )
    weights = read_sgm_checkpoint(path)
    settings = settings_from_sgm(weights, head_channels=head_channels, addition_time_embed_dim=addition_time_embed_dim)
    with torch.device("meta"):
        unet = SV3DUNet(**settings)
    unet.load_state_dict(from_sgm(weights, settings), assign=True)
    if torch_dtype is not None:
        in_precision(unet, torch_dtype)
    return SV3DPipeline(unet.eval(), edm_euler(), vae=vae, image_encoder=image_encoder)


def _outline() -> SV3DPipeline:
    """SV3D_p; of its VAE, whose decoder is another, the training runs the encoder alone."""
    return SV3DPipeline(SV3DUNet(), edm_euler(), vae=outlines.vae(), image_encoder=outlines.vision_encoder())


# Builds a release without its weights, see `Backbone.outline`.
OUTLINES = {"chenguolin/sv3d-diffusers": _outline}
