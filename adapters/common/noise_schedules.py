"""Noise schedules of the released models: their noise levels and the steps between them, as schedulers of diffusers.

All have the betas of Stable Diffusion, from which the models were trained.
"""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

from cameo.errors import unknown_name

__all__ = ["check_prediction_type", "ddim", "edm_euler", "linear_ddpm", "linear_euler", "linear_euler_ancestral"]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

FIRST_BETA, LAST_BETA = 0.00085, 0.012


def check_prediction_type(scheduler: Any) -> None:
    """Refuse a scheduler for a denoiser that predicts what no pipeline trains.

    Example:
        >>> check_prediction_type(ddim("v_prediction"))

    Raises:
        ValueError: for another prediction type; lists those that there are.
    """
    if (kind := scheduler.config.prediction_type) not in PREDICTION_TYPES:
        raise unknown_name("scheduler.prediction_type", kind, PREDICTION_TYPES)


def ddim(
    prediction_type: str = "epsilon", *, zero_terminal_snr: bool = False, whole_range: bool = False
) -> DDIMScheduler:
    """Return DDIM steps through Stable Diffusion's noise levels.

    Example:
        >>> round(float(ddim().alphas_cumprod[-1]), 4)  # the last noise level is not pure noise
        0.0047
        >>> float(ddim("v_prediction", zero_terminal_snr=True).alphas_cumprod[-1])
        0.0

    Args:
        prediction_type: what the denoiser predicts: "epsilon" (the noise), "v_prediction" (the velocity) or "sample"
            (the clean latents, which the narrowest denoisers learn best, arXiv 2511.13720).
        zero_terminal_snr: make the last noise level pure noise.
        whole_range: let the steps start at the last noise level and end at the predicted clean latents; by default
            they leave the highest levels out and keep a rest of noise, as Stable Diffusion was released.

    Source: arXiv 2305.08891 for the last two.
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=FIRST_BETA,
        beta_end=LAST_BETA,
        clip_sample=False,
        set_alpha_to_one=whole_range,
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing="trailing" if whole_range else "leading",
    )


def edm_euler(*, sigma_min: float = 0.002, sigma_max: float = 700.0) -> EulerDiscreteScheduler:
    """Return Euler steps through EDM's noise levels (rho 7), by default with the range of SV3D's release.

    Example:
        >>> scheduler = edm_euler()
        >>> scheduler.set_timesteps(3)
        >>> [round(level, 3) for level in scheduler.sigmas.tolist()]
        [700.0, 15.59, 0.002, 0.0]

    Source: EDM, arXiv 2206.00364.
    """
    return EulerDiscreteScheduler(
        beta_start=FIRST_BETA,
        beta_end=LAST_BETA,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",  # with it the first noise is scaled by sqrt(sigma_max^2 + 1), as published
        steps_offset=1,
        use_karras_sigmas=True,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
    )


def linear_ddpm() -> DDPMScheduler:
    """Return the noise levels of Zero123++: velocity prediction, linear betas, no zero terminal SNR.

    Example:
        >>> round(float(linear_ddpm().alphas_cumprod[-1]), 5)
        0.00158
    """
    return DDPMScheduler(
        beta_start=FIRST_BETA,
        beta_end=LAST_BETA,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type="v_prediction",
    )


def linear_euler_ancestral() -> EulerAncestralDiscreteScheduler:
    """Return ancestral Euler steps through the levels of `linear_ddpm`, spaced as Zero123++'s instructions say.

    Example:
        >>> scheduler = linear_euler_ancestral()
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [999.0, 749.0, 499.0, 249.0]
    """
    return EulerAncestralDiscreteScheduler.from_config(linear_ddpm().config, timestep_spacing="trailing")


def linear_euler(prediction_type: str) -> EulerDiscreteScheduler:
    """Return Euler steps through the levels of `linear_ddpm`: diffusers' ancestral ones refuse predicted clean latents.

    Example:
        >>> linear_euler("sample").config.prediction_type
        'sample'
    """
    config = linear_ddpm().config
    return EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing", prediction_type=prediction_type)
