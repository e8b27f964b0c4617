"""Read the file formats of `cameo.hub.weights` into a model, completely or not at all."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cameo.backbone import get_backbone, unwrap_peft
from cameo.config import CONFIG_NAME, CameoConfig
from cameo.errors import DataError
from cameo.hub.license import hub_id
from cameo.hub.weights import LORA_FILE, MODULE_FILE, PEFT_CONFIG, PEFT_FILE, adapter_layers, check_readable
from cameo.memory import align, align_module, in_precision
from cameo.untrusted.reading import read_object

__all__ = ["ADAPTER", "BaseNeededError", "load_base", "read_adapter", "read_full", "without_adapter"]

ADAPTER = "default"  # name under which a saved adapter is loaded


class BaseNeededError(ValueError):
    """The saved files neither hold nor name a whole model; the caller has to pass `base_model=`."""


def load_base(config: CameoConfig, **place: Any) -> nn.Module:
    """Load the base denoiser that a configuration names; `place` is passed on to `Backbone.load`.

    Raises:
        BaseNeededError: if it names none that can be loaded.
        DataError: if it names a folder that is gone.
        OSError: if the named weights cannot be reached.
    """
    name = config.base_model
    if name is None or name.startswith("preset:"):
        reason = "names no base" if name is None else f"names fresh weights as base ({name}), which are not saved here"
        raise BaseNeededError(
            f"{CONFIG_NAME} {reason}; pass the base as base_model=. The path of a base in a local folder is saved with "
            "local_base=True alone"
        )
    if config.backbone is None:
        raise BaseNeededError(f"no backbone can load the base {name!r}; load it yourself and pass base_model=")
    if hub_id(name) is None and ":" not in name and not Path(name).exists():
        raise DataError(f"base {name!r}: no such folder; load the base yourself and pass base_model=")
    if Path(name).is_dir():
        check_readable(Path(name), "pipeline")
    try:
        with _explained(Path(name), (NotImplementedError,)):
            loaded = get_backbone(config.backbone).load(name, revision=config.base_revision, **place)
    except NotImplementedError as error:
        raise BaseNeededError(f"{error} and pass it as base_model=") from error
    except OSError as error:
        raise OSError(
            f"base {name!r} (revision {config.base_revision}) could not be loaded: {error}\n"
            "If you have these weights elsewhere, load them and pass base_model="
        ) from error
    denoiser: nn.Module = loaded.denoiser
    return denoiser


def read_adapter(folder: Path, weight_format: str, base: nn.Module, *, is_trainable: bool) -> nn.Module:
    """Load a saved adapter into `base`, in place; returns `base`, or a `PeftModel` around it.

    Raises:
        DataError: if a file is missing.
        ValueError: if the adapter does not fit the base; found out before the base is changed.
    """
    from peft import PeftModel
    from safetensors.torch import load_file

    if adapter_layers(base):
        raise ValueError("base_model: carries an adapter already; pass the base without it")
    path = folder / (LORA_FILE if weight_format == "diffusers_lora" else PEFT_FILE)
    for needed in (path, folder / PEFT_CONFIG) if weight_format == "peft" else (path,):
        if not needed.is_file():
            raise DataError(f"{needed}: no such file; the saved adapter is incomplete")
    stored = load_file(str(path))
    check_numbers(path, stored)
    if integers := [key for key, value in stored.items() if not value.is_floating_point()]:
        raise DataError(f"{path}: {integers[0]}: expected a floating-point tensor, got {stored[integers[0]].dtype}")
    prefix = "base_model.model" if weight_format == "peft" else next(iter(stored), "").split(".")[0]
    inner = {key.removeprefix(f"{prefix}."): value for key, value in stored.items()}
    _check_fit(path, inner, base)
    loaded: nn.Module
    if weight_format == "peft":
        device = str(next(base.parameters()).device)
        with _explained(folder / PEFT_CONFIG):
            loaded = PeftModel.from_pretrained(
                base, str(folder), adapter_name=ADAPTER, torch_device=device, autocast_adapter_dtype=False
            )
        _restore(path, loaded, stored)
    else:
        if not hasattr(base, "load_lora_adapter"):
            raise ValueError(f"base_model: {type(base).__name__} cannot load a diffusers LoRA ({path})")
        loaded = base
        with _explained(path):
            loaded.load_lora_adapter(str(folder), prefix=prefix, adapter_name=ADAPTER, weight_name=LORA_FILE)  # type: ignore[operator]
        _restore(path, loaded, inner)
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad_(is_trainable and f".{ADAPTER}" in name)
    align(parameter for name, parameter in loaded.named_parameters() if f".{ADAPTER}" in name)
    return loaded


@contextlib.contextmanager
def _explained(place: Path, passed: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what libraries raise over the files of a model into an error that names the place, but not what is `passed`.

    They raise whatever they trip over, often without the name of a file.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (DataError, BaseNeededError, OSError, ImportError, *passed)):
            raise
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{place}: no model can be built from it ({type(error).__name__}: {reason}). Save, copy or download it "
            "again"
        ) from error


def _check_fit(path: Path, state: dict[str, Tensor], base: nn.Module) -> None:
    """Compare a LoRA's module names and sizes with the base."""
    modules, kind = dict(base.named_modules()), type(base).__name__
    lora = {key: value for key, value in state.items() if ".lora_A." in key or ".lora_B." in key}
    targets = {key.split(".lora_")[0] for key in lora}
    missing = sorted(targets - modules.keys())
    if not state or (targets and len(missing) == len(targets)):
        named = f" (it names {missing[0]})" if missing else ""
        raise ValueError(
            f"base_model: {path} matches no module of this {kind}{named}. It was trained on another model; "
            "pass that one as base_model="
        )
    if missing:
        raise ValueError(f"base_model: this {kind} lacks {len(missing)} modules of {path}: {missing[:3]}")
    for key, value in lora.items():
        target = modules[key.split(".lora_")[0]]
        if not isinstance(target, nn.Linear | nn.Conv2d) or getattr(target, "groups", 1) != 1:
            continue
        axis, side = (1, "inputs") if ".lora_A." in key else (0, "outputs")
        if value.shape[axis] != target.weight.shape[axis]:
            raise ValueError(
                f"base_model: {key} of {path} has {value.shape[axis]} {side}, that module of this {kind} has "
                f"{target.weight.shape[axis]}; pass a base of the trained shape"
            )


def _restore(path: Path, loaded: nn.Module, stored: dict[str, Tensor]) -> None:
    """Give the weights of an adapter their stored precision, and check that all of them were loaded."""
    from peft import get_peft_model_state_dict

    parameters = {name.replace(f".{ADAPTER}.", "."): value for name, value in loaded.named_parameters()}
    for key, value in stored.items():  # PEFT creates the layers in the base's precision
        if key in parameters and parameters[key].dtype != value.dtype:
            parameters[key].data = value.to(parameters[key].device)
    arrived = get_peft_model_state_dict(loaded, adapter_name=ADAPTER)
    wrong = [key for key, value in stored.items() if key not in arrived or not torch.equal(arrived[key].cpu(), value)]
    wrong += sorted(arrived.keys() - stored.keys())
    if wrong:
        raise ValueError(f"base_model: {path} did not load completely into this {type(loaded).__name__}: {wrong[:3]}")


def check_numbers(place: Path, state: Mapping[str, Tensor]) -> None:
    """Raise a DataError that names the first of some saved weights that holds a NaN or an infinite number."""
    for key, value in state.items():
        # The sum of a tensor is finite only if every value is; where it overflows, each value is looked at.
        if value.is_floating_point() and not value.sum(dtype=torch.float64).isfinite() and not value.isfinite().all():
            what = "NaN" if value.isnan().any() else "infinite numbers"
            raise DataError(f"{place}: {key} holds {what}, so the training has diverged. Load an earlier checkpoint")


def without_adapter(model: nn.Module) -> nn.Module:
    """Return a deep copy of the base model as it was before an adapter was added."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    core: Any = copy.deepcopy(unwrap_peft(model))
    for path, module in list(core.named_modules()):
        if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer"):
            parent, _, child = path.rpartition(".")
            setattr(core.get_submodule(parent), child, module.get_base_layer())
    for name in ("peft_config", "_hf_peft_config_loaded"):
        core.__dict__.pop(name, None)
    return core


def read_full(folder: Path, weight_format: str, config: CameoConfig, base: nn.Module | None, **place: Any) -> nn.Module:
    """Load a full model: into `base` in place, or as a new module where the files and the backbone determine its class.

    A base that is needed for its class is read from `place`, see `load_base`.

    Raises:
        BaseNeededError: if they do not determine it.
        DataError: if a file is missing or incomplete.
        ValueError: if names or shapes differ from `base`.
    """
    from safetensors.torch import load_file

    backbone = None if config.backbone is None else get_backbone(config.backbone)
    if weight_format == "module":
        loaded, state = None, load_file(str(folder / MODULE_FILE))
    else:
        loaded = _read_pipeline(folder, backbone) if weight_format == "pipeline" else _read_diffusers(folder, base)
        state = loaded.state_dict()
    check_numbers(folder, state)  # before the base is changed
    if base is not None:
        return _copy_into(base, state, folder)
    # The class in the files may lack the attention of the backbone; the base model has it.
    if loaded is not None and (weight_format == "pipeline" or backbone is None or backbone.recognizes(loaded)):
        return loaded
    if backbone is None:
        raise BaseNeededError(f"{folder}: {MODULE_FILE} holds weights only; pass the module as base_model=")
    preset = (config.base_model or "").partition("preset:")[2]
    base = backbone.build(preset).denoiser if preset else load_base(config, **place)
    return _copy_into(base, state, folder)


def _read_pipeline(folder: Path, backbone: Any) -> nn.Module:
    import diffusers

    if backbone is not None:
        with _explained(folder):
            denoiser: nn.Module = backbone.load(str(folder)).denoiser
        return _in_stored_precision(folder, denoiser)
    index = read_object(folder / "model_index.json")
    for component in ("unet", "transformer"):
        library, name = index.get(component) or (None, "")
        if library == "diffusers" and hasattr(diffusers, name):
            return _from_class(getattr(diffusers, name), folder / component)
    raise BaseNeededError(f"{folder}: model_index.json names no unet or transformer of diffusers; it cannot be loaded")


def _read_diffusers(folder: Path, base: nn.Module | None) -> nn.Module:
    import diffusers

    path = folder / "config.json"
    if not path.is_file():
        raise DataError(f"{path}: no such file; the saved model is incomplete")
    name = read_object(path).get("_class_name", "")
    kind = type(base) if type(base).__name__ == name else getattr(diffusers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise BaseNeededError(f"{folder}: diffusers has no class {name}; pass a module of it as base_model=")
    return _from_class(kind, folder)


def _from_class(kind: Any, folder: Path) -> nn.Module:
    try:
        with _explained(folder / "config.json"):
            model, report = kind.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except OSError as error:
        raise DataError(f"{folder}: the saved model is incomplete: {error}") from error
    problems = [*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])]
    if problems:
        raise DataError(f"{folder}: the weights do not fit {kind.__name__}: {problems[:3]}")
    align_module(model)
    return _in_stored_precision(folder, model)


def _in_stored_precision(folder: Path, model: nn.Module) -> nn.Module:
    """Convert a model to the precision of its weights on disk, where they have one; diffusers loads them as float32."""
    from safetensors import safe_open

    names, dtype = set(model.state_dict()), next(model.parameters()).dtype
    for path in sorted(folder.rglob("diffusion_pytorch_model*.safetensors")):
        with safe_open(str(path), "pt") as file:
            keys = list(file.keys())
            if names.issuperset(keys):
                dtypes = {file.get_tensor(key).dtype for key in keys}
                return in_precision(model, dtypes.pop()) if len(dtypes) == 1 and dtype not in dtypes else model
    return model


def _copy_into(base: nn.Module, state: dict[str, Tensor], folder: Path) -> nn.Module:
    """Copy weights into a module; tensors shared within the module are stored once."""
    current, kind = base.state_dict(), type(base).__name__
    for key in sorted(current.keys() & state.keys()):
        if current[key].shape != state[key].shape:
            raise ValueError(
                f"base_model: {key} of this {kind} has shape {list(current[key].shape)}, in {folder} it has "
                f"{list(state[key].shape)}; pass a base of the trained shape"
            )
    stored = {value.data_ptr() for key, value in current.items() if key in state}
    missing = [key for key in current.keys() - state.keys() if current[key].data_ptr() not in stored]
    if differing := [*missing, *(state.keys() - current.keys())]:
        raise ValueError(f"base_model: this {kind} and {folder} differ in their weights: {sorted(differing)[:3]}")
    base.load_state_dict(state, strict=False)
    return base
