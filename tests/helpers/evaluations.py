"""Settings and data of evaluations that take about a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cameo.data import EmbeddedScenes, MultiViewDataset
from cameo.evaluation.protocol import EvaluationSettings
from cameo.probing.denoising import ValidationSettings

SMALL = EvaluationSettings(
    num_samples=3,
    batch_size=3,
    noise_levels=(0.1, 0.5, 1.0),
    attention_levels=(0.5, 1.0),
    num_sampled=2,
    num_inference_steps=2,
    lpips=None,
)
UNSAMPLED = replace(SMALL, num_sampled=0)
VALIDATION = ValidationSettings(num_samples=2, batch_size=2, noise_levels=(0.5, 1.0))


def rig_data(rig: str, references: int, folder: Path) -> MultiViewDataset:
    """Two objects of 48 x 48 pixels, seen from all poses of a rig."""
    options: dict[str, Any] = {
        "content": "objects",
        "rig": rig,
        "size": (48, 48),
        "cache_dir": folder,
        "progress": False,
    }
    scenes = EmbeddedScenes(num_scenes=2, **options)
    count = scenes.views_per_scene
    return MultiViewDataset(scenes, num_views=count, num_reference_views=references, selection="in_order")
