"""Which license a trained model carries: that of its base, never a default."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cameo.config import CameoConfig

__all__ = ["find_license", "hub_id", "require_license"]

logger = logging.getLogger(__name__)


def hub_id(name: str | None) -> str | None:
    """Return `name` if it can be the id of a Hub repository, else None (no name, a preset, a folder).

    Example:
        >>> hub_id("sudo-ai/zero123plus-v1.2"), hub_id("preset:tiny")
        ('sudo-ai/zero123plus-v1.2', None)
    """
    if name is None or Path(name).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return None
    return name


def find_license(
    config: CameoConfig,
    license: str | Mapping[str, str] | None,
    *,
    backbone: Any = None,
    online: bool = False,
    token: str | None = None,
) -> dict[str, str]:
    """Find a model's license: the argument, else the base's card, else what the backbone's adapter knows.

    Example:
        >>> find_license(CameoConfig(None, []), "cc-by-nc-4.0")
        {'license': 'cc-by-nc-4.0'}

    Args:
        config: names the base weights.
        license: identifier of the Hub, or a mapping with `license`, `license_name` and `license_link`.
        backbone: adapter that is asked last.
        online: whether to read the base's card on the Hub.
        token: for a private base.

    Returns:
        Front-matter entries of a model card; empty if nothing is known.

    Raises:
        ValueError: for `other` without a name.
    """
    if license is not None:
        found: Mapping[str, Any] = {"license": license} if isinstance(license, str) else license
        if not found.get("license"):
            raise ValueError(f"license: expected an identifier or a mapping with 'license', got {license!r}")
    else:
        found = _license_of_base(config, online=online, token=token)
        if not found.get("license") and backbone is not None:
            known = backbone.license(config.base_model)
            found = known if isinstance(known, Mapping) else {"license": known}
    entries = {key: str(found[key]) for key in ("license", "license_name", "license_link") if found.get(key)}
    if entries.get("license") == "other" and "license_name" not in entries:
        raise ValueError(
            "license 'other' needs a name and a link: pass license={'license': 'other', 'license_name': ..., "
            "'license_link': ...}"
        )
    return entries


def require_license(
    config: CameoConfig,
    license: str | Mapping[str, str] | None,
    *,
    backbone: Any = None,
    token: str | None = None,
) -> dict[str, str]:
    """Find the license under which a model can be pushed, asking the Hub too.

    Example:
        >>> require_license(CameoConfig(None, []), None)
        Traceback (most recent call last):
            ...
        ValueError: no license is known for the base weights (not recorded), and a model follows the license of its \
base; pass license= (for example license='openrail')

    Raises:
        ValueError: if none is known; there is no default.
    """
    found = find_license(config, license, backbone=backbone, online=True, token=token)
    if not found:
        raise ValueError(
            f"no license is known for the base weights ({config.base_model or 'not recorded'}), and a model "
            "follows the license of its base; pass license= (for example license='openrail')"
        )
    return found


def _license_of_base(config: CameoConfig, *, online: bool, token: str | None) -> Mapping[str, Any]:
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx  # hub 1.x and 2.x use different HTTP libraries under this name

    base = config.base_model
    if base is not None and (card := Path(base) / "README.md").is_file():
        return ModelCard.load(card).data.to_dict()
    if not online or (name := hub_id(base)) is None:
        return {}
    try:
        info = HfApi(token=token).model_info(name, revision=config.base_revision, timeout=10)
    except (HfHubHTTPError, OSError, httpx.HTTPError) as error:
        logger.info("the card of %s cannot be read (%s); asking the backbone", name, type(error).__name__)
        return {}
    return info.card_data.to_dict() if info.card_data is not None else {}
