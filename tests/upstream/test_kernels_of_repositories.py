"""Rows of docs/models.md that name a repository, with the other attention functions that its code can call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cameo.errors import CaptureError
from tests.helpers import attached_models as checks
from tests.helpers.catalogue import REPOSITORIES, rows
from tests.helpers.repositories import attach, check_footprint, seeded
from tests.helpers.repository_images import IMAGE_KERNELS, IMAGES
from tests.helpers.repository_videos import VIDEO_KERNELS, VIDEOS, viewcrafter

ENTRIES, KERNELS = VIDEOS | IMAGES, VIDEO_KERNELS | IMAGE_KERNELS
ROWS = rows(REPOSITORIES)


@pytest.mark.parametrize("kernel", KERNELS, ids="/".join)
def test_another_kernel_is_seen(upstream: Callable[[str], Path], kernel: tuple[str, str]) -> None:
    entry, row = ENTRIES[kernel[0]], ROWS[kernel[0]]
    with KERNELS[kernel](upstream(entry.checkout)) as make:
        attached = attach(seeded(make), entry, row)
    checks.check_untouched(attached)
    check_footprint(attached, entry)


@pytest.mark.parametrize(
    ("option", "message"),
    [("use_relative_position", "changes its logits"), ("use_causal_attention", "hides other keys from each query")],
)
def test_viewcrafter_is_refused(upstream: Callable[[str], Path], option: str, message: str) -> None:
    name = "ViewCrafter, DynamiCrafter"
    entry = ENTRIES[name]
    with viewcrafter(upstream(entry.checkout), **{option: True}) as make:
        model = seeded(make)
        with pytest.raises(CaptureError, match=message):
            attach(model, entry, ROWS[name])
