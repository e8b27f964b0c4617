"""Settings of the shared evaluation, and the data structure of its results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cameo.choices import LPIPS_TRUNKS
from cameo.settings import Settings, setting

if TYPE_CHECKING:
    from cameo.probing.denoising import ValidationSettings

__all__ = ["EvaluationSettings", "Section"]


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """Evaluation: what is measured, and on how many samples. Results of different settings cannot be compared.

    Example:
        >>> EvaluationSettings(num_sampled=0).num_samples  # only what needs no sampling
        32

    Raises:
        ValueError: for a value out of range; names the setting.
    """

    # Number of samples of the data for the denoising and the attention, >= 1. 32 by default, as in the validations.
    num_samples: int = setting(32, at_least=1)
    # Samples per forward pass, >= 1; changes the result by rounding only. 8 by default.
    batch_size: int = setting(8, at_least=1)
    # Seed of all noise, >= 0, the same for all models that are compared; the noise of each sample also depends on its
    # number. 1234 by default, as in the validations.
    noise_seed: int = setting(1234, at_least=0)
    # Noise levels at which the denoising is measured, shares of the last timestep in [0, 1], all different. By default
    # denser at the end, where the target is known through the attention only.
    noise_levels: tuple[float, ...] = setting((0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0), share="[0, 1]")
    # Noise level in [0, 1] from which on levels count for the PSNR of the predicted clean image. 0.95 by default.
    high_noise: float = setting(0.95, share="[0, 1]")
    # Two rising noise levels (a, b): levels below a are low noise, above b high, the others mid. Thirds by default.
    noise_bands: tuple[float, float] = setting((0.33, 0.67), share="[0, 1]")
    # Layers whose attention is measured: the supervised ones (the default), all, or none.
    attention_layers: str = setting("supervised", choices=("supervised", "all", "none"))
    # Noise levels at which the attention is measured, shares of the last timestep in [0, 1], all different.
    attention_levels: tuple[float, ...] = setting((0.1, 0.3, 0.5, 0.7, 0.9, 1.0), share="[0, 1]")
    # Whether depth and cameras are in meters, so that attention within 2 cm of the match is counted too. false by
    # default; the recipes switch it on for data that is known to be in meters.
    metric_depth: bool = setting(False)
    # Number of samples of the data whose target views are generated, >= 0; 0 leaves out what needs sampling. 8 by
    # default, since sampling is the slowest part.
    num_sampled: int = setting(8, at_least=0)
    # Steps of the sampler, >= 1. 25 by default, as in the pictures of a training.
    num_inference_steps: int = setting(25, at_least=1)
    # Factor of classifier-free guidance, >= 0. 1, the default, means no guidance.
    guidance_scale: float = setting(1.0, at_least=0)
    # Network of LPIPS, or null to leave it out. alex by default, as in most papers.
    lpips: str | None = setting("alex", choices=LPIPS_TRUNKS)
    # Whether FID is computed. false by default, since with few images its value is mostly noise.
    fid: bool = setting(False)
    # Whether the consistency of the generated views with each other is measured. true by default.
    consistency: bool = setting(True)
    # A pair of views is consistent if the median symmetric epipolar distance of its matches is below this number of
    # pixels, > 0. 2 by default.
    epipolar_threshold: float = setting(2.0, above=0)
    # Number of SIFT matches below which a pair of views is inconsistent, >= 1. 10 by default.
    epipolar_matches: int = setting(10, at_least=1)

    def check(self) -> None:
        """Raise `ValueError` for settings that contradict each other."""
        for name in ("noise_levels", "attention_levels", "noise_bands"):
            levels = getattr(self, name)
            if not levels or len(set(levels)) < len(levels):
                raise ValueError(f"{name}: expected different levels between 0 and 1, got {levels}")
        if not self.noise_bands[0] < self.noise_bands[1]:
            raise ValueError(f"noise_bands: expected two rising levels, got {self.noise_bands}")
        if max(self.noise_levels) < self.high_noise:
            raise ValueError(
                f"noise_levels: expected one at or above high_noise={self.high_noise}, got {self.noise_levels}"
            )

    def validation(self) -> ValidationSettings:
        """Return the settings of the denoising."""
        from cameo.probing.denoising import ValidationSettings  # needs torch

        return ValidationSettings(
            self.num_samples, self.batch_size, self.noise_levels, self.high_noise, seed=self.noise_seed
        )


@dataclass
class Section:
    """Figures of one part of the evaluation.

    Attributes:
        mean: figure to its mean over the samples that have a value; None if no sample has one.
        per_sample: figure to sample key to value, for paired comparisons.
        notes: figure, or "all", to the reason why values are missing.
        details: values that only plots need.
    """

    mean: dict[str, float | None] = field(default_factory=dict)
    per_sample: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, keys: Sequence[str], values: Sequence[float | None], missing: str = "not finite") -> None:
        """Add a figure of each sample. None, NaN and infinity mean that a sample has no value; `missing` says why.

        Example:
            >>> section = Section()
            >>> section.add("psnr", ["room-0/0-1", "room-1/0-1"], [20.0, None], missing="nothing visible")
            >>> section.mean, section.per_sample, section.notes
            ({'psnr': 20.0}, {'psnr': {'room-0/0-1': 20.0}}, {'psnr': 'nothing visible in 1 of 2 samples'})
        """
        finite = {
            key: float(value)
            for key, value in zip(keys, values, strict=True)
            if value is not None and math.isfinite(value)
        }
        self.per_sample[name] = finite
        self.mean[name] = sum(finite.values()) / len(finite) if finite else None
        if len(finite) < len(keys):
            self.notes[name] = f"{missing} in {len(keys) - len(finite)} of {len(keys)} samples"
