"""Which tokens of which views a query sees, where the attention of a layer is masked.

Axes: A rows of the attention batch, K heads, L query tokens, M key tokens, B samples, V views, N tokens per view.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cameo.attention.capture import AttentionLayer, CapturedAttention, several_calls
from cameo.attention.kernels.call import kept_tokens
from cameo.attention.layouts.open_segment import lengths_of_rows
from cameo.errors import CaptureError, ShapeError
from cameo.geometry.grids import TokenGrids

if TYPE_CHECKING:
    from cameo.correspondence import Correspondence

__all__ = ["lengths_of_call", "split_call", "visible_tokens", "without_hidden_matches"]


def split_call(
    layer: AttentionLayer,
    seen: CapturedAttention,
    match: Correspondence,
    normalize: str,
    local: Correspondence | None = None,
) -> tuple[Tensor, Tensor, Correspondence, Tensor | None]:
    """Split a captured call by sample and view, as `cameo.alignment_loss` takes it.

    Args:
        layer: the layer.
        seen: its captured call.
        match: the matches of the views.
        normalize: see `cameo.alignment_loss`.
        local: `layer.layout.localize(match)` where it is known.

    Returns:
        Query and key `[B', K, V, N', D]`, the matches there, and which keys each query sees, bool `[B', V, N', V, N']`,
        or None where that need not be known, see `without_hidden_matches`.

    Raises:
        CaptureError: the call was put together from those of several samples, and the matches have another number of
            them; or its mask cannot be read.
        ShapeError: the call has another shape than the layout and the matches.
    """
    match = match.to(seen.query.device)
    if seen.samples not in (None, match.batch_size):
        raise several_calls(layer.path, seen.samples)
    batch, grids = match.batch_size, match.token_grids
    query_lengths, key_lengths = lengths_of_call(layer, seen)
    try:
        query = layer.layout.split_query(seen.query, batch=batch, token_grids=grids, lengths=query_lengths)
        key = layer.layout.split_key(seen.key, batch=batch, token_grids=grids, lengths=key_lengths)
    except ShapeError as error:
        cure = ""
        if layer.kernel_call is not None and seen.query.shape[0] == 1 < batch:
            cure = ". If the module calls its kernel once for each sample, leave kernel_call= out: they are joined"
        error.args = (f"layer {layer.path!r} with {layer.layout!r}: {error}{cure}",)
        raise
    visible = visible_tokens(layer, seen, batch=batch, token_grids=grids)
    local = layer.layout.localize(match) if local is None else local
    local, visible = without_hidden_matches(local, visible, normalize)
    return query, key, local, visible


def lengths_of_call(layer: AttentionLayer, seen: CapturedAttention) -> tuple[Tensor | None, Tensor | None]:
    """Return how many query and key tokens of each row are no padding, `[A]` each; None where all are.

    The kernel tells, or a mask that hides the end of each row, if the layout has text of open length before its views:
    they then follow directly on a text that is shorter in some samples (Lumina 2).
    """
    if seen.key_lengths is not None or seen.mask is None or not layer.layout.text_before_views:
        return seen.query_lengths, seen.key_lengths
    kept = _per_row(layer, seen)
    lengths = lengths_of_rows(kept[:, 0] > 0) if kept.shape[1] == 1 else None
    return lengths, lengths


def visible_tokens(
    layer: AttentionLayer, seen: CapturedAttention, *, batch: int, token_grids: TokenGrids
) -> Tensor | None:
    """Return which keys each query sees, bool `[B', V, N', V, N']` in the form of `TokenLayout.split_query`.

    None where every token of a view sees all tokens of all views: a mask that hides only tokens of no view, such as
    text, changes nothing, since the alignment loss compares the tokens of views. Where all queries of a sample see the
    same keys the query axes have length 1. Keys that are padding of a shorter view count as seen.

    Args:
        layer: the layer, for its token layout.
        seen: its captured call.
        batch: B, number of samples.
        token_grids: token grid `(h, w)` of each view, as `Correspondence.token_grids`.

    Raises:
        CaptureError: the mask differs between heads, or between queries in a layout whose batch part is not `b`; or it
            is added to the logits and weighs some tokens of views more than others.
    """
    if seen.mask is None:
        return None
    kept = _per_row(layer, seen)
    query_lengths, key_lengths = lengths_of_call(layer, seen)
    layout = layer.layout

    def split_keys(hidden: Tensor) -> Tensor:
        return layout.split_key(hidden, batch=batch, token_grids=token_grids, lengths=key_lengths)

    _check_bias(layer, seen, split_keys)
    hidden = (1 - kept).transpose(1, 2)[:, None]  # [A, 1, M, L or 1]; padding becomes 0, which is seen
    if hidden.shape[-1] == 1:
        visible = (split_keys(hidden) == 0)[:, 0, None, None, :, :, 0]
    else:
        if not layout.folds_nothing:
            raise CaptureError(
                f"layer {layer.path!r} with {layout!r} hides other keys from each query; that can be read where "
                "samples alone are in the batch part of the layout. Hide the same keys from all queries of a row, or "
                'supervise a layer that attends as "b (v h w)"'
            )
        of_keys = split_keys(hidden)
        views, tokens = of_keys.shape[2:4]
        of_queries = of_keys[:, 0].flatten(1, 2)[..., None]  # keys in the place of heads
        both = layout.split_query(of_queries, batch=batch, token_grids=token_grids, lengths=query_lengths)
        visible = (both[..., 0] == 0).unflatten(1, (views, tokens)).permute(0, 3, 4, 1, 2)
    return None if bool(visible.all()) else visible


def without_hidden_matches(
    correspondence: Correspondence, visible: Tensor | None, normalize: str
) -> tuple[Correspondence, Tensor | None]:
    """Remove the matches whose key their query does not see, and tell what the softmax of the others has to leave out.

    Example:
        >>> from cameo import Correspondence
        >>> index = torch.full((1, 2, 2, 2), -1)
        >>> index[0, 0, 1], index[0, 1, 0] = torch.tensor([0, 1]), torch.tensor([0, 1])
        >>> match = Correspondence(index, token_grids=((1, 2), (1, 2)))
        >>> visible = torch.ones(1, 1, 1, 2, 2, dtype=torch.bool)
        >>> visible[..., 0, 1] = False  # token 1 of view 0
        >>> left, partly = without_hidden_matches(match, visible, "per_view")
        >>> left.index[0, 1, 0].tolist(), partly is None
        ([0, -1], False)

    Returns:
        The matches, and `visible` in full, or None where the queries of all matches see whole views (with
        normalize="all_views": all other views).
    """
    if visible is None:
        return correspondence, None
    index = correspondence.index
    batch, views, _, tokens = index.shape
    whole = visible.expand(batch, views, tokens, views, tokens)
    seen = whole.transpose(2, 3).gather(4, index.clamp(min=0)[..., None])[..., 0]
    index = index.where(seen, -1)
    all_seen = whole.all(dim=-1).transpose(2, 3)  # [B, query view, key view, N]
    if normalize == "all_views":
        same_view = torch.eye(views, dtype=torch.bool, device=index.device)[:, :, None]
        all_seen = (all_seen | same_view).all(dim=2, keepdim=True)
    partly = bool(((index >= 0) & ~all_seen).any())
    return dataclasses.replace(correspondence, index=index), whole if partly else None


def _check_bias(layer: AttentionLayer, seen: CapturedAttention, split_keys: Callable[[Tensor], Tensor]) -> None:
    """Refuse what is added to the logits, unless a query has the same number for all tokens of views that it sees.

    The softmax over tokens of views is the same with it: Chroma's pipeline adds 1 to all keys but the text's padding.
    """
    assert seen.mask is not None
    mask = seen.mask[(None,) * (4 - seen.mask.ndim)]
    kept = kept_tokens(mask)
    if mask.dtype == torch.bool or not bool(((mask != 0) & kept).any()):
        return
    rows, keys = seen.query.shape[0], seen.key.shape[2]
    bias, is_seen = (x.expand(rows, -1, -1, keys).transpose(2, 3) for x in (mask.where(kept, 0), kept.to(mask.dtype)))
    if layer.layout.folds_nothing:
        bias, unseen = split_keys(bias), split_keys(is_seen) == 0  # padding of a shorter view is unseen too
        least, most = (
            bias.masked_fill(unseen, torch.inf).amin((2, 3)),
            bias.masked_fill(unseen, -torch.inf).amax((2, 3)),
        )
        if not bool((least < most).any()):
            return
    raise CaptureError(
        f"layer {layer.path!r} adds a bias to its attention that does not only hide tokens; its logits are more than a "
        "multiple of q.k and cannot be supervised. Switch that off in the model, or supervise a layer without it"
    )


def _per_row(layer: AttentionLayer, seen: CapturedAttention) -> Tensor:
    """Bring a mask to `[A, L or 1, M]`, as uint8."""
    assert seen.mask is not None
    kept = kept_tokens(seen.mask)
    kept = kept[(None,) * (4 - kept.ndim)]
    if kept.shape[1] > 1:
        if not bool((kept == kept[:, :1]).all()):
            raise CaptureError(
                f"layer {layer.path!r} hides other keys in each head, which cannot be supervised; use one mask for all "
                "heads, or supervise another layer"
            )
        kept = kept[:, :1]
    if kept.shape[2] > 1 and bool((kept == kept[:, :, :1]).all()):
        kept = kept[:, :, :1]
    rows, keys = seen.query.shape[0], seen.key.shape[2]
    return kept[:, 0].expand(rows, -1, keys).to(torch.uint8)
