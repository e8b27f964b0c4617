"""Settings of the shared evaluation, and the form of what it finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cameo.errors import unknown_name
from cameo.evaluation.denoising import ValidationSettings, check_levels
from cameo.evaluation.metrics import TRUNKS

__all__ = ["EvaluationSettings", "Section"]

LAYERS = ("supervised", "all", "none")


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of `evaluate`; written into every result file, and equal in results that are compared.

    Example:
        >>> EvaluationSettings(num_sampled=0).num_samples  # everything that needs no sampling
        32

    Attributes:
        num_samples: samples 0 .. n-1 of the data, for `denoising` and `attention`.
        batch_size: samples per forward; does not change the result beyond rounding.
        noise_seed: of all noise, the same for every model that is compared; sample i has noise of its own.
        noise_levels: fractions of the last time step at which the denoising is measured.
        high_noise: levels from here on count for the PSNR of the predicted clean image.
        noise_bands: (a, b): levels < a are low noise, levels > b high, the others mid.
        attention_layers: layers whose attention is measured: the supervised ones, all, or none.
        attention_levels: noise levels of `attention`.
        metric_depth: whether depth and cameras are in metres; attention within 2 cm of the match is counted too then.
        num_sampled: samples 0 .. n-1 of the data whose target views are generated; 0 = none.
        num_inference_steps, guidance_scale: of the sampler.
        lpips: trunk of LPIPS (alex, vgg, squeeze), or None to leave it out.
        fid: whether to compute FID; its value depends on the number of images and is noise with few.
        consistency: whether to measure how the generated views fit each other.
        epipolar_threshold, epipolar_matches: a pair of views is consistent if the median symmetric epipolar distance
            of at least this many SIFT matches lies below this many pixels.

    Raises:
        ValueError: for a value out of range; names the setting.
    """

    num_samples: int = 32
    batch_size: int = 8
    noise_seed: int = 1234
    noise_levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0)
    high_noise: float = 0.95
    noise_bands: tuple[float, float] = (0.33, 0.67)
    attention_layers: str = "supervised"
    attention_levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    metric_depth: bool = False
    num_sampled: int = 8
    num_inference_steps: int = 25
    guidance_scale: float = 1.0
    lpips: str | None = "alex"
    fid: bool = False
    consistency: bool = True
    epipolar_threshold: float = 2.0
    epipolar_matches: int = 10

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "num_inference_steps", "epipolar_matches"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("num_sampled", "noise_seed", "guidance_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("noise_levels", "attention_levels", "noise_bands"):
            levels = tuple(getattr(self, name))
            check_levels(name, levels)
            object.__setattr__(self, name, levels)  # a list of a settings file
        if len(self.noise_bands) != 2 or not self.noise_bands[0] < self.noise_bands[1]:
            raise ValueError(f"noise_bands: expected two rising levels, got {self.noise_bands}")
        if max(self.noise_levels) < self.high_noise:
            raise ValueError(
                f"noise_levels: expected one at or above high_noise={self.high_noise}, got {self.noise_levels}"
            )
        if self.attention_layers not in LAYERS:
            raise unknown_name("attention_layers", self.attention_layers, LAYERS)
        if self.lpips is not None and self.lpips not in TRUNKS:
            raise unknown_name("lpips", self.lpips, TRUNKS)
        if not self.epipolar_threshold > 0:
            raise ValueError(f"epipolar_threshold: expected pixels > 0, got {self.epipolar_threshold}")

    def validation(self) -> ValidationSettings:
        """Return the part that the denoising is measured with."""
        return ValidationSettings(
            self.num_samples, self.batch_size, self.noise_levels, self.high_noise, seed=self.noise_seed
        )


@dataclass
class Section:
    """Figures of one part of the evaluation.

    - `mean`: figure to its mean over the samples that have a value; None where none has.
    - `per_sample`: figure to sample key to value, for comparison in pairs.
    - `notes`: figure, or "all", to the reason why it is missing or what limits it.
    - `details`: what only a plot needs.
    """

    mean: dict[str, float | None] = field(default_factory=dict)
    per_sample: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, keys: Sequence[str], values: Sequence[float | None], missing: str = "not finite") -> None:
        """Note a figure of each sample; None, NaN and infinity are samples without a value, for the reason `missing`.

        Example:
            >>> section = Section()
            >>> section.add("psnr", ["room-0/0-1", "room-1/0-1"], [20.0, None], missing="nothing visible")
            >>> section.mean, section.per_sample, section.notes
            ({'psnr': 20.0}, {'psnr': {'room-0/0-1': 20.0}}, {'psnr': 'nothing visible in 1 of 2 samples'})
        """
        found = {
            key: float(value)
            for key, value in zip(keys, values, strict=True)
            if value is not None and math.isfinite(value)
        }
        self.per_sample[name] = found
        self.mean[name] = sum(found.values()) / len(found) if found else None
        if len(found) < len(keys):
            self.notes[name] = f"{missing} in {len(keys) - len(found)} of {len(keys)} samples"
