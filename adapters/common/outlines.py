"""Pipelines without weights: built from configs alone, with every parameter on the meta device, which holds no memory.

The architectures of the releases, whose configs may be out of reach, stand here as facts: Stable Diffusion 2.1, from
which all of them descend, and OpenCLIP's ViT-H/14, which reads their reference images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from torch import Tensor, nn

from cameo.adapters.common.places import PLACE_OPTIONS, unbundled
from cameo.errors import DataError, unknown_name
from cameo.memory import in_precision

if TYPE_CHECKING:
    from cameo.backbone import Backbone

__all__ = [
    "UNET",
    "TokenizerOutline",
    "outline_pipeline",
    "text_encoder",
    "unet",
    "vae",
    "vision_encoder",
    "without_weights",
]

# The U-Net of Stable Diffusion 2.1; 865,910,724 parameters.
UNET: Mapping[str, Any] = {
    "sample_size": 96,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),  # diffusers' historical name for the number of heads
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
# Its autoencoder; 83,653,863 parameters.
VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
}
# Its text encoder, the last layer of OpenCLIP's left out; 340,387,840 parameters.
TEXT: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
# OpenCLIP's ViT-H/14 for images; with its projection 632,076,800 parameters.
VISION: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}


class TokenizerOutline:
    """A tokenizer of which only the length of its texts is known: every text becomes as many zeros.

    Example:
        >>> TokenizerOutline(77)(["a chair", ""]).input_ids.shape
        torch.Size([2, 77])
    """

    def __init__(self, model_max_length: int = 77) -> None:
        self.model_max_length = model_max_length

    def __call__(self, texts: str | Sequence[str], **options: Any) -> SimpleNamespace:
        """Return `input_ids` `[texts, model_max_length]`, all zero."""
        count = 1 if isinstance(texts, str) else len(texts)
        return SimpleNamespace(input_ids=torch.zeros(count, self.model_max_length, dtype=torch.int64))


def unet(kind: type[UNet2DConditionModel] = UNet2DConditionModel, **settings: Any) -> UNet2DConditionModel:
    """Build the U-Net of Stable Diffusion 2.1, with changes.

    Example:
        >>> with without_weights():
        ...     sum(parameter.numel() for parameter in unet().parameters())
        865910724
    """
    return kind(**{**UNET, **settings})


def vae() -> AutoencoderKL:
    """Build the autoencoder of Stable Diffusion 2.1."""
    return AutoencoderKL(**VAE)


def text_encoder() -> Any:
    """Build the text encoder of Stable Diffusion 2.1."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**TEXT))


def vision_encoder(*, projection: bool = True) -> Any:
    """Build the image encoder of the releases, with the projection of its global embedding or without."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    kind = CLIPVisionModelWithProjection if projection else CLIPVisionModel
    return kind(CLIPVisionConfig(**VISION))


@contextmanager
def without_weights() -> Iterator[None]:
    """Let modules be built without memory, and `from_pretrained` of diffusers and transformers read configs alone.

    Example:
        >>> with without_weights():
        ...     layer = torch.nn.Linear(4, 4)
        >>> layer.weight.device.type
        'meta'

    A file of weights that a loader opens by itself is read for the shapes of its tensors.
    """
    import safetensors.torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    load = torch.load

    def load_shapes(*args: Any, **options: Any) -> Any:
        return load(*args, **{**options, "map_location": "meta"})

    with ExitStack() as stack:
        stack.enter_context(init_empty_weights())
        stack.enter_context(patch.object(ModelMixin, "from_pretrained", classmethod(_from_config)))
        stack.enter_context(patch.object(PreTrainedModel, "from_pretrained", classmethod(_from_transformers_config)))
        stack.enter_context(patch.object(PreTrainedTokenizerBase, "from_pretrained", _tokenizer))
        stack.enter_context(patch.object(safetensors.torch, "load_file", _shapes_of))
        stack.enter_context(patch.object(torch, "load", load_shapes))
        yield


def outline_pipeline(
    adapter: Backbone, name_or_path: str, known: Mapping[str, Callable[..., Any]], **options: Any
) -> Any:
    """Build the pipeline that `adapter.load` would return, without its weights.

    Args:
        adapter: whose `load` reads the configs of a local folder, of a local file, or of `bundled:NAME`.
        name_or_path: as for `load`.
        known: builds the pipeline of a Hub id from what is known of its architecture, by id.
        **options: as for `load`.

    Raises:
        DataError: for a Hub id whose architecture is not known here, since nothing is downloaded.
    """
    with without_weights():
        if Path(unbundled(name_or_path)).exists():
            return adapter.load(name_or_path, **options)
        if name_or_path in known:
            return _known_pipeline(known[name_or_path], name_or_path, options)
    raise DataError(
        f"{name_or_path}: neither a folder nor a Hub id whose architecture is known here ({', '.join(known)}), and "
        f"nothing is downloaded for an outline. Download its settings without the weights, `hf download {name_or_path} "
        "--include '*.json'`, and give the folder that the command prints"
    )


def _known_pipeline(build: Callable[..., Any], name: str, options: Mapping[str, Any]) -> Any:
    given = {key: value for key, value in options.items() if key not in (*PLACE_OPTIONS, "revision", "torch_dtype")}
    accepted = list(inspect.signature(build).parameters)
    for key in given:
        if key not in accepted:
            raise unknown_name(f"option of an outline of {name}", key, accepted)
    pipeline = build(**given)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            _in_precision(component, options)
    return pipeline


def _in_precision(module: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """In the asked precision, else in float32, in which it was built."""
    wanted = options.get("torch_dtype") or options.get("dtype")
    return in_precision(module, wanted) if isinstance(wanted, torch.dtype) and wanted != torch.float32 else module


def _from_config(cls: Any, name: Any, **options: Any) -> Any:
    place = {key: options[key] for key in ("subfolder", "revision", *PLACE_OPTIONS) if key in options}
    return _in_precision(cls.from_config(cls.load_config(name, **place)), options).eval()


def _from_transformers_config(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
    place = {key: options[key] for key in ("subfolder", "revision", *PLACE_OPTIONS) if options.get(key) is not None}
    return _in_precision(cls(cls.config_class.from_pretrained(name, **place)), options).eval()


def _tokenizer(*args: Any, **options: Any) -> TokenizerOutline:
    return TokenizerOutline()


def _shapes_of(path: str | Path, *args: Any, **options: Any) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file on the meta device, from its header."""
    from safetensors import safe_open

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with safe_open(str(path), framework="pt") as file:
        found = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            part = file.get_slice(name)
            dtype = dtypes.get(part.get_dtype(), torch.float32)
            found[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        return found
