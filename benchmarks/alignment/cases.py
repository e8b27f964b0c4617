"""Inputs for benchmarks of the alignment loss: a scene, its matches in three row selections, queries and keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.correspondence.accuracy import Room
from cameo import AlignmentHead, Correspondence, alignment_loss
from cameo.alignment import supervision_weights
from cameo.geometry import cell_centres

__all__ = ["SELECTIONS", "Case", "Setting", "make_case"]

SPACING = 20.0  # degrees between neighbouring cameras, less where they would go around more than once
DISTANCE, HEIGHT = 2.4, -0.4
SPHERE = (0.0, 0.2, 0.0, 0.6)

# Which rows (a query token against one other view) carry a target, and how the loss is averaged.
SELECTIONS = {
    "released": "one target per query token, in the view with the nearest point, if that one is visible",
    "per view": "every visible row",
    "all": "every row, nothing skipped",
}


@dataclass(frozen=True)
class Setting:
    """Size of one measurement; `tokens` is the side of a view's token grid, `dtype` the precision of q and k."""

    tokens: int = 16
    views: int = 4
    heads: int = 10
    batch: int = 1
    head: str = "mlp"
    dtype: str = "float32"
    dimension: int = 64

    @property
    def name(self) -> str:
        """Name of the measurement in a results file."""
        return (
            f"{self.tokens}x{self.tokens} tokens, {self.views} views, {self.heads} heads, batch {self.batch}, "
            f"{self.head}, {self.dtype}"
        )

    @property
    def rows(self) -> int:
        """Query tokens times other views, over the batch."""
        return self.batch * self.views * (self.views - 1) * self.tokens**2

    @property
    def pairs(self) -> int:
        """Pairs of a query token and a key token of another view, over the batch."""
        return self.rows * self.tokens**2


@dataclass(frozen=True)
class Case:
    """Queries and keys `[B, K, V, N, D]`, a head, and matches for each row selection."""

    setting: Setting
    query: Tensor
    key: Tensor
    head: AlignmentHead
    visible: Correspondence
    every: Correspondence

    @property
    def references(self) -> int:
        """The first half of the views are references; only the released mode tells them apart."""
        return self.setting.views // 2

    def match(self, selection: str) -> Correspondence:
        """Matches of a row selection."""
        return self.every if selection == "all" else self.visible

    def options(self, selection: str) -> dict[str, Any]:
        """Arguments of `cameo.alignment_loss` for a row selection."""
        if selection == "released":
            return {"reduction": "released", "num_reference_views": self.references}
        return {"reduction": "mean"}

    def weights(self, selection: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weight `[B, V, V, N]` of each row's loss."""
        return supervision_weights(self.match(selection), dtype=dtype, **self.options(selection))

    def rows(self, selection: str) -> int:
        """How many rows carry a target."""
        return int((self.weights(selection) > 0).sum())

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Gradients of query, key and the head's parameters."""
        return torch.autograd.grad(loss, [self.query, self.key, *self.head.parameters()])

    def truth(self, selection: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and gradients in float64 from the readable reference, for exactly these rounded inputs.

        One pair of views at a time, so that it fits into memory: the loss is a sum over them.
        """
        exact = self.to(torch.float64)
        match = replace(self.match(selection), match_weight=self.weights(selection, torch.float64))
        views = self.setting.views
        loss, total = torch.zeros((), dtype=torch.float64, device=self.query.device), None
        for i, j in ((i, j) for i in range(views) for j in range(views) if i != j):
            pairs = torch.zeros(views, views, dtype=torch.bool)
            pairs[i, j] = True
            part = reference_loss(exact, match, pairs=pairs, reduction="sum")
            found = exact.gradients(part)
            total = found if total is None else tuple(a + b for a, b in zip(total, found, strict=True))
            loss = loss + part.detach()
        assert total is not None
        return loss, total

    def to(self, dtype: torch.dtype) -> Case:
        """Return the same values in another precision; the head follows, but stays at least float32."""
        names = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16"}
        head = AlignmentHead(self.setting.heads, kind=self.setting.head).to(self.query.device)
        head.load_state_dict(self.head.state_dict())
        return replace(
            self,
            setting=replace(self.setting, dtype=names[dtype]),
            query=self.query.detach().to(dtype).requires_grad_(),
            key=self.key.detach().to(dtype).requires_grad_(),
            head=head.to(torch.promote_types(dtype, torch.float32)),
        )


def reference_loss(case: Case, match: Correspondence, **options: Any) -> Tensor:
    """The readable reference of the library."""
    return alignment_loss(case.query, case.key, match, case.head, implementation="reference", **options)


def make_case(setting: Setting, device: torch.device | str = "cpu") -> Case:
    """Draw queries, keys and a head, and match the views of a room with a sphere.

    Example:
        >>> case = make_case(Setting(tokens=4, views=3, heads=2))
        >>> case.query.shape, case.rows("all")
        (torch.Size([1, 2, 3, 16, 64]), 96)
    """
    points = torch.cat([_points(setting, turn=37.0 * sample) for sample in range(setting.batch)]).to(device)
    visible = Correspondence.from_point_maps(points, token_grid=setting.tokens)
    # No way back is too long: every token keeps its nearest neighbour in every other view.
    every = Correspondence.from_point_maps(points, token_grid=setting.tokens, cycle_threshold=2.0 * setting.tokens)
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, setting.heads, setting.views, setting.tokens**2, setting.dimension)
    query, key = (
        torch.randn(shape, generator=generator).to(device=device, dtype=getattr(torch, setting.dtype)).requires_grad_()
        for _ in range(2)
    )
    torch.manual_seed(0)
    head = AlignmentHead(setting.heads, kind=setting.head).to(device)
    if setting.dtype == "float64":
        head.double()
    return Case(setting, query, key, head, visible, every)


def _points(setting: Setting, turn: float) -> Tensor:
    """Exact point maps `[1, V, 3, h, w]` of a box room with a sphere, seen from cameras on a circle around it."""
    views, side = setting.views, setting.tokens
    angle = torch.deg2rad(turn + min(SPACING, 360 / views) * torch.arange(views, dtype=torch.float64))
    origin = torch.stack([DISTANCE * angle.sin(), torch.full_like(angle, HEIGHT), -DISTANCE * angle.cos()], dim=-1)
    forward = F.normalize(-origin, dim=-1)
    right = F.normalize(torch.linalg.cross(torch.tensor([0.0, 1, 0]).expand_as(forward).double(), forward), dim=-1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=-2)
    extrinsics = torch.eye(4, dtype=torch.float64).repeat(1, views, 1, 1)
    extrinsics[0, :, :3, :3] = rotation
    extrinsics[0, :, :3, 3] = -(rotation @ origin[..., None]).squeeze(-1)
    intrinsics = torch.tensor([[0.9, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]], dtype=torch.float64)
    room = Room(torch.tensor([SPHERE], dtype=torch.float64), intrinsics.expand(1, views, 3, 3), extrinsics)
    centres = cell_centres((side, side), (side, side), dtype=torch.float64, device="cpu").flatten(0, 1)
    return room.trace(centres, side)[0].mT.unflatten(-1, (side, side)).float()
