"""Batches of the tiny backbones for small probes, and probes with made-up counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cameo import LayerProbe
from cameo.probing.probed_layer import ProbedLayer
from tests.helpers.backbone_rows import TINY, Row

LEVELS = (0.5, 1.0)
CAT3D = TINY[0]
# Arguments of a `LayerProbe` beside its layers and noise levels.
NOTHING_PROBED: dict[str, tuple[Any, ...]] = {"angle_bins": (), "within": (1,), "scenes": (), "samples": ()}


def small_batches(row: Row) -> list[dict[str, Any]]:
    batch = row.batch(samples=2)
    batch["key"] = ["wall-0/0", "wall-1/0"]
    return [batch]


def tiny_model() -> tuple[Any, list[dict[str, Any]]]:
    """Pipeline and batches of the smallest model, as `probe_layers` takes them."""
    return CAT3D.pipeline(), small_batches(CAT3D)


def made_probe(
    *hits: list[int], pairs: int = 100, scenes: tuple[str, ...] = ("a", "b", "c", "d"), **options: Any
) -> Any:
    """A probe of layers with these hits within one token in each scene; chance is one fifth."""
    layers = []
    for number, of_scene in enumerate(hits):
        counts = np.array(of_scene)[None, :, None, None].repeat(2, axis=0)  # two levels
        layers.append(
            ProbedLayer(
                number,
                f"block.{number}.attn1",
                "all",
                "8 x 8",
                pairs=np.full((len(scenes), 1), pairs),
                chance=np.full((len(scenes), 1, 1), pairs / 5),
                hits={"mean": counts, "best_head": counts},
            )
        )
    samples = tuple(f"{scene}/0" for scene in scenes)
    return LayerProbe(tuple(layers), LEVELS, ((0.0, 180.0),), (1,), scenes, samples, **options)


def uneven_probe() -> LayerProbe:
    """A probe of one layer whose hits halve from the first noise level to the second."""
    probe = made_probe([10, 30, 80, 40])
    hits = {"mean": probe.layers[0].hits["mean"] // np.array([1, 2])[:, None, None, None]}
    return replace(probe, layers=(replace(probe.layers[0], hits=hits),))
