"""What of a model means the same on other machines: names of places, and what diffusers builds without cameo."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

from torch import nn

from cameo.config import CameoConfig
from cameo.hub.license import hub_id

__all__ = [
    "builds_in_diffusers",
    "forget_local_names",
    "is_named_elsewhere",
    "package_of",
    "public_config",
    "without_folder",
]

logger = logging.getLogger(__name__)
LOCAL = "a local file or folder"


def is_named_elsewhere(name: str) -> bool:
    """Tell from its spelling whether the name of a base means the same on other machines.

    A local folder that has been removed is still a local folder.

    Example:
        >>> is_named_elsewhere("bundled:cat3d-tiny"), is_named_elsewhere("/data/base")
        (True, False)
    """
    return hub_id(name) is not None or re.fullmatch(r"[a-z]{2,}:[\w.-]+", name) is not None


def without_folder(value: Any) -> Any:
    """Replace paths on this machine, also within lists and mappings; anything else stays as it is.

    Example:
        >>> without_folder(["/home/me/office", "rooms", 0.1])
        ['a local file or folder', 'rooms', 0.1]
    """
    if isinstance(value, Mapping):
        return {name: without_folder(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_folder(inner) for inner in value]
    return LOCAL if isinstance(value, Path) or (isinstance(value, str) and _is_path(value)) else value


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~/", "./", "../", "file:", "\\\\")) or bool(PureWindowsPath(text).drive)


def public_config(config: CameoConfig, *, warn: bool = True) -> CameoConfig:
    """Return a configuration as others get it, without the folders of this machine.

    Args:
        config: of the model; stays as it is.
        warn: whether a base in a local folder is warned of, rather than noted.
    """
    config = replace(config, training=without_folder(config.training))
    if config.base_model is not None and not is_named_elsewhere(config.base_model):
        logger.log(
            logging.WARNING if warn else logging.INFO,
            "base model %s is a local folder, which is not saved: others have to pass base_model= to load this",
            config.base_model,
        )
        config.base_model = config.base_revision = None
    return config


def forget_local_names(folder: Path) -> None:
    """Remove names of local folders from the JSON files that diffusers and PEFT write beside the weights."""
    for path in folder.rglob("*.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        names = ("_name_or_path", "base_model_name_or_path")
        given = [name for name in names if isinstance(settings, dict) and settings.get(name)]
        if local := [name for name in given if not is_named_elsewhere(settings[name])]:
            kept = {name: value for name, value in settings.items() if name not in local}
            path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def package_of(core: nn.Module) -> str:
    """Name the package of a network's class; what diffusers exports is of diffusers.

    Example:
        >>> package_of(nn.Linear(1, 1))
        'torch'
    """
    import diffusers

    kind = type(core)
    return "diffusers" if getattr(diffusers, kind.__name__, None) is kind else kind.__module__.partition(".")[0]


def builds_in_diffusers(core: nn.Module, component: str, config: CameoConfig, *, online: bool) -> bool:
    """Tell whether `from_pretrained` of diffusers builds this network from the repository of its base.

    It does if the repository holds, in the folder of the component, the same class with the same settings: an adapter
    of cameo may have changed it after loading, such as the first convolution of Stable Diffusion, or converted it.

    Args:
        core: the denoiser.
        component: its name in a pipeline.
        config: names the base.
        online: whether to ask the Hub for what is not in the local cache.
    """
    name = hub_id(config.base_model)
    if name is None or package_of(core) != "diffusers":
        return False
    stored = _stored_settings(name, f"{component}/config.json", config.base_revision, online=online)
    current = dict(core.config)  # type: ignore[arg-type]
    if stored.get("_class_name") != type(core).__name__:
        return False
    common = [key for key in stored if not key.startswith("_") and key in current]
    return all(_comparable(stored[key]) == _comparable(current[key]) for key in common)


def _stored_settings(name: str, file: str, revision: str | None, *, online: bool) -> dict[str, Any]:
    """Read a JSON file of a repository; empty if there is none, or it is not at hand."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx  # hub 1.x and 2.x use different HTTP libraries under this name

    found = try_to_load_from_cache(name, file, revision=revision)
    if not isinstance(found, str):
        if not online:
            return {}
        try:
            found = hf_hub_download(name, file, revision=revision)
        except (HfHubHTTPError, OSError, httpx.HTTPError):
            return {}
    read = json.loads(Path(found).read_text(encoding="utf-8"))
    return read if isinstance(read, dict) else {}


def _comparable(value: Any) -> Any:
    return [_comparable(entry) for entry in value] if isinstance(value, list | tuple) else value
