"""The checks that every backbone has to pass, on the classes as their authors published them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import backbone_checks as checks

from . import test_mvdream as mvdream
from . import test_sv3d as sv3d
from . import test_zero123plus as zero123plus
from .test_mvdream import build  # noqa: F401 - a fixture
from .test_sv3d import sgm  # noqa: F401 - a fixture
from .test_zero123plus import published  # noqa: F401 - a fixture

KINDS = ["zero123plus", *(f"mvdream/{kind}" for kind in mvdream.KINDS), "sv3d", "sv3d/inflated"]


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest) -> checks.Subject:
    backbone, _, kind = request.param.partition("/")
    if backbone == "zero123plus":
        module = request.getfixturevalue("published")
        return checks.Subject(
            backbone,
            build=lambda: zero123plus.wrapper(module, width=32),  # 8 would be too narrow to learn random matches
            inputs=lambda _: zero123plus.inputs(samples=1),
            grids=(zero123plus.REFERENCE, *(zero123plus.TILE,) * 6),
        )
    if backbone == "mvdream":
        make = request.getfixturevalue("build")
        return checks.Subject(
            backbone,
            build=lambda: make(kind),
            inputs=lambda unet: ((), mvdream.inputs_of(unet, samples=1)),
            grids=((4, 4),) * (4 if "imagedream" in kind else 3),
        )
    modules = request.getfixturevalue("sgm")
    return checks.Subject(
        backbone,
        build=lambda: sv3d.build(modules),
        inputs=lambda _: ((), sv3d.arguments(samples=1)),
        grids=(sv3d.GRID,) * sv3d.FRAMES,
        wrap={"inflate": True} if kind else {},
    )


def test_the_output_is_untouched(subject: checks.Subject) -> None:
    checks.check_output_is_untouched(subject)


def test_the_gradient_reaches_what_it_should(subject: checks.Subject) -> None:
    checks.check_gradient(subject)


def test_a_deepcopy_stands_on_its_own(subject: checks.Subject) -> None:
    checks.check_copies(subject)


def test_one_batch_is_overfitted_with_lora_alone(subject: checks.Subject) -> None:
    checks.check_lora_overfits(subject)


def test_lora_is_saved_and_loaded_bit_for_bit(subject: checks.Subject, tmp_path: Path) -> None:
    checks.check_lora_round_trip(subject, tmp_path / "lora")
