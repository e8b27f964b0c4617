"""Hub ids, revisions and licenses of all released weights that the backbones load, in one table.

Each adapter lists its own, as `released`. A revision is the commit that public code and reports name for the weights;
this project has loaded none of them, since its tests run without a network. None means that no commit was found, so the
newest revision is taken. Nothing here needs `trust_remote_code`: the adapters read weights and settings of these
repositories, never their code.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from cameo.adapters.cat3d import Cat3D
from cameo.adapters.mvdream import MVDream
from cameo.adapters.sv3d import SV3D
from cameo.adapters.zero123plus import Zero123Plus
from cameo.backbone import Release

__all__ = ["RELEASED", "licence_of", "revision_of"]

ADAPTERS = (Cat3D, MVDream, SV3D, Zero123Plus)
RELEASED: dict[str, Release] = {name: release for adapter in ADAPTERS for name, release in adapter.released.items()}


def licence_of(name: str | None) -> str | Mapping[str, str] | None:
    """Old name of the method `license` of the backbones."""
    warnings.warn("licence_of is now the method `license` of the backbones", FutureWarning, stacklevel=2)
    return next((adapter().license(name) for adapter in ADAPTERS if adapter().license(name)), None)


def revision_of(name: str | None) -> str | None:
    """Old name of the method `revision` of the backbones."""
    warnings.warn("revision_of is now the method `revision` of the backbones", FutureWarning, stacklevel=2)
    return next((adapter().revision(name) for adapter in ADAPTERS if adapter().revision(name)), None)
