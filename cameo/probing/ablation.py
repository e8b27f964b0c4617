"""The causal check of a layer: what the model loses when the queries of that layer alone see no other view.

A layer may look at the right place without the model using it, and the other way round. So beside the share of
matches that a layer finds (`cameo.probe_layers`) stands what its cross-view attention is worth: the model is measured
whole and then with one layer at a time cut to self-view attention, on the same samples and noise.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from cameo.attention.capture import AttentionLayer
from cameo.attention.self_view import cut_other_views
from cameo.backbone import get_backbone, unwrap_peft
from cameo.data import MultiViewSample, collate
from cameo.data.batches import layer_grids
from cameo.errors import unknown_name
from cameo.geometry.grids import TokenGrids
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline
from cameo.probing.bootstrap import paired_bootstrap, scene_of
from cameo.probing.denoising import DenoisingErrors, ValidationSettings, measure_denoising
from cameo.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerEffect", "QualityLoss", "effects_figure", "effects_table", "perturb_layers", "self_view_only"]

# Title and digits of each metric in a table.
METRICS = {"psnr_covisible": ("PSNR covisible (dB)", 2), "psnr_all": ("PSNR all (dB)", 2), "loss": ("loss", 4)}
Values = dict[str, dict[str, float]]  # metric to scene to value


class QualityLoss(NamedTuple):
    """What a cut costs, mean over scenes, and the ends of its 95 % interval; above 0 the cut model is worse."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class LayerEffect:
    """What the model loses without the cross-view attention of one layer.

    Attributes:
        index: position of the layer among those of its kind in execution order.
        path: dotted path of the attention module.
        loss: denoising loss of the cut model, mean over noise levels and scenes.
        psnr_covisible: its PSNR in dB at high noise on target pixels that a reference sees; None without references,
            or where fewer than two scenes have such pixels.
        psnr_all: its PSNR in dB at high noise on all target pixels.
        drop_loss: by how much the cut model's loss is higher.
        drop_psnr_covisible, drop_psnr_all: by how many dB its PSNR is lower.
        per_scene: metric ("loss", "psnr_covisible", "psnr_all") to scene to what the cut costs there, for a paired
            comparison of two layers.
        reason: why the layer was not cut, or what cannot be measured without it; everything above is then None or
            empty.
    """

    index: int
    path: str
    loss: float | None = None
    psnr_covisible: float | None = None
    psnr_all: float | None = None
    drop_loss: QualityLoss | None = None
    drop_psnr_covisible: QualityLoss | None = None
    drop_psnr_all: QualityLoss | None = None
    per_scene: Values = field(default_factory=dict)
    reason: str | None = None


@contextmanager
def self_view_only(model: nn.Module, layer: AttentionLayer, token_grids: TokenGrids) -> Iterator[None]:
    """Cut one layer's view of the other views: inside the block its queries see the keys of their own view only.

    Example:
        >>> import torch
        >>> from cameo.attention.layout import TokenLayout
        >>> class Attention(nn.Module):
        ...     def forward(self, x):
        ...         return nn.functional.scaled_dot_product_attention(x, x, x)
        >>> model = nn.Sequential(Attention())
        >>> layer = AttentionLayer(0, "0", heads=1, layout=TokenLayout("b (v h w)"))
        >>> x = torch.randn(1, 1, 8, 4)  # two views of 2 x 2 tokens
        >>> with self_view_only(model, layer, token_grids=((2, 2), (2, 2))):
        ...     cut = model(x)
        >>> torch.equal(cut, torch.cat([model(x[:, :, :4]), model(x[:, :, 4:])], dim=2))
        True

    - Where each query reaches one token per view (temporal layers), it sees itself alone.
    - Keys that no query belongs to, such as Zero123++'s reference image, are seen by none. Its write pass, in which
      the reference looks at itself, stays as it is.
    - Tokens of no view, such as text, are seen by all, and see all.

    The kernel is the model's own, called once per view; in explicit attention the logits of other views become -inf
    before the softmax. Weights and modules are not touched: outside the block the output is what it was, bit for bit.
    Only the thread that entered the block is affected. An `AttentionCapture` opened inside the block sees the queries
    and keys of all views. Meant for measuring: a backward pass through checkpointed layers would recompute the layer
    whole once the block is left.

    Args:
        model: a `CameoModel`, or the model that holds the layer.
        layer: one of the adapter's layers, or of `CameoModel.attention_layers`.
        token_grids: token grid `(h, w)` of each view, as `layer.token_grids(height, width, num_views)`.

    Raises:
        CaptureError: in the forward, if a call has other numbers of tokens than `token_grids` say, is masked, or the
            module calls the kernel several times without `layer.kernel_call`; on leaving the block, if the layer did
            not run, or runs a kernel that is not known (see `AttentionCapture`).
        ValueError: if the token_grids do not fit the layout.
    """
    base = model.base_model if isinstance(model, CameoModel) else model
    with cut_other_views(unwrap_peft(base), layer, token_grids):
        yield


def perturb_layers(
    model: CameoModel,
    pipeline: MultiViewPipeline,
    data: Dataset[MultiViewSample],
    settings: ValidationSettings,
    layers: Sequence[int | str] | None = None,
) -> list[LayerEffect]:
    """Measure the model whole, then with one layer at a time cut to self-view attention (see `self_view_only`).

    Example:
        >>> import tempfile
        >>> from cameo import wrap
        >>> from cameo.backbone import get_backbone
        >>> from cameo.data import EmbeddedScenes, MultiViewDataset
        >>> pipeline = get_backbone("cat3d").build("tiny", image_size=32)
        >>> settings = ValidationSettings(num_samples=2, noise_levels=(1.0,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     scenes = EmbeddedScenes(num_scenes=2, size=(32, 32), cache_dir=folder, progress=False)
        ...     data = MultiViewDataset(scenes, num_views=2)
        ...     effects = perturb_layers(wrap(pipeline.unet, "cat3d"), pipeline, data, settings, layers=[1, 3])
        >>> [(effect.index, effect.drop_psnr_all.low <= effect.drop_psnr_all.mean) for effect in effects]
        [(1, True), (3, True)]

    The model is not changed. Scenes are drawn anew for the intervals; samples of one scene are averaged first. Costs
    one validation per layer and one more.

    Args:
        model: a wrapped model; which layer it supervises does not matter.
        pipeline: that of the model.
        data: samples of one image size and number of views, of two scenes at least.
        settings: samples, noise levels and noise.
        layers: indices into the adapter's layers (`CameoModel.attention_layers`), or paths. None: all cross-view
            layers, those that `inflate=True` joined first.

    Returns:
        One effect per layer, in the order of `layers`. A layer that cannot be cut is there with its `reason`.

    Raises:
        ValueError: for an unknown layer; if the samples are of one scene only.
        DataError, CaptureError: as `cameo.probing.denoising.measure_denoising` and `self_view_only`.
    """
    attention_layers = _cross_view_sites(model)
    chosen = attention_layers if layers is None else [_find(model, attention_layers, layer) for layer in layers]
    whole = _by_scene(measure_denoising(model, pipeline, data, settings), settings)
    if len(whole["loss"]) < 2:
        raise ValueError(
            f"data: expected samples of at least 2 scenes, got {len(whole['loss'])} ({', '.join(whole['loss'])}); one "
            "scene says nothing about others. Raise num_samples"
        )
    first = collate([data[0]])
    effects = []
    for attention_layer in chosen:
        if attention_layer.unsupported:
            effects.append(LayerEffect(attention_layer.index, attention_layer.path, reason=attention_layer.unsupported))
            continue
        with self_view_only(model, attention_layer, layer_grids(attention_layer, first)):
            cut = measure_denoising(model, pipeline, data, settings)
        effects.append(_effect(attention_layer, whole, _by_scene(cut, settings)))
    return effects


def _cross_view_sites(model: CameoModel) -> list[AttentionLayer]:
    if not (model.cameo_config.inflate and model.cameo_config.backbone):
        return model.attention_layers
    others = get_backbone(model.cameo_config.backbone).attention_layers(unwrap_peft(model.base_model))
    return [*model.supervised_layers, *others]


def _find(model: CameoModel, attention_layers: Sequence[AttentionLayer], layer: int | str) -> AttentionLayer:
    by_name: dict[int | str, AttentionLayer] = {
        attention_layer.path: attention_layer for attention_layer in attention_layers
    }
    by_name |= {
        attention_layer.index: attention_layer
        for attention_layer in model.attention_layers
        if attention_layer.path in by_name
    }
    if layer not in by_name:
        raise unknown_name("layer", layer, map(str, by_name))
    return by_name[layer]


def _by_scene(errors: DenoisingErrors, settings: ValidationSettings) -> Values:
    """Mean of each scene's samples; samples without a value (NaN) do not count."""
    values = {
        "loss": errors.sample_losses(settings.noise_levels),
        "psnr_covisible": errors.sample_psnr(errors.squared_covisible, settings.high_levels),
        "psnr_all": errors.sample_psnr(errors.squared, settings.high_levels),
    }
    found: Values = {}
    for metric, samples in values.items():
        scenes = defaultdict(list)
        for key, value in zip(errors.keys, samples, strict=True):
            if not math.isnan(value):
                scenes[scene_of(key)].append(value)
        found[metric] = {scene: sum(several) / len(several) for scene, several in scenes.items()}
    return found


def _effect(layer: AttentionLayer, whole: Values, cut: Values) -> LayerEffect:
    per_scene, means, drops = {}, {}, {}
    for metric, scenes in whole.items():
        if len(scenes) < 2:  # no references, or none that see anything
            continue
        if lost := sorted(scenes.keys() - cut[metric].keys()):
            reason = f"without it the model's {metric} is not finite in {', '.join(lost[:3])}"
            return LayerEffect(layer.index, layer.path, reason=reason)
        before, after = list(scenes.values()), [cut[metric][scene] for scene in scenes]
        worse = (before, after) if metric == "loss" else (after, before)
        means[metric] = sum(after) / len(after)
        drops[metric] = QualityLoss(*paired_bootstrap(*worse))
        per_scene[metric] = {scene: worse[1][place] - worse[0][place] for place, scene in enumerate(scenes)}
    return LayerEffect(
        layer.index,
        layer.path,
        loss=means.get("loss"),
        psnr_covisible=means.get("psnr_covisible"),
        psnr_all=means.get("psnr_all"),
        drop_loss=drops.get("loss"),
        drop_psnr_covisible=drops.get("psnr_covisible"),
        drop_psnr_all=drops.get("psnr_all"),
        per_scene=per_scene,
    )


def effects_table(effects: Sequence[LayerEffect]) -> str:
    """Write a Markdown table: the whole model, each cut model, and what the cut costs with its 95 % interval.

    Example:
        >>> drop = QualityLoss(0.5, 0.25, 0.75)
        >>> print(effects_table([LayerEffect(3, "up.attn1", 0.75, None, 15.0, drop, None, drop)]))
        | layer | path | PSNR covisible (dB) | lost | PSNR all (dB) | lost | loss | added |
        | --- | --- | --- | --- | --- | --- | --- | --- |
        | none | | - | - | 15.50 | - | 0.2500 | - |
        | 3 | up.attn1 | - | - | 15.00 | 0.50 (0.25 to 0.75) | 0.7500 | 0.5000 (0.2500 to 0.7500) |
    """
    header = ["layer", "path"]
    for metric, (title, _) in METRICS.items():
        header += [title, "added" if metric == "loss" else "lost"]
    rows = []
    if cut := [effect for effect in effects if effect.drop_loss is not None]:
        rows.append(["none", "", *_cells(cut[0], whole=True)])
    rows += [[str(effect.index), effect.path, *_cells(effect)] for effect in effects]
    reasons = [f"{effect.path}: {effect.reason}" for effect in effects if effect.reason]
    return "\n\n".join([markdown_table(header, rows), *reasons])


def _cells(effect: LayerEffect, *, whole: bool = False) -> list[str]:
    cells = []
    for metric, (_, digits) in METRICS.items():
        value, drop = getattr(effect, metric), getattr(effect, f"drop_{metric}")
        if drop is None:
            cells += ["-", "-"]
        elif whole:
            before = value - drop.mean if metric == "loss" else value + drop.mean
            cells += [f"{before:.{digits}f}", "-"]
        else:
            mean, low, high = (f"{part:.{digits}f}" for part in drop)
            cells += [f"{value:.{digits}f}", f"{mean} ({low} to {high})"]
    return cells


def effects_figure(effects: Sequence[LayerEffect]) -> Figure:
    """Draw one bar per layer: PSNR lost on covisible and on all target pixels, with 95 % intervals.

    Raises:
        ValueError: if no layer was cut.
    """
    from matplotlib.figure import Figure

    shown = [effect for effect in effects if effect.drop_psnr_all is not None]
    if not shown:
        raise ValueError(f"effects: expected at least one layer that was cut, got {len(effects)} without")
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(shown)), layout="constrained")
    axes = figure.subplots()
    series = {"drop_psnr_covisible": "target pixels that a reference sees", "drop_psnr_all": "all target pixels"}
    for shift, (name, label) in zip((-0.17, 0.17), series.items(), strict=True):
        drops = {place + shift: getattr(effect, name) for place, effect in enumerate(shown)}
        drops = {place: drop for place, drop in drops.items() if drop is not None}
        if drops:
            reach = np.array([(drop.mean - drop.low, drop.high - drop.mean) for drop in drops.values()]).T
            means = [drop.mean for drop in drops.values()]
            axes.barh(list(drops), means, height=0.32, xerr=reach, capsize=2, label=label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [f"{effect.index}  {effect.path}" for effect in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("PSNR lost at high noise when the layer sees its own view only (dB)", fontsize=8)
    axes.legend(fontsize=7)
    return figure
