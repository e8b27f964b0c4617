"""Modules under the names they had in earlier releases, so that old imports, pickles and saved pipelines work.

A saved `model_index.json` names the module of each class in it, as a pickle does. The two tables are plain data, and
nothing else in this project knows an old name.
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

__all__ = ["MOVED", "MOVED_NAMES", "install", "place_today"]

# Old name of a module: its current name.
MOVED: dict[str, str] = {
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
    "cameo.attention.axes": "cameo.attention.layouts.axes",
    "cameo.attention.axis_lengths": "cameo.attention.layouts.axis_lengths",
    "cameo.attention.open_segment": "cameo.attention.layouts.open_segment",
    "cameo.attention.pattern": "cameo.attention.layouts.pattern",
    "cameo.attention.shape_check": "cameo.attention.layouts.shape_check",
    "cameo.attention.view_order": "cameo.attention.layouts.view_order",
    "cameo.attention_calls": "cameo.attention.kernel_calls",
    "cameo.cameras": "cameo.geometry.cameras",
    "cameo.capture": "cameo.attention.capture",
    "cameo.card": "cameo.hub.card",
    "cameo.correspondence.nearest": "cameo.correspondence.neighbors.nearest",
    "cameo.correspondence.triton_nearest": "cameo.correspondence.neighbors.triton_nearest",
    "cameo.correspondence.triton_support": "cameo.correspondence.neighbors.triton_support",
    "cameo.data.cache": "cameo.scenes.cache",
    "cameo.data.meshes": "cameo.scenes.meshes",
    "cameo.data.objects": "cameo.scenes.objects",
    "cameo.data.rendering": "cameo.scenes.rendering",
    "cameo.data.rigs": "cameo.scenes.rigs",
    "cameo.data.rooms": "cameo.scenes.rooms",
    "cameo.data.scenes": "cameo.scenes.embedded",
    "cameo.data.shapes": "cameo.scenes.shapes",
    "cameo.data.textures": "cameo.scenes.textures",
    "cameo.data.views": "cameo.scenes.views",
    "cameo.depth": "cameo.geometry.depth",
    "cameo.evaluation.attention": "cameo.probing.hits",
    "cameo.evaluation.mode": "cameo.probing.mode",
    "cameo.evaluation.runs": "cameo.training.runs",
    "cameo.evaluation.truth": "cameo.probing.truth",
    "cameo.features": "cameo.correspondence.features",
    "cameo.kernels": "cameo.alignment",
    "cameo.kernels.heads": "cameo.alignment.torch_heads",
    "cameo.kernels.nearest": "cameo.correspondence.neighbors.nearest",
    "cameo.kernels.operator": "cameo.alignment.operator",
    "cameo.kernels.rows": "cameo.alignment.rows",
    "cameo.kernels.sweep": "cameo.alignment.sweep",
    "cameo.kernels.triton_head_kernels": "cameo.alignment.triton_head_kernels",
    "cameo.kernels.triton_heads": "cameo.alignment.triton_heads",
    "cameo.kernels.triton_nearest": "cameo.correspondence.neighbors.triton_nearest",
    "cameo.kernels.triton_support": "cameo.correspondence.neighbors.triton_support",
    "cameo.layer_probe": "cameo.probing.layer_probe",
    "cameo.layout": "cameo.attention.layout",
    "cameo.licence": "cameo.hub.license",
    "cameo.listing": "cameo.probing.listing",
    "cameo.loading": "cameo.hub.loading",
    "cameo.matching": "cameo.correspondence.matching",
    "cameo.orbits": "cameo.geometry.orbits",
    "cameo.pattern": "cameo.attention.layouts.pattern",
    "cameo.perturbation": "cameo.probing.ablation",
    "cameo.probe_report": "cameo.probing.report",
    "cameo.probe_tally": "cameo.probing.tally",
    "cameo.probed_layer": "cameo.probing.probed_layer",
    "cameo.publish": "cameo.hub.publish",
    "cameo.self_view": "cameo.attention.self_view",
    "cameo.training.checkpoint": "cameo.training.checkpoints.folder",
    "cameo.training.config": "cameo.training.settings.config",
    "cameo.training.correspondences": "cameo.data.batches",
    "cameo.training.processes": "cameo.processes.accelerator",
    "cameo.training.stopping": "cameo.processes.stopping",
    "cameo.weights": "cameo.hub.weights",
    "cameo.xformers_tap": "cameo.attention.kernels.taps",
}


# Old name of something that is not in the module that `MOVED` names: where it is.
MOVED_NAMES: dict[str, str] = {
    "cameo.adapters.cat3d_pipeline.JointViewAttnProcessor": "cameo.adapters.common.joint_views.JointViewAttnProcessor",
    "cameo.adapters.mvdream_loading.noise_schedule": "cameo.adapters.common.noise_schedules.ddim",
    "cameo.adapters.sgm_video_unet.checkpoint_hazard": "cameo.adapters.sv3d.layers.reentrant_checkpointing",
    "cameo.adapters.sv3d_pipeline.edm_scheduler": "cameo.adapters.common.noise_schedules.edm_euler",
    "cameo.adapters.zero123plus_images.by_canvas": "cameo.adapters.zero123plus.cameras.by_canvas",
    "cameo.adapters.zero123plus_images.from_canvas": "cameo.adapters.zero123plus.cameras.from_canvas",
    "cameo.adapters.zero123plus_images.to_canvas": "cameo.adapters.zero123plus.cameras.to_canvas",
    "cameo.adapters.zero123plus_unet.RELEASED_REFERENCE_SIZE": (
        "cameo.adapters.zero123plus.layers.RELEASED_REFERENCE_SIZE"
    ),
    "cameo.adapters.zero123plus_unet.ReferenceAttnProcessor": (
        "cameo.adapters.zero123plus.layers.ReferenceAttnProcessor"
    ),
    "cameo.adapters.zero123plus_unet.check_references": "cameo.adapters.zero123plus.layers.check_references",
    "cameo.adapters.zero123plus_unet.is_published": "cameo.adapters.zero123plus.layers.is_published",
    "cameo.adapters.zero123plus_unet.keep_references": "cameo.adapters.zero123plus.convert.keep_references",
    "cameo.adapters.zero123plus_unet.noise_schedule": "cameo.adapters.common.noise_schedules.linear_ddpm",
    "cameo.adapters.zero123plus_unet.reads_references": "cameo.adapters.zero123plus.layers.reads_references",
    "cameo.capture.AttentionSite": "cameo.attention.capture.AttentionLayer",
    "cameo.evaluation.truth.Truth": "cameo.probing.truth.TrueMatches",
    "cameo.layer_probe.NEAR": "cameo.probing.result.NEAR",
    "cameo.layer_probe.RankedLayer": "cameo.probing.result.RankedLayer",
    "cameo.layer_probe.known_within": "cameo.probing.result.check_within",
    "cameo.perturbation.Drop": "cameo.probing.ablation.QualityLoss",
    "cameo.probe_tally.BatchTruths": "cameo.probing.tally.BatchMatches",
    "cameo.probe_tally.LayerTally": "cameo.probing.tally.LayerHitCounter",
    "cameo.evaluation.runs.Evaluated": "cameo.training.runs.EvaluatedModel",
    "cameo.kernels.sweep.Swept": "cameo.alignment.sweep.LossAndGradients",
    "cameo.licence.find_licence": "cameo.hub.license.find_license",
    "cameo.licence.require_licence": "cameo.hub.license.require_license",
    "cameo.self_view.self_view_only": "cameo.probing.ablation.self_view_only",
    "cameo.training.checkpoint.load_trained": "cameo.training.trained_weights.load_trained",
    "cameo.training.checkpoint.read_state": "cameo.training.checkpoints.verify.read_state",
    "cameo.weights.format_of": "cameo.hub.weights.format_to_write",
}


class _MovedFinder(MetaPathFinder, Loader):
    """Finds the modules of `MOVED`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Replace the empty `module` by the current one, or let it find what is in several modules."""
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} is now {new}; import it from there", FutureWarning, stacklevel=2)
        if not any(name.rpartition(".")[0] == old for name in MOVED_NAMES):
            sys.modules[old] = importlib.import_module(new)  # the very same module, which Python then hands out
            return

        def find(name: str) -> Any:
            place, current = place_today(old, name)
            return getattr(importlib.import_module(place), current)

        vars(module)["__getattr__"] = find


def place_today(module: str, name: str) -> tuple[str, str]:
    """Return the current module and name of something; what did not move keeps both.

    Example:
        >>> place_today("cameo.adapters.joint_dit", "JointDiT")
        ('cameo.adapters.cat3d.denoiser', 'JointDiT')
        >>> place_today("diffusers", "DDIMScheduler")
        ('diffusers', 'DDIMScheduler')
    """
    if moved := MOVED_NAMES.get(f"{module}.{name}"):
        module, _, name = moved.rpartition(".")
    return MOVED.get(module, module), name


def install() -> None:
    """Let Python find the modules of `MOVED`; a second call changes nothing.

    Example:
        >>> import warnings, cameo.adapters.cat3d.denoiser
        >>> with warnings.catch_warnings(action="ignore"):
        ...     from cameo.adapters import joint_dit
        >>> joint_dit is cameo.adapters.cat3d.denoiser
        True
    """
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        # First: otherwise Python would look for a file of the old name in the package that the name begins with.
        sys.meta_path.insert(0, _MovedFinder())
