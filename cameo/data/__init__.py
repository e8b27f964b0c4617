"""Scenes, RGB-D sequences and the samples drawn from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cameo.lazy import load_on_use

if TYPE_CHECKING:
    from cameo.data.opening import open_views
    from cameo.data.overlap import view_overlap
    from cameo.data.readers.tars import write_tars
    from cameo.data.rgbd import RGBDSequence
    from cameo.data.sampling import MultiViewDataset
    from cameo.scenes.embedded import EmbeddedScenes
    from cameo.scenes.rigs import RIGS, Rig, rig_cameras, rig_views
    from cameo.scenes.room_rig import RoomRig
    from cameo.scenes.views import LazySource, MultiViewSample, SceneCameras, SceneSource, Views, collate
else:
    __getattr__, __dir__ = load_on_use(
        __name__,
        {
            "RIGS": "cameo.scenes.rigs",
            "EmbeddedScenes": "cameo.scenes.embedded",
            "LazySource": "cameo.scenes.views",
            "MultiViewDataset": "cameo.data.sampling",
            "MultiViewSample": "cameo.scenes.views",
            "RGBDSequence": "cameo.data.rgbd",
            "Rig": "cameo.scenes.rigs",
            "RoomRig": "cameo.scenes.room_rig",
            "SceneCameras": "cameo.scenes.views",
            "SceneSource": "cameo.scenes.views",
            "Views": "cameo.scenes.views",
            "collate": "cameo.scenes.views",
            "open_views": "cameo.data.opening",
            "rig_cameras": "cameo.scenes.rigs",
            "rig_views": "cameo.scenes.rigs",
            "view_overlap": "cameo.data.overlap",
            "write_tars": "cameo.data.readers.tars",
        },
    )

__all__ = [
    "RIGS",
    "EmbeddedScenes",
    "LazySource",
    "MultiViewDataset",
    "MultiViewSample",
    "RGBDSequence",
    "Rig",
    "RoomRig",
    "SceneCameras",
    "SceneSource",
    "Views",
    "collate",
    "open_views",
    "rig_cameras",
    "rig_views",
    "view_overlap",
    "write_tars",
]
