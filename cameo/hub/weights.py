"""The file formats of a trained denoiser: which one a model takes, and how it is written.

| model | files |
| --- | --- |
| diffusers model with a LoRA (`add_adapter`) | `pytorch_lora_weights.safetensors`, as diffusers writes it |
| `peft.PeftModel`, or other PEFT layers | `adapter_config.json`, `adapter_model.safetensors` |
| full model with its pipeline | diffusers pipeline folder, `model_index.json` |
| full diffusers model | `config.json`, `diffusion_pytorch_model.safetensors` |
| any other module | `model.safetensors` |
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from cameo.backbone import unwrap_peft
from cameo.config import CONFIG_NAME, CameoConfig
from cameo.errors import DataError
from cameo.files import parse_object
from cameo.hub.license import hub_id
from cameo.untrusted.adapters import check_adapter_settings
from cameo.untrusted.asked import check_asked, check_pipeline
from cameo.untrusted.reading import check_weights, read_object

__all__ = [
    "ADAPTER_FORMATS",
    "DATA_FILES",
    "HEAD_FILE",
    "check_readable",
    "format_in",
    "format_to_write",
    "is_saved_file",
    "stale_files",
    "write_weights",
]

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
MODULE_FILE = "model.safetensors"
HEAD_FILE = "alignment_head.safetensors"

# The files of each format; `*` matches no `/`. A file of the first pattern shows that the format is there.
FILES = {
    "diffusers_lora": (LORA_FILE,),
    "peft": (PEFT_FILE, PEFT_CONFIG),
    "pipeline": (
        "model_index.json",
        "*/config.json",
        "*/*_config.json",
        "*/*.safetensors",
        "*/*.safetensors.index.json",
    ),
    "diffusers": (
        "diffusion_pytorch_model*.safetensors",
        "config.json",
        "diffusion_pytorch_model*.safetensors.index.json",
    ),
    "module": (MODULE_FILE,),
}
ADAPTER_FORMATS = ("diffusers_lora", "peft")
DATA_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # never pickles or code


def format_to_write(model: nn.Module, pipeline: Any = None) -> str:
    """Name the format a model is written in, by its structure.

    Example:
        >>> format_to_write(nn.Linear(2, 2))
        'module'
    """
    from diffusers import ModelMixin
    from diffusers.loaders import PeftAdapterMixin
    from peft import PeftModel, PeftType

    core = unwrap_peft(model)
    if isinstance(model, PeftModel):
        return "peft"
    if adapter_layers(core):
        through_diffusers = isinstance(core, ModelMixin) and isinstance(core, PeftAdapterMixin)
        is_lora = adapter_settings(core).peft_type == PeftType.LORA
        return "diffusers_lora" if through_diffusers and is_lora else "peft"
    if pipeline is not None:
        return "pipeline"
    return "diffusers" if isinstance(core, ModelMixin) else "module"


def format_in(folder: Path) -> str:
    """Name the format of the weights in a saved folder.

    Raises:
        DataError: if there are none, or of two formats.
    """
    formats = formats_among(path.name for path in folder.iterdir())
    if len(formats) == 1:
        return formats[0]
    if formats:
        files = ", ".join(FILES[name][0] for name in formats)
        raise DataError(f"{folder}: holds weights of several formats ({files}); save again into an empty folder")
    expected = ", ".join(patterns[0] for patterns in FILES.values())
    raise DataError(f"{folder}: no weights; expected one of {expected}")


def check_readable(folder: Path, weight_format: str) -> None:
    """Open each file of a format, and the head, as far as is needed to see that it is complete and asks for no more.

    A changed value within a file is not detected: the formats hold no checksums. What a model's configuration may ask
    for is in `cameo.untrusted.asked.LIMITS`; an adapter's ranks are bounded by its weights.

    Raises:
        DataError: names the first file that is damaged, or that asks for too much.
    """
    if weight_format == "pipeline":
        check_pipeline(folder)
    for pattern in (*FILES[weight_format], HEAD_FILE):
        for path in sorted(folder.glob(pattern)):
            if path.suffix != ".json":
                check_weights(path)
            elif path.name == "config.json":
                check_asked(path, read_object(path))
            else:
                read_object(path)
    if weight_format == "peft" and (folder / PEFT_CONFIG).exists():
        settings = read_object(folder / PEFT_CONFIG)
        check_adapter_settings(str(folder / PEFT_CONFIG), settings, check_weights(folder / PEFT_FILE))
    if weight_format == "diffusers_lora":
        _check_lora_settings(folder / LORA_FILE)


def _check_lora_settings(path: Path) -> None:
    """Check the settings of a diffusers LoRA, which stand in the header of its weights."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from safetensors import safe_open

    shapes = check_weights(path)
    with safe_open(str(path), "pt") as file:
        text = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    if text is None:
        return
    try:
        settings = parse_object(text.encode())
    except ValueError as error:
        raise DataError(f"{path}: the settings of the LoRA in its header: {error}. Save it again") from error
    prefix = next(iter(shapes), "").split(".")[0]
    own = {key.removeprefix(f"{prefix}."): value for key, value in settings.items() if key.startswith(f"{prefix}.")}
    if settings and not own:
        raise DataError(
            f"{path}: the settings of the LoRA in its header are of {next(iter(settings))!r}, and its "
            f"weights of {prefix!r}. Save it again"
        )
    check_adapter_settings(str(path), own, shapes)


def is_saved_file(name: str, weight_format: str, folder: Path) -> bool:
    """Tell whether a file of a saved folder belongs to the model: its weights, settings and pictures.

    A pipeline has more: what the folders of its components hold, such as the vocabulary of a tokenizer; never a pickle
    or code.

    Example:
        >>> is_saved_file("optimizer.bin", "diffusers_lora", Path("checkpoint-100"))
        False
    """
    patterns = [CONFIG_NAME, HEAD_FILE, "pictures/*", *FILES[weight_format]]
    if weight_format == "pipeline":
        components = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        patterns += [f"{component}/{kind}" for component in components for kind in DATA_FILES]
    return any(_matches(name, pattern) for pattern in patterns)


def formats_among(names: Iterable[str]) -> list[str]:
    """List the formats whose weights are among file names."""
    names = list(names)
    return [
        weight_format for weight_format, patterns in FILES.items() if any(_matches(name, patterns[0]) for name in names)
    ]


def stale_files(existing: Iterable[str], new: Iterable[str], *, place: str) -> list[str]:
    """List the files of an earlier save that a new save does not replace and that would mislead a reader.

    Example:
        >>> old = ["cameo_config.json", "model.safetensors", "notes.txt"]
        >>> stale_files(old, ["adapter_model.safetensors"], place="runs")
        ['model.safetensors']

    Raises:
        ValueError: if `place` holds weights of another format that were not saved by cameo: cameo does not
            remove them, and a folder with two formats is ambiguous.
    """
    existing, new = set(existing), set(new)
    found, written = formats_among(existing), formats_among(new)
    if CONFIG_NAME not in existing:
        if foreign := [weight_format for weight_format in found if weight_format not in written]:
            raise ValueError(
                f"{place}: holds {FILES[foreign[0]][0]}, not written by cameo, and this model is saved as "
                f"{FILES[written[0]][0]}; a reader could not tell which to load. Choose another place"
            )
        return []
    patterns = [HEAD_FILE, *(pattern for weight_format in found for pattern in FILES[weight_format])]
    return sorted(name for name in existing - new if any(_matches(name, pattern) for pattern in patterns))


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def adapter_layers(model: nn.Module) -> list[Any]:
    """List the PEFT layers of a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapter_name(model: nn.Module) -> str:
    """Name the one adapter of a model, or the one that is active.

    Raises:
        ValueError: if none or several are active, or the adapter is merged into the base weights.
    """
    layers = adapter_layers(model)
    if any(layer.merged for layer in layers):
        raise ValueError(
            "the adapter is merged into the base weights, so it would count twice on load. "
            "Call unfuse_lora() (diffusers) or unmerge_adapter() (PEFT) before saving"
        )
    known = list(model.peft_config)  # type: ignore[arg-type]
    if len(known) == 1:
        return str(known[0])
    active = sorted({name for layer in layers for name in layer.active_adapters})
    if len(active) != 1:
        raise ValueError(f"one adapter is saved, but {active or 'none'} of {known} are active; call set_adapter(name)")
    return str(active[0])


def adapter_settings(model: nn.Module) -> Any:
    """Return the PEFT configuration of the adapter that is saved."""
    configs: Any = model.peft_config
    return configs[adapter_name(model)]


def write_weights(model: nn.Module, folder: Path, *, config: CameoConfig, pipeline: Any = None) -> str:
    """Write the weights of `model` into an empty folder, safetensors only, and return the format's name."""
    from safetensors.torch import save_model

    weight_format, core = format_to_write(model, pipeline), unwrap_peft(model)
    if weight_format == "diffusers_lora":
        _write_diffusers_lora(core, folder / LORA_FILE, component_name(core, pipeline), config)
    elif weight_format == "peft":
        _write_peft(model, folder, config)
    elif weight_format == "pipeline":
        component_name(core, pipeline)  # raises if the pipeline holds another model
        pipeline.save_pretrained(str(folder), safe_serialization=True)
    elif weight_format == "diffusers":
        core.save_pretrained(str(folder), safe_serialization=True)  # type: ignore[operator]
    else:
        save_model(core, str(folder / MODULE_FILE), metadata={"format": "pt"})
    return weight_format


def component_name(core: nn.Module, pipeline: Any = None) -> str:
    """Name the denoiser as its pipeline does; a diffusers LoRA's keys start with this name.

    Raises:
        ValueError: if a pipeline is given and holds another model.
    """
    if pipeline is None:
        return "transformer" if "Transformer" in type(core).__name__ else "unet"
    for name, component in getattr(pipeline, "components", {}).items():
        if component is core or (isinstance(component, nn.Module) and unwrap_peft(component) is core):
            return str(name)
    raise ValueError(
        f"pipeline: none of its components is the trained {type(core).__name__}, so other weights would be "
        "saved. Set pipeline.denoiser = model.unwrap() first"
    )


def _write_diffusers_lora(core: nn.Module, path: Path, prefix: str, config: CameoConfig) -> None:
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = adapter_name(core)
    settings = adapter_settings(core).to_dict()
    settings["base_model_name_or_path"] = hub_id(config.base_model)  # nothing else means the same elsewhere
    settings["revision"] = config.base_revision
    header = {f"{prefix}.{key}": sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    state = get_peft_model_state_dict(core, adapter_name=name)
    save_file(
        {f"{prefix}.{key}": value.contiguous() for key, value in state.items()},
        str(path),
        metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(header, indent=2, sort_keys=True)},
    )


def _write_peft(model: nn.Module, folder: Path, config: CameoConfig) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = adapter_name(model)
    state = get_peft_model_state_dict(model, adapter_name=name)
    if not hasattr(model, "get_base_model"):  # injected layers: written as if a PeftModel were around them
        state = {f"base_model.model.{key}": value for key, value in state.items()}
    settings = copy.copy(adapter_settings(model))
    settings.inference_mode = True
    settings.base_model_name_or_path, settings.revision = config.base_model, config.base_revision
    settings.save_pretrained(str(folder))
    tensors = {key: value.contiguous() for key, value in state.items()}
    save_file(tensors, str(folder / PEFT_FILE), metadata={"format": "pt"})
