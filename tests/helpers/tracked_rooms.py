"""Rooms whose views have tracks, as photographs with a COLMAP model have: exact points, without their depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import cameo.training.data
from cameo import Correspondence, Tracks
from cameo.data import MultiViewDataset, SceneSource, Views

__all__ = ["TrackedRooms", "give_tracks", "pixel_tracks"]

# Every so-manieth pixel is a point.
EVERY = 5


@dataclass(frozen=True)
class TrackedViews(Views):
    """Views with tracks."""

    tracks: Tracks | None = None


class TrackedRooms:
    """The scenes of a source with depth, with tracks of their pixels."""

    def __init__(self, source: SceneSource) -> None:
        self.source = source
        self._views: dict[int, TrackedViews] = {}

    def __len__(self) -> int:
        return len(self.source)

    def views(self, scene: int) -> TrackedViews:
        if scene not in self._views:
            views = self.source.views(scene)
            fields: dict[str, Any] = {**vars(views), "tracks": pixel_tracks(views)}
            self._views[scene] = TrackedViews(**fields)
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
    source, item = cameo.training.data._source, MultiViewDataset.__getitem__

    def with_tracks(dataset: MultiViewDataset, index: int) -> Any:
        sample = item(dataset, index)
        tracks = dataset.source.views(sample["scene"]).tracks
        return {**sample, "tracks": tracks.of_views(sample["scene_views"])}

    monkeypatch.setattr(cameo.training.data, "_source", lambda *arguments: TrackedRooms(source(*arguments)))
    monkeypatch.setattr(MultiViewDataset, "__getitem__", with_tracks)
