"""Checks of the fields of a correspondence, and of what its matches are built from.

Axes: B samples, V views, N tokens of the largest view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from cameo.correspondence.tracks import Tracks
from cameo.errors import ShapeError
from cameo.geometry.grids import TokenGrids, as_grids

__all__ = ["check_fields", "check_threshold", "check_tracks"]


def check_fields(
    index: Tensor, token_grids: TokenGrids, match_weight: Tensor | None, distance: Tensor | None
) -> TokenGrids:
    """Check the fields of a `cameo.Correspondence`, and return its token grids as pairs of integers.

    Values are read on the CPU only: reading them on a GPU would make the host wait in every training step.

    Raises:
        ShapeError, TypeError, ValueError: as `cameo.Correspondence` says.
    """
    for name, tensor in (("index", index), ("match_weight", match_weight), ("distance", distance)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "index"):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}. Cure: torch.from_numpy")
    if index.ndim != 4 or index.shape[1] != index.shape[2]:
        raise ShapeError("index", expected="[B, V, V, N]", got=index.shape)
    if index.dtype != torch.int64:
        raise ValueError(f"index: expected int64, got {index.dtype}. Cure: convert with .long()")
    grids = as_grids("token_grids", token_grids)
    views, tokens = index.shape[2:]
    if len(grids) != views:
        raise ShapeError("token_grids", expected=f"one (h, w) per view, {views}", got=f"{len(grids)}")
    if max(h * w for h, w in grids) != tokens:
        raise ShapeError("index", expected=f"[B, V, V, N] with N of token_grids {grids}", got=index.shape)
    for name, tensor in (("match_weight", match_weight), ("distance", distance)):
        if tensor is not None and tensor.shape != index.shape:
            raise ShapeError(name, expected=str(list(index.shape)), got=tensor.shape)
    # A subclass may be without contents, as in a dry run.
    if index.device.type == "cpu" and index.numel() and type(index) is Tensor:
        _check_values(index, grids, match_weight, distance)
    return grids


def _check_values(index: Tensor, grids: TokenGrids, match_weight: Tensor | None, distance: Tensor | None) -> None:
    counts = [h * w for h, w in grids]
    # One pass over all values; token grids of different sizes add one pass per view.
    low, high = (value.item() for value in index.aminmax())
    if min(counts) < max(counts):
        high = max(int(index[:, :, j].max()) - count for j, count in enumerate(counts)) + max(counts)
    if low < -1 or high >= max(counts):
        raise ValueError("index: holds tokens outside the target view's grid. Cure: use -1 for no match")
    for i, count in enumerate(counts):
        if count < index.shape[-1] and int(index[:, i, :, count:].max()) >= 0:
            raise ValueError("index: matches tokens that are padding. Cure: set them to -1")
    if int(torch.diagonal(index, dim1=1, dim2=2).max()) >= 0:
        raise ValueError("index: matches a view with itself. Cure: set index[:, i, i] to -1")
    if match_weight is not None and not all(0 <= limit.item() < math.inf for limit in match_weight.aminmax()):
        raise ValueError("match_weight: holds negative or NaN or infinite values. Cure: use 0 to leave a match out")
    if distance is not None and not distance.min().item() >= 0:
        raise ValueError("distance: holds negative or NaN values. Cure: use inf where there is no measurement")


def check_threshold(cycle_threshold: float) -> None:
    """Raise `ValueError` unless this is a distance of more than 0 tokens."""
    if not (isinstance(cycle_threshold, Real) and cycle_threshold > 0):
        raise ValueError(f"cycle_threshold: expected more than 0 tokens, got {cycle_threshold}")


def check_tracks(tracks: Sequence[Tracks]) -> int:
    """Return the number of views that the tracks of all samples have.

    Raises:
        ShapeError, TypeError, ValueError: as `cameo.Correspondence.from_tracks` says.
    """
    if not isinstance(tracks, (list, tuple)) or not all(isinstance(one, Tracks) for one in tracks):
        raise TypeError("tracks: expected a list with the cameo.Tracks of each sample. Cure: [tracks] for one sample")
    if not tracks:
        raise ValueError("tracks: expected those of at least one sample, got an empty list")
    if len(views := {one.num_views for one in tracks}) > 1:
        raise ShapeError("tracks", expected="the same num_views in all samples", got=str(sorted(views)))
    return tracks[0].num_views
