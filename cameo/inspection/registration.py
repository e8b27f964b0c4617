"""Whether depth lies on the image that it belongs to: edges of depth on edges of color.

Axes: S views that are looked at, H W pixels, Z zooms, D shifts along one side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cameo.inspection.scenes import InspectedScene
from cameo.scenes.views import images_to_float

__all__ = ["Registration", "moved_edges", "register", "with_moved_depth"]

# Factors by which depth may be larger than the image: of cameras with other focal lengths, as in RGB-D sensors.
ZOOMS = (1.0, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2)
# Largest shift that is tried, as a share of the image side.
REACH = 0.06
# Side of the images in which edges are compared, at most.
SIDE = 128
# Depth that changes by more than this share within three pixels is an edge.
DEPTH_EDGE = 0.08
# Pixels without depth are a plain background if this share of them differs by less than this from the color of most.
PLAIN_SHARE, PLAIN = 0.75, 0.02
MOST_VIEWS = 32
# Fewest pixels of depth edges over all views from which anything can be concluded.
LEAST_EDGES = 200
# Depth is not registered if moving it by this share of the image's side or more brings its edges onto edges of color
# that are stronger by this factor, with this certainty.
LEAST_OFFSET, LEAST_GAIN, LEAST_CERTAINTY = 0.025, 1.25, 4.0


@dataclass(frozen=True)
class Registration:
    """How depth is to be moved so that its edges lie on those of the colors.

    - `zoom`: factor about the center of the image by which the depth image is too large.
    - `shift`: x and y in shares of the image's width and height by which it is then to be moved.
    - `here`, `best`: how strong color edges are on depth edges, in standard deviations above the mean of the image, as
      given and after the move.
    - `certainty`: the mean advantage of the move over the views in units of its standard error.
    - `known`: whether there are enough edges of depth.

    Example:
        >>> Registration(1.0, (0.0, 0.03), 0.4, 1.2, 9.0, known=True).offset
        0.03
    """

    zoom: float
    shift: tuple[float, float]
    here: float
    best: float
    certainty: float
    known: bool

    @property
    def offset(self) -> float:
        """How far the move brings the corner or center of the image that it moves most, as a share of its side."""
        return max(abs(move) for move in self.shift) + abs(1 - 1 / self.zoom) / 2

    @property
    def is_moved(self) -> bool:
        """Whether depth is certainly not registered to color."""
        gained = self.best >= LEAST_GAIN * max(self.here, 0.0) and self.certainty >= LEAST_CERTAINTY
        return self.known and gained and self.offset >= LEAST_OFFSET

    @property
    def words(self) -> str:
        """What it looks like and the cure."""
        parts = [f"{self.zoom:g} times too large"] if self.zoom != 1 else []
        parts += [
            f"{abs(share):.0%} of the image's {side} too far {before if share > 0 else after}"
            for share, side, before, after in zip(
                self.shift, ("width", "height"), ("left", "up"), ("right", "down"), strict=True
            )
            if share
        ]
        return (
            f"depth not registered to color: its edges are {' and '.join(parts)}; cure: project depth into the color "
            "camera, or give the intrinsics that each of the two was cropped and resized with"
        )


@torch.no_grad()
def register(scenes: Sequence[InspectedScene]) -> Registration:
    """Compare the edges of depth and color in some views of some scenes."""
    each = max(1, MOST_VIEWS // len(scenes))
    curves, weights = zip(*(_curves(scene, each) for scene in scenes), strict=True)
    curve, weight = torch.cat(curves), torch.cat(weights)
    known = bool(weight[:, 0].sum() >= LEAST_EDGES)
    total = weight.sum(0)[:, None, None]
    mean = (curve * weight[..., None, None]).sum(0) / total.clamp(min=1)
    mean = torch.where(total > 0.5 * total[0], mean, -math.inf)
    middle = mean.shape[-1] // 2
    zoom, row, column = (int(index) for index in torch.unravel_index(mean.argmax(), mean.shape))
    gained = (curve[:, zoom, row, column] - curve[:, 0, middle, middle])[weight[:, 0] > 0]
    error = (gained.std() / math.sqrt(len(gained))).item() if len(gained) > 1 else math.inf
    return Registration(
        zoom=ZOOMS[zoom],
        shift=(REACH * (column / middle - 1), REACH * (row / middle - 1)),
        here=mean[0, middle, middle].item(),
        best=mean.max().item(),
        certainty=gained.mean().item() / error if len(gained) and error > 0 else 0.0,
        known=known,
    )


def _curves(scene: InspectedScene, most: int) -> tuple[Tensor, Tensor]:
    """Strength of color edges on moved depth edges, `[S, Z, D, D]`, and the number of depth edges, `[S, Z]`."""
    views = scene.views
    chosen = torch.linspace(0, len(views) - 1, min(most, len(views))).long().unique()
    side = min(SIDE, *views.size)
    images = images_to_float(views.images[chosen])
    color = _color_edges(F.interpolate(images, size=(side, side), antialias=True, mode="bilinear"))
    depth = _with_background(views.depth[chosen, 0], images)
    reach = max(1, round(REACH * side))
    curves, counts = [], []
    for zoom in ZOOMS:
        edges = _depth_edges(_zoomed(depth, zoom, side))
        padded = F.pad(color, (reach,) * 4)
        # For a shift of (dy, dx), the sum over pixels of edges[y, x] * color[y + dy, x + dx].
        sums = F.conv2d(padded[None], edges[:, None], groups=len(edges))[0]
        count = edges.sum((1, 2))
        curves.append(sums / count.clamp(min=1)[:, None, None])
        counts.append(count)
    return torch.stack(curves, 1), torch.stack(counts, 1)


def with_moved_depth(scene: InspectedScene, move: Registration) -> InspectedScene:
    """Return a scene whose depth is moved onto its colors; its cameras stay."""
    rows, columns = (
        ((((torch.arange(length) + 0.5) / length - share - 0.5) * move.zoom + 0.5) * length).floor().long()
        for length, share in zip(scene.views.size, reversed(move.shift), strict=True)
    )
    height, width = scene.views.size
    inside = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    depth = scene.views.depth[..., rows.clamp(0, height - 1)[:, None], columns.clamp(0, width - 1)] * inside
    return replace(scene, views=replace(scene.views, depth=depth))


def _zoomed(depth: Tensor, zoom: float, side: int) -> Tensor:
    """Make depth `[S, H, W]` `zoom` times smaller about the center and resize it to a square, 0 outside."""
    # Places in the depth image, in shares of its side, that come under the pixel centers of the result.
    places = ((torch.arange(side) + 0.5) / side - 0.5) * zoom + 0.5
    inside = (places > 0) & (places < 1)
    rows, columns = ((places.clamp(0, 1) * length).long().clamp(max=length - 1) for length in depth.shape[-2:])
    return depth[:, rows[:, None], columns] * (inside[:, None] & inside)


def moved_edges(scene: InspectedScene, view: int, move: Registration | None) -> tuple[Tensor, Tensor]:
    """Return the image of `scene.views` number `view` as a square `[3, S, S]`, and its edges of depth `[S, S]`.

    `move`: how depth is moved before; None leaves it as given.
    """
    images = images_to_float(scene.views.images[[view]])
    side = min(SIDE, *scene.views.size)
    depth = _with_background(scene.views.depth[[view], 0], images)
    edges = _depth_edges(_zoomed(depth, 1.0 if move is None else move.zoom, side))[0] > 0
    if move is not None:
        columns, rows = (round(share * side) for share in move.shift)
        edges = edges.roll((rows, columns), (0, 1))
    return F.interpolate(images, size=(side, side), antialias=True, mode="bilinear")[0], edges


def _with_background(depth: Tensor, images: Tensor) -> Tensor:
    """Put the plain background of rendered objects, which has no depth, far away, so that objects have outlines."""
    missing = depth == 0
    colors = images.movedim(1, -1)[missing]
    if not len(colors) or not ((colors - colors.median(0).values).abs().amax(-1) < PLAIN).float().mean() > PLAIN_SHARE:
        return depth
    return torch.where(missing, 10 * depth.max(), depth)


def _color_edges(images: Tensor) -> Tensor:
    """Range of the colors within three pixels, `[S, H, W]`, in standard deviations above the mean of each image."""
    spread = (F.max_pool2d(images, 3, 1, 1) + F.max_pool2d(-images, 3, 1, 1)).amax(1)
    return (spread - spread.mean((1, 2), keepdim=True)) / spread.std((1, 2), keepdim=True).clamp(min=1e-6)


def _depth_edges(depth: Tensor) -> Tensor:
    """Where measured depth `[S, H, W]` has an edge between two measured surfaces, as 0 and 1."""
    nearest = -F.max_pool2d(torch.where(depth > 0, -depth, 0.0)[:, None], 3, 1, 1)[:, 0]
    farthest = F.max_pool2d(depth[:, None], 3, 1, 1)[:, 0]
    return ((nearest > 0) & (farthest - nearest > DEPTH_EDGE * farthest)).float()
