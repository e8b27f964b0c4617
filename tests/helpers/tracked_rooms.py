"""Rooms whose views have tracks, as photographs with a COLMAP model have: exact points, without their depth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cameo.training.data
from cameo import Correspondence, Tracks
from cameo.data import SceneSource, Views

__all__ = ["TrackedRooms", "give_tracks", "pixel_tracks"]

# Every so-manieth pixel is a point.
EVERY = 5


class TrackedRooms:
    """The scenes of a source with depth, with tracks of their pixels; `with_depth` says whether depth stays."""

    def __init__(self, source: SceneSource, *, with_depth: bool = True) -> None:
        self.source, self.with_depth = source, with_depth
        self._views: dict[int, Views] = {}

    def __len__(self) -> int:
        return len(self.source)

    def views(self, scene: int) -> Views:
        if scene not in self._views:
            views = self.source.views(scene)
            depth = views.depth if self.with_depth else torch.zeros_like(views.depth)
            self._views[scene] = replace(views, depth=depth, tracks=pixel_tracks(views))
        return self._views[scene]


def pixel_tracks(views: Views) -> Tracks:
    """Points at the centers of pixels, and the pixels of the other views that show them."""
    match = Correspondence.from_depth(
        views.depth[None], views.intrinsics[None], views.extrinsics[None], token_grid=views.size
    )
    there = match.index[0, :, :, ::EVERY]  # [F, F, points]
    count, pixels = there.shape[0], torch.arange(match.index.shape[-1])[::EVERY]
    there = torch.where(torch.eye(count, dtype=torch.bool)[..., None], pixels, there)
    first, view, number = (there >= 0).nonzero().T
    pixel = there[first, view, number]
    xy = torch.stack([pixel % views.size[1], pixel // views.size[1]], dim=-1) + 0.5
    return Tracks(first * len(pixels) + number, view, xy, count)


def give_tracks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the data sets of runs have tracks."""
    source = cameo.training.data._source
    monkeypatch.setattr(cameo.training.data, "_source", lambda *arguments: TrackedRooms(source(*arguments)))
