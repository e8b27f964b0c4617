"""Scenes, RGB-D sequences and the samples drawn from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cameo.lazy import load_on_use

if TYPE_CHECKING:
    from cameo.data.overlap import view_overlap
    from cameo.data.rgbd import RGBDSequence
    from cameo.data.rigs import RIGS, Rig, rig_cameras, rig_views
    from cameo.data.sampling import MultiViewDataset
    from cameo.data.scenes import EmbeddedScenes
    from cameo.data.views import MultiViewSample, SceneSource, Views, collate
else:
    __getattr__, __dir__ = load_on_use(
        __name__,
        {
            "RIGS": "cameo.data.rigs",
            "EmbeddedScenes": "cameo.data.scenes",
            "MultiViewDataset": "cameo.data.sampling",
            "MultiViewSample": "cameo.data.views",
            "RGBDSequence": "cameo.data.rgbd",
            "Rig": "cameo.data.rigs",
            "SceneSource": "cameo.data.views",
            "Views": "cameo.data.views",
            "collate": "cameo.data.views",
            "rig_cameras": "cameo.data.rigs",
            "rig_views": "cameo.data.rigs",
            "view_overlap": "cameo.data.overlap",
        },
    )

__all__ = [
    "RIGS",
    "EmbeddedScenes",
    "MultiViewDataset",
    "MultiViewSample",
    "RGBDSequence",
    "Rig",
    "SceneSource",
    "Views",
    "collate",
    "rig_cameras",
    "rig_views",
    "view_overlap",
]
