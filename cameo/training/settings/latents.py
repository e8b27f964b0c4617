"""Settings of the latents: whether the VAE computes them in every step or once."""

from __future__ import annotations

from dataclasses import dataclass

from cameo.settings import Settings, setting

__all__ = ["LatentSettings"]


@dataclass
class LatentSettings(Settings):
    """Latents: what the VAE makes of the views, in every step or once before the training."""

    # Whether each view of the training set is encoded once, before the first step, and its latents are read from
    # latents_dir from then on; conditions that need pixels are still computed in the step. false by default: it takes
    # time and disk at the start, which short runs do not get back.
    cache_latents: bool = setting(False)
    # Precision in which latents are kept: half (the default), the encoder's own where that is half, which loses
    # nothing, else float16; or float32, which takes twice the disk and trains with the same numbers as without.
    latent_precision: str = setting("half", choices=("half", "float32"))
    # Folder in which latents are kept, for all runs: each encoder, precision and size has a folder of its own in it.
    # null, the default, is latents in the folder of the embedded scenes, $CAMEO_CACHE or ~/.cache/cameo.
    latents_dir: str | None = setting(None, path=True, changeable=True)
