"""RGB-D sequences on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_sequence(folder: Path, frames: int = 10, *, spacing: float = 0.08) -> Path:
    """A 7-Scenes folder: a patterned wall two metres away, seen by a camera that moves sideways."""
    folder.mkdir(parents=True)
    height, width, focal = 48, 64, 60.0
    y, x = np.mgrid[:height, :width] + 0.5
    for frame in range(frames):
        shift = spacing * frame
        wall_x, wall_y = shift + 2 * (x - width / 2) / focal, 2 * (y - height / 2) / focal
        pattern = np.stack([np.sin(7 * wall_x + 3 * wall_y), np.sin(5 * wall_y), np.sin(11 * wall_x)], axis=-1)
        Image.fromarray(np.uint8(127 + 120 * pattern)).save(folder / f"frame-{frame:06d}.color.png")
        Image.fromarray(np.full((height, width), 2000, dtype=np.uint16)).save(folder / f"frame-{frame:06d}.depth.png")
        pose = np.eye(4)
        pose[0, 3] = shift
        np.savetxt(folder / f"frame-{frame:06d}.pose.txt", pose)
    np.savetxt(folder / "camera-intrinsics.txt", [[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return folder
