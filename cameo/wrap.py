"""`cameo.wrap`: attach CAMEO to a model."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

from cameo.attention.kernel_inputs import KernelInputs
from cameo.attention.layout import TokenLayout
from cameo.backbone import backbones, find_layer, get_backbone, unwrap_peft
from cameo.config import CameoConfig
from cameo.errors import as_integer, unknown_name
from cameo.model import CameoModel, attach
from cameo.renamed import old_keywords
from cameo.wrapped import check_plain

if TYPE_CHECKING:
    from cameo.probing.layer_probe import LayerProbe

__all__ = ["CameoModel", "attach", "wrap"]

logger = logging.getLogger(__name__)

Layouts = TokenLayout | str | Sequence[TokenLayout | str] | None
Found = tuple[list[str], list[TokenLayout]]


@old_keywords
def wrap(
    model: nn.Module,
    backbone: str | None = None,
    layer: int | str | Sequence[int | str] | None = None,
    *,
    probe: LayerProbe | None = None,
    head: str | Mapping[str, Any] = "mlp",
    weight: float = CameoConfig.weight,
    layout: Layouts = None,
    normalize: str | Sequence[str] | None = None,
    reduction: str = CameoConfig.reduction,
    num_reference_views: int | None = None,
    heads: int | None = None,
    stride: int | None = None,
    kernel_call: int | None = None,
    kernel_inputs: KernelInputs | Mapping[str, Any] | None = None,
    inflate: bool = False,
    own_view: bool = False,
    softness: float = CameoConfig.softness,
    implementation: str = "auto",
    gelu: str = "exact",
    max_queries: int | None = None,
) -> CameoModel:
    """Attach CAMEO to `model` in place: the returned module holds `model` itself, not a copy.

    Example:
        >>> import torch
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("cat3d").build("tiny").unet
        >>> model = wrap(unet, backbone="cat3d")
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # after wrap, which adds the alignment head
        >>> model.unwrap() is unet
        True

    Build the optimizer after `wrap`: one that was built before does not hold the parameters of the alignment head, so
    that the head keeps its initial weights, which a warning says after ten steps. `recipes/minimal_loop.py` is a
    complete training loop, `docs/guides/your_own_loop.md` adds CAMEO to an existing script.

    Args:
        model: the denoiser of a multi-view diffusion model, before or after LoRA was added to it.
        backbone: name of an adapter (`cameo.backbones()` lists them), or None with `layer=` and `layout=`.
        layer: None for the adapter's default; an index among the cross-view attention layers in execution
            order; a dotted module path; a list of these, whose losses are averaged; or "auto" for the best layer of
            `probe`, whose ranking is then kept in `model.cameo_config.layer_choice`.
        probe: what `cameo.probe_layers` found on this model; for `layer="auto"` only.
        head: `"mlp"`, `"mean"`, `"none"`, or the keyword arguments of `AlignmentHead`, as
            `{"kind": "mlp", "depth": 2}`.
        weight: factor of the alignment loss; kept as `model.weight` for the caller's training loop.
        layout: token layout of the layers, or a list with one for each, for a model without an adapter;
            `CameoModel.check_layout` checks it.
        normalize: see `cameo.alignment_loss`, or a list with one for each layer; None is "per_view", and "all_views"
            for layers that let a query see one token per view.
        reduction, num_reference_views: see `cameo.alignment_loss`.
        heads: attention heads, for a model without an adapter whose attention module has no
            `heads`/`num_heads`.
        stride: image pixels per token side, for a model without an adapter; only `token_grid` needs it.
        kernel_call: which call of the attention kernel mixes the views, counted from 0, for a model without an
            adapter whose attention module calls it several times.
        kernel_inputs: where the queries and keys are found in the layers of a model without an adapter that attends by
            a kernel which `cameo` does not know, see `cameo.attention.KernelInputs`; or its arguments as a mapping.
        softness: see `cameo.alignment_loss`.
        implementation, gelu, max_queries: see `cameo.alignment_loss`; kept as `model.implementation`, `model.gelu` and
            `model.max_queries` (for training alone), not saved.
        inflate: let layers that see one view each attend across views, and supervise those. The weights stay,
            but inference changes, also after `unwrap()`: `layer` then counts the layers that can be inflated.
        own_view: supervise layers that see one view each as they are, for a model that carries the reference in the
            input channels of every view: the match of a token in the reference view is also a token of its own view,
            see `TokenLayout(own_view_shows=)`. Nothing changes at inference; `layer` then counts these layers.

    Raises:
        ValueError: for an unknown backbone, layer or option, a model the adapter does not recognize, a model that
            is wrapped already, or `layer="auto"` without a probe of this kind of model.

    Source: CAMEO, arXiv 2512.03045, section 4.
    """
    if not isinstance(model, nn.Module):
        cure = "pass its denoiser (pipeline.unet)" if hasattr(model, "unet") else "pass the denoiser itself"
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}; {cure}")
    check_plain(model, CameoModel)
    choice = _probed_choice(layer, probe, backbone, {"inflate": inflate, "own_view": own_view})
    layer = layer if choice is None else choice["layer"]
    if not isinstance(head, str | Mapping):
        raise TypeError(f"head: expected its kind or the keyword arguments of AlignmentHead, got {head!r}")
    if not isinstance(kernel_inputs, KernelInputs | Mapping | None):
        raise TypeError(f"kernel_inputs: expected a KernelInputs or its keyword arguments, got {kernel_inputs!r}")
    if isinstance(kernel_inputs, Mapping):
        kernel_inputs = KernelInputs.from_mapping(kernel_inputs)
    config = CameoConfig(
        backbone=backbone,
        layers=[],
        head={"kind": head} if isinstance(head, str) else dict(head),
        weight=weight,
        reduction=reduction,
        num_reference_views=num_reference_views,
        heads=heads,
        stride=stride,
        kernel_call=kernel_call,
        kernel_inputs=None if kernel_inputs is None else kernel_inputs.to_dict(),
        inflate=inflate,
        own_view=own_view,
        softness=softness,
        layer_choice=choice,
    )
    wanted = _wanted_layers(layer)
    if layer is not None and not wanted:
        raise ValueError("layer: got an empty list; name at least one layer, or None for the backbone's default")
    find = _layers_of_description if backbone is None else _layers_of_backbone
    config.layers, layouts = find(unwrap_peft(model), config, wanted, layout)
    if normalize is None:
        normalize = ["all_views" if layout.reach == "cell" else "per_view" for layout in layouts]
    if not isinstance(normalize, str | list | tuple):
        raise TypeError(f"normalize: expected a name, or a list with one for each layer, got {normalize!r}")
    each = [normalize] * len(layouts) if isinstance(normalize, str) else list(normalize)
    config.normalize = each[0] if len(each) == len(layouts) and len(set(each)) == 1 else each
    if len(set(config.layers)) != len(config.layers):
        raise ValueError(f"layer: the same layer is named twice in {wanted}")
    return attach(model, config, implementation=implementation, gelu=gelu, max_queries=max_queries)


def _layers_of_description(core: nn.Module, config: CameoConfig, wanted: Sequence[int | str], layout: Layouts) -> Found:
    """Check the layers of a model without an adapter; returns their paths and layouts, and notes the layouts."""
    if not wanted or layout is None:
        raise ValueError(
            "backbone=None needs layer= (a module path) and layout= (for example 'b (v h w)'); "
            "or name a backbone: " + ", ".join(backbones())
        )
    if config.inflate:
        raise ValueError("inflate=True needs an adapter that knows how to; join the views in your model yourself")
    if config.own_view:
        raise ValueError(
            "own_view=True needs an adapter that knows which layers; without one say it in the layout, "
            'layout=TokenLayout("(b v) (h w)", own_view_shows=0)'
        )
    layouts = _layouts(layout, len(wanted))
    _mention_the_check()
    if len(set(layouts)) == 1:
        config.layout = layouts[0].to_dict()
    else:
        config.layouts = [one.to_dict() for one in layouts]
    return [_module_path(core, path) for path in wanted], layouts


@cache
def _mention_the_check() -> None:
    """Say once in a process how a description is proved, since attention itself cannot know whether it is right."""
    logger.info("a layout is taken as described; model.check_layout(inputs, images) proves it on the model")


def _layouts(given: object, count: int) -> list[TokenLayout]:
    """Return the layout of each of so many layers."""
    layouts: list[TokenLayout] = []
    for layout in given if isinstance(given, list | tuple) else [given] * count:
        if not isinstance(layout, str | TokenLayout):
            raise TypeError(f"layout: expected a cameo.TokenLayout or a pattern such as 'b (v h w)', got {layout!r}")
        layouts.append(TokenLayout(layout) if isinstance(layout, str) else layout)
    if len(layouts) != count:
        raise ValueError(f"layout: expected one for all layers or one for each of {count}, got {len(layouts)}")
    return layouts


def _layers_of_backbone(core: nn.Module, config: CameoConfig, wanted: Sequence[int | str], layout: Layouts) -> Found:
    """Find layers by an adapter; returns their paths and layouts."""
    backbone = str(config.backbone)
    if not layout is config.heads is config.stride is config.kernel_call is config.kernel_inputs is None:
        raise ValueError(
            "layout=, heads=, stride=, kernel_inputs= and kernel_call= describe a model without an adapter; "
            f"{backbone!r} knows them"
        )
    adapter = get_backbone(backbone)
    if not adapter.recognizes(core):
        raise ValueError(f"backbone {backbone!r} does not fit: {adapter.explain_mismatch(core)}")
    config.check()
    layers = adapter.layers_for(core, inflate=config.inflate, own_view=config.own_view)
    if config.inflate and not layers:
        raise ValueError(f"inflate=True: {backbone!r} has no layer that sees one view each and could be inflated")
    if config.own_view and not layers:
        raise ValueError(f"own_view=True: {backbone!r} does not carry the reference in the input channels of each view")
    chosen = [find_layer(layers, name) for name in wanted or [adapter.default_layer(core)]]
    config.layouts = [layer.layout.to_dict() for layer in chosen]
    return [layer.path for layer in chosen], [layer.layout for layer in chosen]


def _wanted_layers(layer: object) -> list[int | str]:
    """List the layers that a caller names, integers of any type as Python's; what is no layer is refused later."""
    if layer is None:
        return []
    if isinstance(layer, str) or not isinstance(layer, Iterable) or getattr(layer, "ndim", 1) == 0:
        layer = [layer]  # a number of numpy or torch has no dimension
    names = list(layer)
    for place, name in enumerate(names):
        with contextlib.suppress(ValueError):
            names[place] = as_integer("layer", name)
    return names


def _probed_choice(
    layer: int | str | Sequence[int | str] | None, probe: LayerProbe | None, backbone: str | None, way: dict[str, bool]
) -> dict[str, Any] | None:
    """Return the ranking behind `layer="auto"`; None for a layer that the caller names."""
    if not isinstance(layer, str) or layer != "auto":
        if probe is not None:
            raise ValueError(f'probe: is for layer="auto", got layer={layer!r}; leave one of them out')
        return None
    if probe is None:
        raise ValueError(
            'layer="auto": expected probe=, what cameo.probe_layers(pipeline, batches) found on this model, got None; '
            "or name a layer"
        )
    probed = {name: getattr(probe, name) for name in way}
    if (probe.backbone, probed) != (backbone, way):
        of_probe, wanted = (
            " and ".join(
                f"{name}={value}" for name, value in of.items() if name == "inflate" or probed[name] != way[name]
            )
            for of in (probed, way)
        )
        raise ValueError(
            f"probe: is of backbone={probe.backbone!r} with {of_probe}, expected backbone={backbone!r} "
            f"with {wanted}; probe the layers that are to be chosen from"
        )
    best = probe.layer(probe.best)
    skill = next(
        place.interval[0] if place.interval else place.skill for place in probe.ranking if place.path == best.path
    )
    if skill <= 0:
        warnings.warn(
            f'layer="auto": {best.path} is the best of the probe, but the probe does not show that its attention finds '
            "the true match more often than chance. Probe a trained model, or more scenes, or name the layer",
            stacklevel=4,  # past the decorator of `wrap`
        )
    return probe.choice()


def _module_path(core: nn.Module, layer: int | str) -> str:
    """Check the module path of a layer of a model without an adapter."""
    paths = [name for name, _ in core.named_modules()]
    if not isinstance(layer, str):
        raise TypeError(f"layer: without a backbone expected a dotted module path, got {layer!r}")
    if layer not in paths:
        raise unknown_name("layer", layer, [path for path in paths if "att" in path.lower()] or paths)
    return layer
