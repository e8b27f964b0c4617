"""Settings of the shared evaluation, and the form of what it finds."""

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
    """Evaluation: what is measured, on how many samples. Written into every result file, equal where results compare.

    Example:
        >>> EvaluationSettings(num_sampled=0).num_samples  # everything that needs no sampling
        32

    Raises:
        ValueError: for a value out of range; names the setting.
    """

    # Samples 0 .. n-1 of the data for the denoising and the attention, >= 1. 32 by default, as in the validations.
    num_samples: int = setting(32, at_least=1)
    # Samples per forward, >= 1; does not change the result beyond rounding. 8 by default.
    batch_size: int = setting(8, at_least=1)
    # Seed of all noise, >= 0, the same for every model that is compared; each sample has noise of its own. 1234 by
    # default, as in the validations.
    noise_seed: int = setting(1234, at_least=0)
    # Noise levels at which the denoising is measured, shares of the last time step in [0, 1], all different. By default
    # denser at the end, where the target is seen through the attention alone.
    noise_levels: tuple[float, ...] = setting((0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0), share="[0, 1]")
    # Noise level in [0, 1] from which on levels count for the PSNR of the predicted clean image. 0.95 by default.
    high_noise: float = setting(0.95, share="[0, 1]")
    # Two rising levels (a, b): below a is low noise, above b high, the others mid. Thirds by default.
    noise_bands: tuple[float, float] = setting((0.33, 0.67), share="[0, 1]")
    # Layers whose attention is measured: the supervised ones (the default), all, or none.
    attention_layers: str = setting("supervised", choices=("supervised", "all", "none"))
    # Noise levels at which the attention is measured, shares of the last time step in [0, 1], all different.
    attention_levels: tuple[float, ...] = setting((0.1, 0.3, 0.5, 0.7, 0.9, 1.0), share="[0, 1]")
    # Whether depth and cameras are in meters, so that attention within 2 cm of the match is counted too. The recipes
    # switch it on for data that is known to be; false by default.
    metric_depth: bool = setting(False)
    # Samples 0 .. n-1 of the data whose target views are generated, >= 0; 0 leaves out what needs sampling. 8 by
    # default: sampling is the slowest part.
    num_sampled: int = setting(8, at_least=0)
    # Steps of the sampler, >= 1. 25 by default, as in the pictures of a training.
    num_inference_steps: int = setting(25, at_least=1)
    # Factor of classifier-free guidance, >= 0. 1, the default, is without guidance.
    guidance_scale: float = setting(1.0, at_least=0)
    # Network behind LPIPS, or null to leave it out. alex by default, as most papers have it.
    lpips: str | None = setting("alex", choices=LPIPS_TRUNKS)
    # Whether FID is computed. false by default: with few images its value is noise.
    fid: bool = setting(False)
    # Whether it is measured how the generated views fit each other, true by default.
    consistency: bool = setting(True)
    # A pair of views is consistent if the median symmetric epipolar distance of its matches is less pixels than this,
    # > 0. 2 by default.
    epipolar_threshold: float = setting(2.0, above=0)
    # SIFT matches that a pair of views must have to be counted, >= 1. 10 by default.
    epipolar_matches: int = setting(10, at_least=1)

    def check(self) -> None:
        """Refuse settings that contradict each other."""
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
        """Return the part that the denoising is measured with."""
        from cameo.probing.denoising import ValidationSettings  # needs torch

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
