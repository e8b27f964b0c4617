"""Write the page: what several models make of the same samples at the same noise, as one file that opens from disk.

Axes: B samples, V views, H W pixels.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from cameo.attention.capture import AttentionLayer
from cameo.explore.images import data_url
from cameo.explore.maps import MEAN, THROUGH_HEAD, ViewMaps, layer_maps, map_sizes, single_head, why_not_shown
from cameo.explore.packing import BUDGET, Kept, Pack, choose_kept
from cameo.files import write_atomically
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline
from cameo.probing.denoising import check_noise_levels, fixed_inputs
from cameo.probing.hits import ERROR_CLASSES
from cameo.probing.mode import base_weights, evaluation_mode
from cameo.probing.tally import BatchMatches

__all__ = ["NOISE_LEVELS", "ShownModel", "write_page"]

NOISE_LEVELS = (0.5, 0.8, 1.0)
SEED = 1234


@dataclass(frozen=True)
class ShownModel:
    """A model on the page.

    Attributes:
        model: wraps the denoiser.
        trained_head: whether its alignment heads were trained with these weights.
        base: whether to show it as it was before its training, with its LoRA switched off.
    """

    model: CameoModel
    trained_head: bool
    base: bool = False


@dataclass
class _Content:
    """What is collected, by number of the layer and of the sample where it depends on them."""

    pack: Pack
    readouts: list[str]
    grids: dict[int, dict[int, tuple[int, int]]] = field(default_factory=dict)
    truth: dict[int, dict[int, dict[str, list[int]]]] = field(default_factory=dict)
    predictions: dict[str, str] = field(default_factory=dict)

    def add(self, maps: ViewMaps, **shown: int) -> None:
        """Pack the maps of one view in another, with the truth and the grids of their layer."""
        layer, sample = shown["layer"], maps.sample
        query, key = maps.query_view, maps.key_view
        self.grids.setdefault(layer, {}).update({query: maps.query_grid, key: maps.key_grid})
        self.truth.setdefault(layer, {}).setdefault(sample, {})[f"{query}/{key}"] = maps.target.tolist()
        for readout, shares in maps.readouts.items():
            if readout in self.readouts:
                number = self.readouts.index(readout)
                self.pack.add(shares, maps.query_grid, **shown, readout=number, sample=sample, query=query, key=key)


def write_page(
    path: str | Path,
    models: Mapping[str, ShownModel],
    pipeline: MultiViewPipeline,
    batch: dict[str, Any],
    *,
    title: str,
    layers: Sequence[AttentionLayer] | None = None,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    about: Sequence[str] = (),
    budget: int = BUDGET,
) -> Path:
    """Write one HTML file on which a click on a token shows where each model looks; returns its path.

    All models get the same samples with the same noise. The file needs no network and no server. Where all maps
    together would make it too large, the single heads are left out, then all but the largest shares of each query, then
    rows and columns of queries; the page says so.

    Args:
        path: of the file, which is written whole.
        models: name to model, all of the backbone of `pipeline`.
        pipeline: makes the inputs of the denoisers, and clean images of their outputs.
        batch: a few collated samples, with depth.
        title: heading of the page.
        layers: layers to show. By default those that are supervised in any of the models.
        noise_levels: shares of the last timestep, in [0, 1].
        about: sentences at the end of the page, such as where the models came from.
        budget: most bytes of all maps before they are compressed; the default keeps the page below 40 MB.

    Raises:
        ValueError: no model, no noise level, or no layer whose attention can be shown as maps.
    """
    if not models:
        raise ValueError("models: expected at least one model to show, got none")
    check_noise_levels("noise_levels", list(noise_levels))
    supervised = {layer.path: layer for shown in models.values() for layer in shown.model.supervised_layers}
    wanted = list(supervised.values()) if layers is None else list(layers)
    refused = {layer.path: reason for layer in wanted if (reason := why_not_shown(layer))}
    wanted = [layer for layer in wanted if layer.path not in refused]
    if not wanted:
        raise ValueError(f"layers: expected one that attends across whole views, got {refused or 'none'}")
    matches = BatchMatches(batch, metric=False)
    kept, single_heads = _choose(wanted, matches, len(models) * len(noise_levels), budget)
    readouts = [MEAN]
    trained = [shown.model.alignment_heads for shown in models.values() if shown.trained_head]
    if any(True for heads in trained for _ in heads.parameters()):
        readouts.append(THROUGH_HEAD)
    if single_heads:
        readouts += [single_head(number) for number in range(max(layer.heads for layer in wanted))]
    content = _collect(models, pipeline, matches, wanted, noise_levels, _Content(Pack(kept), readouts))
    view, token = _first_token(content)
    facts = {
        "samples": _samples(batch),
        "models": list(models),
        "levels": [float(level) for level in noise_levels],
        "readouts": content.readouts,
        "layers": [
            {
                "text": f"{layer.index}: {layer.path}{' (supervised)' if layer.path in supervised else ''}",
                "grids": content.grids[number],
            }
            for number, layer in enumerate(wanted)
        ],
        "truth": content.truth,
        "maps": content.pack.records,
        "keys": kept.keys,
        "step": kept.step,
        "predictions": content.predictions,
        "errors": _error_classes(),
        "first": {"view": view, "token": token},
        "about": [*about, *_left_out(kept, single_heads, refused)],
    }
    write_atomically(path, _assemble(title, facts, content.pack))
    return Path(path)


def _choose(layers: Sequence[AttentionLayer], matches: BatchMatches, runs: int, budget: int) -> tuple[Kept, bool]:
    """Choose what is kept of the maps of each query, and whether the single heads are."""
    by_layer = [(layer.heads, map_sizes(layer, matches)) for layer in layers]
    everything = [size for heads, sizes in by_layer for size in sizes * runs * (heads + 2)]
    kept = choose_kept(everything, budget)
    if kept == Kept(None, 1):
        return kept, True
    return choose_kept([size for _, sizes in by_layer for size in sizes * runs * 2], budget), False


def _collect(
    models: Mapping[str, ShownModel],
    pipeline: MultiViewPipeline,
    matches: BatchMatches,
    layers: Sequence[AttentionLayer],
    noise_levels: Sequence[float],
    content: _Content,
) -> _Content:
    batch = dict(matches.batch)
    for level_number, level in enumerate(noise_levels):
        with evaluation_mode(pipeline.denoiser):  # without what a pipeline does in training only
            inputs = fixed_inputs(pipeline, batch, range(len(batch["images"])), level, SEED)
        for model_number, shown in enumerate(models.values()):
            with base_weights(shown.model) if shown.base else nullcontext():
                maps, output = layer_maps(shown.model, matches, inputs, layers, trained_head=shown.trained_head)
            predicted = pipeline.predict_clean(output, inputs)
            for sample, of_sample in enumerate(predicted):
                for view in range(int(batch["num_reference_views"]), len(of_sample)):
                    place = f"{model_number}/{level_number}/{sample}/{view}"
                    content.predictions[place] = data_url(of_sample[view])
            for layer_number, layer in enumerate(layers):
                for one in maps[layer.path]:
                    content.add(one, model=model_number, level=level_number, layer=layer_number)
    return content


def _samples(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    references = int(batch["num_reference_views"])
    return [
        {
            "key": key,
            "views": [
                {"image": data_url(image), "reference": view < references, "size": list(image.shape[-2:])}
                for view, image in enumerate(images)
            ],
        }
        for key, images in zip(batch["key"], batch["images"], strict=True)
    ]


def _first_token(content: _Content) -> tuple[int, int]:
    """Choose what is selected when the page opens: a token with a match, near the middle of a target view."""
    of_sample = content.truth[0][min(content.truth[0])]
    for pair, target in reversed(of_sample.items()):
        view = int(pair.partition("/")[0])
        height, width = content.grids[0][view]
        step = content.pack.kept.step
        matched = [t for t, match in enumerate(target) if match >= 0 and t // width % step == t % width % step == 0]
        if matched:
            middle = (height - 1) / 2, (width - 1) / 2
            return view, min(matched, key=lambda t: abs(t // width - middle[0]) + abs(t % width - middle[1]))
    return max(content.grids[0]), 0


def _error_classes() -> list[dict[str, Any]]:
    starts = list(ERROR_CLASSES)
    ends = [*(start - 1 for start in starts[1:]), None]
    texts = [
        f"{start}{'+' if end is None else '' if start == end else f' to {end}'} token{'' if end == 1 else 's'} off"
        for start, end in zip(starts, ends, strict=True)
    ]
    return [
        {"from": start, "color": ERROR_CLASSES[start], "text": text} for start, text in zip(starts, texts, strict=True)
    ]


def _left_out(kept: Kept, single_heads: bool, refused: Mapping[str, str]) -> list[str]:
    sentences = [f"Layer {path} is not shown: {reason}." for path, reason in refused.items()]
    told = kept.told()
    if told or not single_heads:
        parts = [*(["without the single heads"] if not single_heads else []), *([told] if told else [])]
        sentences.append(f"To keep the file small, the maps are stored {' and with '.join(parts)}.")
    return sentences


def _assemble(title: str, facts: Mapping[str, Any], pack: Pack) -> str:
    folder = resources.files("cameo.explore") / "page"
    parts = {
        "title": html.escape(title),
        "css": (folder / "page.css").read_text("utf-8"),
        "facts": json.dumps(facts, separators=(",", ":")).replace("<", "\\u003c"),
        "maps": pack.text(),
        "script": (folder / "page.js").read_text("utf-8"),
    }
    pieces = (folder / "page.html").read_text("utf-8").split("@")
    # Every second piece is the name of a part; parts are never searched for names themselves.
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))
