"""Tests against the original repositories, which are not part of this one: point CAMEO_UPSTREAM at their folder.

Each checkout lies in that folder under the name of its repository, such as `stable-virtual-camera`. Without the
variable, or without the checkout, these tests skip.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tests.helpers import backbone_checks as checks
from tests.helpers import upstream_cat3d as cat3d
from tests.helpers import upstream_mvdream as mvdream
from tests.helpers import upstream_sv3d as sv3d
from tests.helpers import upstream_zero123plus as zero123plus
from tests.helpers.upstream_imports import imports_from, stand_in, without_xformers, xformers_by_sdpa

VARIABLE = "CAMEO_UPSTREAM"


@pytest.fixture(scope="session")
def upstream() -> Callable[[str], Path]:
    """Folder of a checkout, by the name of its repository; skips where it is absent."""

    def find(name: str) -> Path:
        root = os.environ.get(VARIABLE)
        if not root:
            pytest.skip(f"needs a checkout of {name}; set {VARIABLE} to the folder that holds it")
        folder = Path(root).resolve() / name
        if not folder.is_dir():
            pytest.skip(f"{VARIABLE}={root} holds no checkout called {name}")
        return folder

    return find


@pytest.fixture
def checkout(upstream: Callable[[str], Path]) -> Iterator[Callable[..., Path]]:
    """`checkout(name, *subfolders)`: for the rest of the test, imports come from that checkout first.

    Fixtures of a larger scope use `imports_from` themselves.
    """
    with ExitStack() as stack:

        def enter(name: str, *subfolders: str) -> Path:
            return stack.enter_context(imports_from(upstream(name).joinpath(*subfolders)))

        yield enter


@pytest.fixture
def missing() -> Iterator[Callable[..., ModuleType]]:
    """`missing(name, **attributes)`: for the rest of the test, a stand-in for an import that is not installed."""
    with ExitStack() as stack:
        yield lambda name, **attributes: stack.enter_context(stand_in(name, **attributes))


@pytest.fixture
def xformers() -> Iterator[ModuleType]:
    """For the length of a test, `xformers.ops` whose kernel is PyTorch's; ask for it before importing upstream."""
    with xformers_by_sdpa() as ops:
        yield ops


@pytest.fixture
def no_xformers() -> Iterator[None]:
    """For the length of a test, no xformers, even where it is installed; ask for it before importing upstream."""
    with without_xformers():
        yield


@pytest.fixture
def build_mvdream(
    checkout: Callable[..., Path],
    missing: Callable[..., ModuleType],
    request: pytest.FixtureRequest,
) -> Callable[..., nn.Module]:
    """`build_mvdream(kind, **settings)`: a narrow U-Net of one of `mvdream.KINDS`, of the class of its repository."""

    def make(kind: str, **settings: Any) -> nn.Module:
        if kind == "mvdream-einsum":
            request.getfixturevalue("no_xformers")
        else:
            request.getfixturevalue("xformers")
        missing("pkg_resources")
        if kind.startswith("port"):
            missing("kiui.cam", orbit_camera=None)
            folder = checkout("mvdream_diffusers")
            tokens = {"ip_dim": 16} if kind == "port-imagedream" else {}
            options = {**mvdream.SETTINGS, "num_head_channels": mvdream.HEAD_CHANNELS, **tokens, **settings}
            module = __import__("mv_unet")
        else:
            package = kind.split("-")[0]
            place = ("ImageDream", "extern", "ImageDream") if package == "imagedream" else ("MVDream",)
            folder = checkout(*place)
            heads = {"num_heads": 4} if kind == "mvdream-1.5" else mvdream.LINEAR
            tokens = {"with_ip": True, "ip_dim": 16} if package == "imagedream" else {}
            options = {**mvdream.SETTINGS, **mvdream.LDM, **heads, **tokens, **settings}
            module = __import__(f"{package}.{mvdream.OPENAI}", fromlist=["MultiViewUNetModel"])
        assert Path(inspect.getfile(module)).is_relative_to(folder)
        return mvdream.randomize(module.MultiViewUNetModel(**options))

    return make


@pytest.fixture(scope="module")
def sgm(upstream: Callable[[str], Path]) -> Iterator[SimpleNamespace]:
    """The Python modules around SGM's `VideoUNet`."""
    with sv3d.sgm_modules(upstream("generative-models")) as modules:
        yield modules


@pytest.fixture(scope="module")
def published(upstream: Callable[[str], Path]) -> Iterator[ModuleType]:
    """The file of the published pipeline of Zero123++."""
    with zero123plus.published_module(upstream("zero123plus") / "diffusers-support" / "pipeline.py") as module:
        yield module


@pytest.fixture
def cat3d_modules(checkout: Callable[..., Path], no_xformers: None) -> Callable[[str], SimpleNamespace]:
    """`cat3d_modules(kind)`: the Python modules around the U-Net of one of `cat3d.KINDS`."""
    return lambda kind: cat3d.modules_of(checkout(kind))


KINDS = [
    "zero123plus",
    *(f"cat3d/{kind}" for kind in cat3d.KINDS),
    *(f"mvdream/{kind}" for kind in mvdream.KINDS),
    "sv3d",
    "sv3d/inflated",
]


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
    if backbone == "cat3d":
        found = request.getfixturevalue("cat3d_modules")(kind)
        return checks.Subject(
            backbone,
            build=lambda: cat3d.build(found),
            inputs=lambda _: cat3d.inputs(),
            grids=(cat3d.GRID,) * cat3d.VIEWS,
        )
    if backbone == "mvdream":
        make = request.getfixturevalue("build_mvdream")
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
