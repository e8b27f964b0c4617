"""Which tokens of different views show the same surface point, and the ways of finding out."""

from typing import TYPE_CHECKING

from cameo.lazy import load_on_use

if TYPE_CHECKING:
    from cameo.correspondence.correspondence import DEPTH_TOLERANCE, Correspondence, GridSize
    from cameo.correspondence.frames import latent_frames, merge_views
    from cameo.correspondence.tracks import PixelPairs, Tracks
else:
    __getattr__, __dir__ = load_on_use(
        __name__,
        {
            "DEPTH_TOLERANCE": "cameo.correspondence.correspondence",
            "Correspondence": "cameo.correspondence.correspondence",
            "GridSize": "cameo.correspondence.correspondence",
            "PixelPairs": "cameo.correspondence.tracks",
            "Tracks": "cameo.correspondence.tracks",
            "latent_frames": "cameo.correspondence.frames",
            "merge_views": "cameo.correspondence.frames",
        },
    )

__all__ = [
    "DEPTH_TOLERANCE",
    "Correspondence",
    "GridSize",
    "PixelPairs",
    "Tracks",
    "latent_frames",
    "merge_views",
]
