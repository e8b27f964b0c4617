"""List the layers of a model in which its views meet, one line each."""

from __future__ import annotations

from torch import nn

from cameo.attention.capture import AttentionLayer
from cameo.backbone import Backbone, unwrap_peft
from cameo.tables import markdown_table

__all__ = ["layer_table", "shown_grids"]

COLUMNS = ("layer", "module", "heads", "tokens per view", "reach", "supervised by cameo.wrap")


def layer_table(adapter: Backbone, model: nn.Module, *, height: int, width: int, num_views: int) -> str:
    """Format the cross-view layers of a model as a Markdown table; below it those that attend within each view.

    Of these there are two kinds, each with the option of `cameo.wrap` that supervises it.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> cat3d = get_backbone("cat3d")
        >>> print(layer_table(cat3d, cat3d.build("tiny").unet, height=64, width=64, num_views=3).splitlines()[2])
        | 0 | down_blocks.1.attentions.0.transformer_blocks.0.attn1 | 4 | 8 x 8 | all | yes |

    Args:
        adapter: adapter of the model's backbone, `cameo.backbone.get_backbone(name)`.
        model: the denoiser.
        height, width: image size in pixels for which the token grids are listed.
        num_views: number of views of a sample, including the reference views.
    """
    core = unwrap_peft(model)
    try:
        default: int | None = adapter.default_layer(core)
    except NotImplementedError:
        default = None
    size = (height, width, num_views)
    rows = [_row(layer, size, layer.index == default, "") for layer in adapter.attention_layers(core)]
    parts = [markdown_table(COLUMNS, rows)]
    if inflatable_layers := adapter.inflatable_layers(core):
        rows = [_row(layer, size, layer.index == default, ", inflate=True") for layer in inflatable_layers]
        parts += [
            "These attend within one view; `inflate=True` lets the chosen one attend across views:",
            markdown_table(COLUMNS, rows),
        ]
    if own_view_layers := adapter.own_view_layers(core):
        rows = [_row(layer, size, layer.index == default, ", own_view=True") for layer in own_view_layers]
        parts += [
            "These attend within one view, which carries the reference in its input channels; `own_view=True` "
            "supervises the chosen one as it is:",
            markdown_table(COLUMNS, rows),
        ]
    return "\n\n".join(parts)


def _row(layer: AttentionLayer, size: tuple[int, int, int], is_default: bool, option: str) -> tuple[str, ...]:
    return (
        f"{layer.index}{' (default)' if is_default else ''}",
        layer.path,
        str(layer.heads),
        shown_grids(layer, *size),
        layer.layout.reach,
        _supervision(layer, size[2], option),
    )


def _supervision(layer: AttentionLayer, num_views: int, option: str) -> str:
    """Say whether and how the layer can be supervised, or why not."""
    per_view, all_views = (layer.layout.refusal(name, num_views) for name in ("per_view", "all_views"))
    if reason := layer.unsupported or (per_view and all_views):
        return f"no: {reason}"
    return f'yes, normalize="all_views": {per_view.partition(";")[0]}' if per_view else f"yes{option}"


def shown_grids(layer: AttentionLayer, height: int, width: int, num_views: int) -> str:
    """Format the token grids of a layer's views for images of `height` x `width` pixels.

    Example:
        >>> from cameo.attention.layout import TokenLayout
        >>> shown_grids(AttentionLayer(0, "attn", 8, TokenLayout("b (v h w)"), stride=8), 64, 96, 3)
        '8 x 12'
    """
    if layer.stride is None:
        return "not known"
    grids = layer.token_grids(height, width, num_views)
    shown = dict.fromkeys(grids)
    if len(shown) == 1:
        return "{} x {}".format(*grids[0])
    return ", ".join("{} x {} ({}x)".format(*grid, grids.count(grid)) for grid in shown)
