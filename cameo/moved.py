"""Modules under the names they had in earlier releases, so that old imports, pickles and saved pipelines work.

A saved `model_index.json` names the module of each class in it, as a pickle does. `MOVED` is the whole table; nothing
else in this project knows an old name.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "install"]

# Old name: new name, or the new names of the parts where the contents of a module are in several places today.
MOVED: dict[str, str | tuple[str, ...]] = {
    "cameo.adapters.cat3d_pipeline": "cameo.adapters.cat3d.pipeline",
    "cameo.adapters.joined_frames": "cameo.adapters.common.joined_frames",
    "cameo.adapters.joint_dit": "cameo.adapters.cat3d.denoiser",
    "cameo.adapters.joint_views": "cameo.adapters.common.joint_views",
    "cameo.adapters.latent_pipeline": "cameo.adapters.common.latent_pipeline",
    "cameo.adapters.mvdream_cameras": "cameo.adapters.mvdream.cameras",
    "cameo.adapters.mvdream_convert": "cameo.adapters.mvdream.convert",
    "cameo.adapters.mvdream_loading": "cameo.adapters.mvdream.weights",
    "cameo.adapters.mvdream_pipeline": "cameo.adapters.mvdream.pipeline",
    "cameo.adapters.mvdream_unet": "cameo.adapters.mvdream.denoiser",
    "cameo.adapters.presets": "cameo.adapters.common.presets",
    "cameo.adapters.sgm_video_unet": "cameo.adapters.sv3d.layers",
    "cameo.adapters.sv3d_convert": "cameo.adapters.sv3d.convert",
    "cameo.adapters.sv3d_pipeline": "cameo.adapters.sv3d.pipeline",
    "cameo.adapters.sv3d_release": "cameo.adapters.sv3d.weights",
    "cameo.adapters.sv3d_unet": "cameo.adapters.sv3d.denoiser",
    "cameo.adapters.unet_layers": "cameo.adapters.common.unet_layers",
    "cameo.adapters.zero123plus_images": "cameo.adapters.common.images",
    "cameo.adapters.zero123plus_pipeline": "cameo.adapters.zero123plus.pipeline",
    "cameo.adapters.zero123plus_poses": "cameo.adapters.zero123plus.cameras",
    "cameo.adapters.zero123plus_unet": "cameo.adapters.zero123plus.denoiser",
}


class _MovedFinder(MetaPathFinder, Loader):
    """Finds the modules of `MOVED` where no file has the name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module that `MOVED` names in place of the empty `module`."""
        old, new = module.__name__, MOVED[module.__name__]
        parts = (new,) if isinstance(new, str) else new
        warnings.warn(f"{old} is now {' and '.join(parts)}; import it from there", FutureWarning, stacklevel=2)
        homes = [importlib.import_module(part) for part in parts]
        if len(homes) == 1:
            sys.modules[old] = homes[0]  # the very same module, which the import system then hands out
            return

        def find(name: str) -> Any:
            for home in homes:
                if hasattr(home, name):
                    return getattr(home, name)
            raise AttributeError(f"module {old!r} has no attribute {name!r}; it is now {' and '.join(parts)}")

        module.__getattr__ = find  # type: ignore[method-assign]


def install() -> None:
    """Let Python find the modules of `MOVED`, after all others; a second call changes nothing.

    Example:
        >>> import warnings, cameo.adapters.cat3d.denoiser
        >>> with warnings.catch_warnings(action="ignore"):
        ...     from cameo.adapters import joint_dit
        >>> joint_dit is cameo.adapters.cat3d.denoiser
        True
    """
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedFinder())
