"""Scenes, RGB-D sequences and the samples drawn from them."""

from __future__ import annotations

from cameo.data.overlap import view_overlap
from cameo.data.rgbd import RGBDSequence
from cameo.data.sampling import MultiViewDataset
from cameo.data.scenes import EmbeddedScenes
from cameo.data.views import MultiViewSample, SceneSource, Views, collate

__all__ = [
    "EmbeddedScenes",
    "MultiViewDataset",
    "MultiViewSample",
    "RGBDSequence",
    "SceneSource",
    "Views",
    "collate",
    "view_overlap",
]
