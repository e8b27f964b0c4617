"""Ablation of a layer: what the model loses when the queries of this layer alone see no other view.

A layer may attend to the right token although the model does not use it, and the other way round. The share of matches
that a layer finds (`cameo.probe_layers`) is therefore completed by the effect of its cross-view attention: the model is
measured whole and then with one layer at a time cut to self-view attention, on the same samples and noise.
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

# Title and number of decimals of each metric in a table.
METRICS = {"psnr_covisible": ("PSNR covisible (dB)", 2), "psnr_all": ("PSNR all (dB)", 2), "loss": ("loss", 4)}
SceneValues = dict[str, dict[str, float]]  # metric to scene to value


class QualityLoss(NamedTuple):
    """By how much the cut model is worse, mean over scenes, with both ends of the 95 % interval; negative if better."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class LayerEffect:
    """What the model loses without the cross-view attention of one layer.

    Attributes:
        index: index of the layer, among the cross-view layers or among those that can be inflated.
        path: dotted path of the attention module.
        loss: denoising loss of the cut model, mean over noise levels and scenes.
        psnr_covisible: PSNR of the cut model in dB at high noise on target pixels that a reference view sees; None
            without reference views, or where fewer than two scenes have such pixels.
        psnr_all: PSNR of the cut model in dB at high noise on all target pixels.
        drop_loss: by how much the loss of the cut model is higher.
        drop_psnr_covisible, drop_psnr_all: by how many dB the PSNR of the cut model is lower.
        per_scene: metric ("loss", "psnr_covisible", "psnr_all") to scene to the loss of quality there, for a paired
            comparison of two layers.
        reason: why the layer was not cut, or what cannot be measured without it; the attributes above are then None
            or empty.
    """

    index: int
    path: str
    loss: float | None = None
    psnr_covisible: float | None = None
    psnr_all: float | None = None
    drop_loss: QualityLoss | None = None
    drop_psnr_covisible: QualityLoss | None = None
    drop_psnr_all: QualityLoss | None = None
    per_scene: SceneValues = field(default_factory=dict)
    reason: str | None = None


@contextmanager
def self_view_only(model: nn.Module, layer: AttentionLayer, token_grids: TokenGrids) -> Iterator[None]:
    """Cut one layer to self-view attention: inside the block, its queries see only the keys of their own view.

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

    - Where each query reaches one token per view (temporal layers), it sees only itself.
    - No query sees the keys of a view without queries, such as Zero123++'s reference image. The write pass of
      Zero123++, in which the reference attends to itself, is not changed.
    - Tokens that belong to no view, such as text, are seen by all tokens, and see all tokens.
    - What a mask hides stays hidden.

    The model's own kernel is called once per view; in explicit attention the logits of other views become -inf before
    the softmax, in `torch.nn.MultiheadAttention` by its mask. Where a kernel of another package hides keys, SDPA takes
    its place, which rounds otherwise. Weights and modules are not changed: outside the block the output is the same,
    bit for bit. Only the thread that entered the block is affected. An `AttentionCapture` inside the block sees the
    queries and keys of all views. Use it for measuring only: a backward pass of checkpointed layers after the block
    would recompute the layer without the cut.

    Args:
        model: a `CameoModel`, or the model that holds the layer.
        layer: one of the adapter's layers, or of `CameoModel.attention_layers`.
        token_grids: token grid `(h, w)` of each view, as `layer.token_grids(height, width, num_views)`.

    Raises:
        CaptureError: if the layer holds keys of reference views alone, attends within each view, or has
            `kernel_inputs`; in the forward pass, if the numbers of tokens of a call do not fit `token_grids`, or if the
            module calls the kernel several times without `layer.kernel_call`; on leaving the block, if the layer did
            not run, or called an unknown kernel (see `AttentionCapture`).
        ValueError: if `token_grids` do not fit the layout.
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

    The model is not changed. The intervals are over resampled scenes; the samples of a scene are averaged first. It
    takes the time of one validation for each layer, and of one more.

    Args:
        model: a wrapped model; which layer it supervises does not matter.
        pipeline: pipeline of the model.
        data: samples of one image size and number of views, of at least two scenes.
        settings: samples, noise levels and noise.
        layers: indices of the adapter's layers (`CameoModel.attention_layers`), or paths. None: all cross-view layers,
            starting with those that `inflate=True` inflated.

    Returns:
        One effect per layer, in the order of `layers`. A layer that cannot be cut has a `reason`.

    Raises:
        ValueError: for an unknown layer, or if all samples are of one scene.
        DataError, CaptureError: as `cameo.probing.denoising.measure_denoising` and `self_view_only` raise them.
    """
    cross_view = _cross_view_layers(model)
    chosen = cross_view if layers is None else [_find_layer(model, cross_view, layer) for layer in layers]
    whole = _by_scene(measure_denoising(model, pipeline, data, settings), settings)
    if len(whole["loss"]) < 2:
        raise ValueError(
            f"data: expected samples of at least 2 scenes, got {len(whole['loss'])} ({', '.join(whole['loss'])}); one "
            "scene says nothing about others. Raise num_samples"
        )
    first = collate([data[0]])
    effects = []
    for layer in chosen:
        if layer.unsupported:
            effects.append(LayerEffect(layer.index, layer.path, reason=layer.unsupported))
            continue
        with self_view_only(model, layer, layer_grids(layer, first)):
            cut = measure_denoising(model, pipeline, data, settings)
        effects.append(_effect(layer, whole, _by_scene(cut, settings)))
    return effects


def _cross_view_layers(model: CameoModel) -> list[AttentionLayer]:
    """The layers of a model in which its views meet, starting with the inflated ones."""
    config = model.cameo_config
    if config.backbone is None or not (config.inflate or config.own_view):
        return model.attention_layers
    others = get_backbone(config.backbone).attention_layers(unwrap_peft(model.base_model))
    return [*(model.supervised_layers if config.inflate else ()), *others]


def _find_layer(model: CameoModel, cross_view: Sequence[AttentionLayer], name: int | str) -> AttentionLayer:
    """The cross-view layer with a path, or with an index among the adapter's layers."""
    by_name: dict[int | str, AttentionLayer] = {layer.path: layer for layer in cross_view}
    counted = cross_view if model.cameo_config.own_view else model.attention_layers
    by_name |= {layer.index: layer for layer in counted if layer.path in by_name}
    if name not in by_name:
        raise unknown_name("layer", name, map(str, by_name))
    return by_name[name]


def _by_scene(errors: DenoisingErrors, settings: ValidationSettings) -> SceneValues:
    """Mean over the samples of each scene; samples without a value (NaN) do not count."""
    values = {
        "loss": errors.sample_losses(settings.noise_levels),
        "psnr_covisible": errors.sample_psnr(errors.squared_covisible, settings.high_levels),
        "psnr_all": errors.sample_psnr(errors.squared, settings.high_levels),
    }
    means: SceneValues = {}
    for metric, samples in values.items():
        scenes = defaultdict(list)
        for key, value in zip(errors.keys, samples, strict=True):
            if not math.isnan(value):
                scenes[scene_of(key)].append(value)
        means[metric] = {scene: sum(of_scene) / len(of_scene) for scene, of_scene in scenes.items()}
    return means


def _effect(layer: AttentionLayer, whole: SceneValues, cut: SceneValues) -> LayerEffect:
    """Compare the cut model with the whole one, scene by scene."""
    per_scene, means, drops = {}, {}, {}
    for metric, scenes in whole.items():
        if len(scenes) < 2:  # no reference view, or none that sees a target pixel
            continue
        if broken := sorted(scenes.keys() - cut[metric].keys()):
            reason = f"without it the model's {metric} is not finite in {', '.join(broken[:3])}"
            return LayerEffect(layer.index, layer.path, reason=reason)
        before, after = list(scenes.values()), [cut[metric][scene] for scene in scenes]
        means[metric] = sum(after) / len(after)
        lower, higher = (before, after) if metric == "loss" else (after, before)  # if the cut model is worse
        drops[metric] = QualityLoss(*paired_bootstrap(lower, higher))
        per_scene[metric] = {scene: high - low for scene, low, high in zip(scenes, lower, higher, strict=True)}
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
    """Format a Markdown table of the whole model and each cut model, with the losses of quality and 95 % intervals.

    Example:
        >>> lost = QualityLoss(0.5, 0.25, 0.75)
        >>> print(effects_table([LayerEffect(3, "up.attn1", 0.75, None, 15.0, lost, None, lost)]))
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
    """Cells of the cut model, or of the whole one that it was compared with."""
    cells = []
    for metric, (_, digits) in METRICS.items():
        value, lost = getattr(effect, metric), getattr(effect, f"drop_{metric}")
        if lost is None:
            cells += ["-", "-"]
        elif whole:
            before = value - lost.mean if metric == "loss" else value + lost.mean
            cells += [f"{before:.{digits}f}", "-"]
        else:
            mean, low, high = (f"{number:.{digits}f}" for number in lost)
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
        bars = {row + shift: getattr(effect, name) for row, effect in enumerate(shown)}
        bars = {row: lost for row, lost in bars.items() if lost is not None}
        if bars:
            errors = np.array([(lost.mean - lost.low, lost.high - lost.mean) for lost in bars.values()]).T
            means = [lost.mean for lost in bars.values()]
            axes.barh(list(bars), means, height=0.32, xerr=errors, capsize=2, label=label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [f"{effect.index}  {effect.path}" for effect in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("PSNR lost at high noise when each query sees only its own view (dB)", fontsize=8)
    axes.legend(fontsize=7)
    return figure
