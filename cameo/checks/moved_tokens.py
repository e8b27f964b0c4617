"""Change single cells of the views, and see which queries and keys of the supervised layers move.

Axes: B samples, V views, C channels, H W size of what the caller's inputs are made of (pixels or latents), h w token
grid of a view, AB attention batch, K heads, L tokens of the call, D head dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cameo.attention.capture import AttentionCapture, AttentionLayer, CapturedAttention
from cameo.attention.layout import TokenLayout
from cameo.checks.layout_check import CheckedCell, CheckedLayer, LayoutCheck
from cameo.checks.layout_mistakes import (
    LEAST_SHARE,
    MovedTokens,
    Suspect,
    find_mistake,
    share_at,
    shown_in_all,
    tokens_at,
)
from cameo.checks.rerun import CannotTell, random_state_held
from cameo.errors import ShapeError
from cameo.geometry.grids import TokenGrids, as_grids

__all__ = ["check_layouts"]

Inputs = Callable[[Tensor], tuple[Sequence[Any], Mapping[str, Any]]]
SIDES = {"query": "queries", "key": "keys"}
# Cells to be changed, as shares of height and width: at the borders and inside. Few of them keep their number where the
# grid is transposed or its cells are packed.
CELLS = ((0, 1), (0.5, 0.25), (1, 0), (0.25, 0.5), (0.75, 0), (0, 0.5), (1, 1), (0, 0))
LEAST_CELLS, MOST_VIEWS = 12, 8
# A movement tells something if it is larger than the one between two equal forwards, and larger than that of most
# tokens, by these factors.
ABOVE_NOISE, ABOVE_MOST = 10, 1.2


@dataclass(frozen=True)
class _Patch:
    """One cell of one view in the finest token grid of all layers."""

    sample: int
    view: int
    row: int
    column: int
    grid: tuple[int, int]

    def cell(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return row and column of the token that shows it in another grid."""
        row, column = (
            int((at + 0.5) * length / own)
            for at, length, own in zip((self.row, self.column), grid, self.grid, strict=True)
        )
        return row, column

    def change(self, images: Tensor) -> Tensor:
        """Set it to the smallest or the largest value of all images, whichever is farther."""
        changed = images.clone()
        (top, bottom), (left, right) = (
            (math.floor(at * size / own), math.ceil((at + 1) * size / own))
            for at, size, own in zip((self.row, self.column), images.shape[-2:], self.grid, strict=True)
        )
        patch = changed[self.sample, self.view, :, top:bottom, left:right]
        low, high = images.min(), images.max()
        patch[...] = torch.where(patch.mean() > (low + high) / 2, low, high) if high > low else high + 1
        return changed


def check_layouts(
    model: nn.Module,
    core: nn.Module,
    layers: Sequence[AttentionLayer],
    inputs: Inputs | None,
    images: Tensor | None,
    token_grids: TokenGrids | None = None,
) -> LayoutCheck:
    """Do what `CameoModel.check_layout` says, for a module and the layers that were found in it.

    Args:
        model: is called with what `inputs` returns.
        core: the module in which the layers' paths are looked up.
        layers: supervised layers.
        inputs, images, token_grids: as for `CameoModel.check_layout`.
    """
    if inputs is None or images is None:
        return _cannot_tell(layers, "inputs= and images= were not given, so that nothing could be changed")
    if not isinstance(images, Tensor) or images.ndim != 5 or not images.is_floating_point() or not images.numel():
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError("images", expected="floating-point pixels or latents [B, V, C, H, W]", got=got)
    try:
        before, again = (_queries_and_keys(model, core, layers, inputs, images) for _ in range(2))
    except CannotTell as reason:
        return _cannot_tell(layers, str(reason))
    if any(call.samples is not None or call.key_lengths is not None for call in before.values()):
        return _cannot_tell(layers, "the number of tokens differs between samples; give texts of one length")
    grids = [_token_grids(layer, before[layer.path], images, token_grids) for layer in layers]
    layers = [
        dataclasses.replace(layer, layout=_closed(layer.layout, before[layer.path], len(images), of_layer))
        for layer, of_layer in zip(layers, grids, strict=True)
    ]
    moved: list[dict[str, list[MovedTokens]]] = [{side: [] for side in SIDES} for _ in layers]
    for patch in _patches(grids, images):
        after = _queries_and_keys(model, core, layers, inputs, patch.change(images))
        for layer, of_layer, found in zip(layers, grids, moved, strict=True):
            place = (patch.sample, patch.view, *patch.cell(of_layer[patch.view]))
            for side, movement in _movement(before[layer.path], after[layer.path]).items():
                found[side].append(MovedTokens(place, movement))
    return LayoutCheck(
        tuple(
            _answer(layer, found, _movement(before[layer.path], again[layer.path]), len(images), of_layer)
            for layer, found, of_layer in zip(layers, moved, grids, strict=True)
        )
    )


def _cannot_tell(layers: Sequence[AttentionLayer], reason: str) -> LayoutCheck:
    return LayoutCheck(tuple(CheckedLayer(layer.path, layer.layout, words=reason) for layer in layers))


@torch.no_grad()
def _queries_and_keys(
    model: nn.Module, core: nn.Module, layers: Sequence[AttentionLayer], inputs: Inputs, images: Tensor
) -> dict[str, CapturedAttention]:
    """Run the model on these images, with the same random numbers each time."""
    parameter = next(core.parameters(), images)
    with random_state_held(parameter.device):
        args, kwargs = inputs(images)
        with AttentionCapture(core, layers) as captured:
            model(*args, **kwargs)
            return {layer.path: captured.take(layer.path) for layer in layers}


def _movement(before: CapturedAttention, after: CapturedAttention) -> dict[str, Tensor]:
    """How far each query and key moved, `[AB, L]` on the CPU."""
    return {
        side: (getattr(after, side).float() - getattr(before, side).float()).square().sum(dim=(1, 3)).sqrt().cpu()
        for side in SIDES
    }


def _token_grids(
    layer: AttentionLayer, call: CapturedAttention, images: Tensor, given: TokenGrids | None
) -> TokenGrids:
    """Find the token grids with which the layout has the shape of the call."""
    batch, views, _, height, width = images.shape
    candidates = [as_grids("token_grids", given)] if given is not None else []
    if given is None and layer.stride is not None:
        candidates.append(layer.token_grids(height, width, views))
    is_open = None in layer.layout.lengths.values()
    if given is None and not layer.layout.views_with_own_grid(views) and not is_open:
        strides = range(1, max(height, width) + 1)
        candidates += [((-(-height // stride), -(-width // stride)),) * views for stride in strides]
    shapes = [(tensor.shape[0], tensor.shape[2]) for tensor in (call.query, call.key)]
    for grids in candidates:
        layout = _closed(layer.layout, call, batch, grids)
        if [layout.shape(side, batch=batch, token_grids=grids) for side in SIDES] == shapes:
            return grids
    (query_batch, queries), (key_batch, keys) = shapes
    raise ShapeError(
        f"layer {layer.path!r} with {layer.layout!r}",
        expected=f"a token grid of {views} views of {height} x {width} for each of {batch} samples, "
        + (f"token_grids={given}" if given is not None else "given where text is open" if is_open else "one for all"),
        got=f"{queries} queries in {query_batch} rows, {keys} keys in {key_batch}",
        cure="Pass token_grids=, one (h, w) per view, or correct the layout: it has another number of tokens",
    )


def _closed(layout: TokenLayout, call: CapturedAttention, batch: int, token_grids: TokenGrids) -> TokenLayout:
    """The layout with the number of text tokens that this call has, where it is open."""
    names = [name for name, length in layout.lengths.items() if length is None]
    left = call.key.shape[2] - layout.shape("key", batch=batch, token_grids=token_grids)[1]
    if not names or left < 1:
        return layout
    lengths: dict[str, Any] = {**layout.lengths, names[0]: left}
    return TokenLayout(layout.query, layout.key, **layout.view_order.settings(), **lengths)


def _patches(grids: Sequence[TokenGrids], images: Tensor) -> Iterator[_Patch]:
    samples, views = images.shape[:2]
    chosen = sorted({round(number * (views - 1) / (MOST_VIEWS - 1)) for number in range(MOST_VIEWS)})
    per_view = max(2, math.ceil(LEAST_CELLS / len(chosen)))
    for number in range(per_view * len(chosen)):
        view = chosen[number // per_view]
        grid = max((of_layer[view] for of_layer in grids), key=math.prod)
        row, column = (
            round(share * (length - 1)) for share, length in zip(CELLS[number % len(CELLS)], grid, strict=True)
        )
        yield _Patch(number % samples, view, row, column, grid)


def _answer(
    layer: AttentionLayer,
    moved: Mapping[str, Sequence[MovedTokens]],
    noise: Mapping[str, Tensor],
    batch: int,
    token_grids: TokenGrids,
) -> CheckedLayer:
    cells: list[CheckedCell] = []
    mistakes: dict[str, Suspect] = {}
    reasons: list[str] = []
    for side, name in SIDES.items():
        places = layer.layout.places(side, batch=batch, token_grids=token_grids)
        # A view may have keys only.
        known = [one for one in moved[side] if tokens_at(one.place, places, layer.layout).any()]
        if strays := _moved_by_others(moved[side], known, noise[side]):
            words = f"they move with views {strays} alone, which by the layout have no {name}; their order is another"
            mistakes[name] = Suspect("order of views", words, places)
            continue
        try:
            _check_movement(name, known, noise[side])
            cells += [_cell(layer, side, one, places, token_grids) for one in known]
            found = find_mistake(known, layer.layout, side, batch=batch, token_grids=token_grids)
            mistakes |= {name: found} if found is not None else {}
        except CannotTell as reason:
            reasons.append(f"{name}: {reason}")
    kind, words = None, "; ".join(reasons)
    if mistakes:
        (name, first), *others = mistakes.items()
        names = [name, *(other for other, mistake in others if mistake.kind == first.kind)]
        kind, words = first.kind, f"{' and '.join(names)}: {first.words}"
    return CheckedLayer(layer.path, layer.layout, token_grids, tuple(cells), kind, words)


def _moved_by_others(moved: Sequence[MovedTokens], known: Sequence[MovedTokens], noise: Tensor) -> list[int]:
    """Return the views that move tokens although they have none by the layout, if those that have some move none."""
    moving = [one for one in moved if one.movement.max() > ABOVE_NOISE * noise.max()]
    if any(one is other for one in moving for other in known):
        return []
    return sorted({one.place[1] for one in moving})


def _check_movement(name: str, moved: Sequence[MovedTokens], noise: Tensor) -> None:
    """Raise `CannotTell` unless the movements of most cells stand out."""
    largest = torch.stack([one.movement.max() for one in moved])
    middle = torch.stack([one.movement.median() for one in moved])
    if not bool((largest > 0).any()):
        raise CannotTell("no change of a cell moved any; inputs= must use the images that it is given")
    if (largest > ABOVE_NOISE * noise.max()).float().mean() < 0.5:
        raise CannotTell(
            "they move as much between two forwards with the same images; inputs= must return the same for the same "
            "images, so make its generator anew in each call, with a fixed seed"
        )
    if (largest > ABOVE_MOST * middle).float().mean() < 0.5:
        raise CannotTell("the change of one cell moves all alike")


def _cell(layer: AttentionLayer, side: str, moved: MovedTokens, places: Tensor, token_grids: TokenGrids) -> CheckedCell:
    here = tokens_at(moved.place, places, layer.layout)
    share = share_at(moved, places, layer.layout)
    found = divmod(int(moved.movement.argmax()), moved.movement.shape[1])
    found_place = tuple(places[found].tolist())
    of_sample = places[..., 0] == moved.place[0]
    heights, widths = zip(*token_grids, strict=True)
    shown = torch.full((len(token_grids), max(heights), max(widths)), torch.nan)
    shown[places[of_sample][:, 1:].unbind(-1)] = moved.movement[of_sample]
    return CheckedCell(
        of=side,
        place=moved.place,
        expected=None if shown_in_all(moved.place[1], layer.layout) else tuple(here.nonzero()[0].tolist()),
        found=found,
        found_place=None if found_place[0] < 0 else found_place,
        share=share,
        fits=share >= LEAST_SHARE,
        movement=shown,
    )
