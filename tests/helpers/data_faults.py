"""Views of which the truth is known, and the mistakes with which data is handed over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cameo.correspondence.tracks import Tracks
from cameo.geometry import camera_rays, pixel_grid, project, unproject
from cameo.scenes.views import Views

OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))


def in_opengl_axes(views: Views) -> Views:
    """World-to-camera poses of cameras with y up that look along -z."""
    return replace(views, extrinsics=OPENGL @ views.extrinsics)


def camera_to_world(views: Views) -> Views:
    """Poses the wrong way round."""
    return replace(views, extrinsics=torch.linalg.inv(views.extrinsics))


def late(views: Views, name: str, frames: int) -> Views:
    """One field as it was some frames earlier."""
    return replace(views, **{name: getattr(views, name).roll(frames, 0)})


def with_rows(views: Views, first: float, second: float) -> Views:
    """Intrinsics with scaled rows."""
    return replace(views, intrinsics=views.intrinsics * torch.tensor([first, second, 1.0])[:, None])


def along_rays(views: Views) -> Views:
    """Distance along the ray for z-depth."""
    grid = pixel_grid(*views.size, dtype=torch.float32, device="cpu").flatten(0, 1)
    length = camera_rays(grid, views.intrinsics[None])[0].norm(dim=-1)
    return replace(views, depth=views.depth * length.view(-1, 1, *views.size))


def depth_moved(views: Views, columns: int) -> Views:
    """Depth some pixels to the right of its colors."""
    depth = views.depth.roll(columns, -1)
    depth[..., :columns] = 0
    return replace(views, depth=depth)


def tracked(views: Views, points: int = 60) -> Views:
    """Exact tracks of surface points that two views or more show, and no depth."""
    count, (height, width) = len(views), views.size
    world = unproject(views.depth[None], views.intrinsics[None], views.extrinsics[None])[0].flatten(2).mT
    chosen = torch.linspace(0, world.shape[1] - 1, points).long()
    found = []
    for view in range(count):
        xy, z = project(world[view, chosen].expand(1, count, -1, 3), views.intrinsics[None], views.extrinsics[None])
        inside = (xy[0] > 0).all(-1) & (xy[0, ..., 0] < width) & (xy[0, ..., 1] < height)
        column, row = torch.where(inside[..., None], xy[0], 0).long().unbind(-1)
        surface = views.depth[torch.arange(count)[:, None], 0, row, column]
        shown, number = (inside & ((z[0] / surface - 1).abs() < 0.03)).nonzero(as_tuple=True)
        found.append((number + view * points, shown, xy[0, shown, number]))
    point, view, xy = (torch.cat(parts) for parts in zip(*found, strict=True))
    return replace(views, depth=torch.zeros_like(views.depth), tracks=Tracks(point, view, xy, count))


def flat_wall() -> Views:
    """A textured wall two units away, along which four cameras move sideways."""
    count, side, focal = 4, 48, 40.0
    x, y = pixel_grid(side, side, dtype=torch.float32, device="cpu").unbind(-1)
    position = 0.2 * torch.arange(count)
    wall_x = position[:, None, None] + 2 * (x - side / 2) / focal
    wall_y = (2 * (y - side / 2) / focal).expand_as(wall_x)
    images = 0.5 + 0.4 * torch.stack([(7 * wall_x + 3 * wall_y).sin(), (5 * wall_y).sin(), (11 * wall_x).sin()], 1)
    extrinsics = torch.eye(4).repeat(count, 1, 1)
    extrinsics[:, 0, 3] = -position
    intrinsics = torch.tensor([[focal, 0, side / 2], [0, focal, side / 2], [0, 0, 1]]).repeat(count, 1, 1)
    return Views(images, torch.full((count, 1, side, side), 2.0), intrinsics, extrinsics, "wall")


def write_seven_scenes(views: Views, folder: Path) -> Path:
    """Write views as an RGB-D sequence of the 7-Scenes layout, exact up to a millimeter of depth."""
    folder.mkdir(parents=True)
    poses = torch.linalg.inv(views.extrinsics.double()).numpy()
    for frame in range(len(views)):
        name = f"frame-{frame:06d}"
        Image.fromarray(views.images[frame].permute(1, 2, 0).numpy()).save(folder / f"{name}.color.png")
        depth = (views.depth[frame, 0] * 1000).round().clamp(0, 65534)
        Image.fromarray(depth.numpy().astype(np.uint16)).save(folder / f"{name}.depth.png")
        np.savetxt(folder / f"{name}.pose.txt", poses[frame])
    np.savetxt(folder / "camera-intrinsics.txt", views.intrinsics[0].numpy())
    return folder
