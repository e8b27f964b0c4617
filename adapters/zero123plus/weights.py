"""Load Zero123++: our own pipelines and the releases, whose folders have the same components."""

from __future__ import annotations

from typing import Any

from cameo.adapters.common import outlines
from cameo.adapters.common.noise_schedules import linear_euler_ancestral
from cameo.adapters.common.places import read_index, unbundled
from cameo.adapters.zero123plus.pipeline import Zero123PlusPipeline
from cameo.errors import DataError

__all__ = ["OUTLINES", "load_pipeline"]


def load_pipeline(name_or_path: str, *, revision: str | None = None, **options: Any) -> Zero123PlusPipeline:
    """Load a pipeline; see `Zero123Plus.load` for the arguments.

    Example:
        >>> load_pipeline("sudo-ai/zero123plus-v1.2", torch_dtype=torch.float16)  # doctest: +SKIP
    """
    name_or_path = unbundled(name_or_path)
    settings = read_index(name_or_path, revision, options)
    kind = settings.get("_class_name")
    if kind != "Zero123PlusPipeline":
        raise DataError(f"{name_or_path}: holds a {kind}; zero123plus starts from a Zero123PlusPipeline")
    pipeline = Zero123PlusPipeline.from_pretrained(name_or_path, revision=revision, **options)
    # A release: its instructions set this spacing after loading.
    if "reference_size" not in settings and "scheduler" not in options:
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, timestep_spacing="trailing"
        )
    return pipeline


def _outline() -> Zero123PlusPipeline:
    return Zero123PlusPipeline(
        outlines.unet(),
        linear_euler_ancestral(),
        vae=outlines.vae(),
        vision_encoder=outlines.vision_encoder(),
        text_encoder=outlines.text_encoder(),
        tokenizer=outlines.TokenizerOutline(),
        ramping_coefficients=[step / 76 for step in range(77)],
    )


# Builds a release without its weights, see `Backbone.outline`.
OUTLINES = {"sudo-ai/zero123plus-v1.1": _outline, "sudo-ai/zero123plus-v1.2": _outline}
