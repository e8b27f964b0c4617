"""Attentions of other U-Nets of CAT3D's form that join the views themselves, recognized by what they do.

The U-Nets of MVGenMaster and of CAMEO's authors are copies of diffusers whose attention processors take the number of
views. Nothing of them is imported, and no name of a class or argument counts: an attention is tried on two samples.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cameo.attention.capture import AttentionCapture, AttentionLayer
from cameo.attention.layout import TokenLayout
from cameo.checks.rerun import left_as_it_was

__all__ = ["Joining", "came_apart", "find_joining", "joins_by_itself", "layers_apart"]

LAYOUT = TokenLayout("b (v h w)")
TOKENS = 4  # a square, for attentions that look at rows of it
MOST_VIEWS = 64
# Arguments of every attention of diffusers and of its processors, none of which is a number of views.
COMMON = {"self", "attn", "hidden_states", "encoder_hidden_states", "attention_mask", "temb", "scale"}


class Joining(NamedTuple):
    """How an attention was made to join the views: a number of views, and the arguments that tell it, if any does."""

    views: int
    options: dict[str, int]


# Of each attention that was tried: the processor it had, how it joined with that one, and whether it ever joined.
_seen: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Joining | None, bool]] = weakref.WeakKeyDictionary()


def find_joining(attention: nn.Module) -> Joining | None:
    """Return how an attention joins the views of a sample, or None if it does not join them as `b (v h w)`.

    It is tried anew only when its processor is another one.

    Example:
        >>> class Joined(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.heads, self.to_q, self.to_k, self.to_v = 2, *(nn.Linear(8, 8) for _ in "qkv")
        ...     def forward(self, x, count=1):
        ...         rows = x.reshape(len(x) // count, -1, 8)
        ...         q, k, v = (f(rows).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        ...         return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        >>> find_joining(Joined())
        Joining(views=2, options={'count': 2})

    Args:
        attention: called with the hidden states `[(B V), N, C]` of `C = attention.to_q.in_features` channels.
    """
    processor = getattr(attention, "processor", None)
    known = _seen.get(attention)
    if known is None or known[0] is not processor:
        joining = _try(attention, processor)
        known = _seen[attention] = (processor, joining, joining is not None or (known is not None and known[2]))
    return known[1]


def joins_by_itself(attentions: Mapping[str, nn.Module]) -> bool:
    """Whether the views of a sample meet in some of these attentions, by a way of their own."""
    return any(find_joining(attention) is not None for attention in attentions.values())


def layers_apart(attentions: Mapping[str, nn.Module]) -> dict[str, str]:
    """Reasons, by path, of the attentions within a view, where others join the views by a way of their own."""
    if not joins_by_itself(attentions):
        return {}
    return {path: "it sees one view at a time" for path, one in attentions.items() if find_joining(one) is None}


def came_apart(attentions: Mapping[str, nn.Module]) -> str | None:
    """Say which attention does not join the views any more, with the processor that was set, and the cure."""
    for path, attention in attentions.items():
        if attention in _seen and find_joining(attention) is None and _seen[attention][2]:
            return (
                f"the self-attention {path} joined the views until its processor was replaced by a "
                f"{type(attention.processor).__name__}, with which it sees one view at a time. Set the former "
                "processor again, or one that joins the views"
            )
    return None


def _try(attention: nn.Module, processor: Any) -> Joining | None:
    width = getattr(getattr(attention, "to_q", None), "in_features", None)
    parameter = next(attention.parameters(), None)
    if not isinstance(width, int) or parameter is None or parameter.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    with left_as_it_was(attention):
        attention.eval()
        for way in _ways(attention, processor):
            tokens = torch.randn(2 * way.views, TOKENS, width, generator=generator).to(parameter)
            if _joins(attention, tokens, way):
                return way
    return None


def _ways(attention: nn.Module, processor: Any) -> Iterator[Joining]:
    """What may tell the number of views: each argument that is the attention's own, or a number that it holds."""
    functions = [type(attention).forward, *([] if processor is None else [type(processor).__call__])]
    arguments = {name: one for function in functions for name, one in inspect.signature(function).parameters.items()}
    for name, argument in arguments.items():
        if argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY) and name not in COMMON:
            yield Joining(2, {name: 2})
    held = {value for value in vars(processor or attention).values() if type(value) is int}
    yield from (Joining(views, {}) for views in sorted(held) if 1 < views <= MOST_VIEWS)


def _joins(attention: nn.Module, tokens: Tensor, way: Joining) -> bool:
    """Whether a change of one token, in view 1 of the first sample, moves its query in `b (v n)` and all its sample."""
    changed = tokens.clone()
    changed[1, 1] += 1
    queries, outputs = [], []
    try:
        layer = AttentionLayer(0, "0", int(attention.heads), LAYOUT)  # type: ignore[arg-type]
        for given in (tokens, changed):
            with AttentionCapture(nn.Sequential(attention), [layer]) as captured:
                outputs.append(attention(given, **way.options))
            queries.append(captured["0"].query)
        moved = (queries[0] != queries[1]).any(dim=(1, 3)).cpu()
        reached = (outputs[0] != outputs[1]).any(dim=2).cpu()
    except Exception:  # whatever an attention of others raises for a call that it is not made for
        return False
    expected = torch.zeros(2, way.views * TOKENS, dtype=torch.bool)
    expected[0, TOKENS + 1] = True
    everywhere = torch.zeros(2 * way.views, TOKENS, dtype=torch.bool)
    everywhere[: way.views] = True
    return torch.equal(moved, expected) and torch.equal(reached, everywhere)
