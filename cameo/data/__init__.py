"""Scenes, RGB-D sequences and the samples drawn from them."""

from __future__ import annotations

from cameo.data.overlap import view_overlap
from cameo.data.rgbd import RGBDSequence
from cameo.data.sampling import MultiViewDataset
from cameo.scenes.embedded import EmbeddedScenes
from cameo.scenes.rigs import RIGS, Rig, rig_cameras, rig_views
from cameo.scenes.views import MultiViewSample, SceneSource, Views, collate

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
