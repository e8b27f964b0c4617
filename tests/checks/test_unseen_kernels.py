"""Another attention that runs unseen beside the supervised call is found, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cameo
from cameo import CameoModel, Correspondence, TokenLayout
from cameo.errors import CaptureError
from tests.helpers import attention_kernels as kernels
from tests.helpers import backbone_checks as checks
from tests.helpers import video_transformers as video
from tests.helpers.attention_kernels import beside_unseen, sdpa
from tests.helpers.backbone_rows import Row, every_tiny
from tests.helpers.captured_models import WIDTH, make_model
from tests.helpers.models import JointModel, RowModel, frames, next_view

SAMPLES, VIEWS, GRID = 2, 3, (2, 2)
FOUND = r"layer '.*': another attention runs unseen in this module.*set_attention_backend\(\"native\"\)"
MATCHES = Correspondence(torch.full((SAMPLES, VIEWS, VIEWS, 4), -1), (GRID,) * VIEWS)


def tokens() -> Tensor:
    return torch.randn(SAMPLES, VIEWS * 4, WIDTH, generator=torch.Generator().manual_seed(3))


def wrapped(kernel: Callable[..., Tensor] = sdpa, **options: Any) -> CameoModel:
    return cameo.wrap(make_model(kernel), layer="second", layout="b (v h w)", heads=kernels.HEADS, **options)


def answer(model: CameoModel, *args: Any, correspondence: Any = MATCHES, **kwargs: Any) -> str:
    """What is known of the only layer after a forward."""
    model(*args, correspondence=correspondence, **kwargs)
    return model._unseen.answers[model.supervised_layers[0].path]


def test_an_unseen_kernel_beside_a_seen_one_of_the_same_shape() -> None:
    """The stand-in whose visible call was supervised without a word."""
    model = wrapped(lambda q, k, v: kernels.unseen(q, k, v) + sdpa(q.flip(1), k, v))
    with pytest.raises(CaptureError, match=FOUND):
        model(tokens(), correspondence=MATCHES)


@pytest.mark.parametrize("kernel", [sdpa, *kernels.PLAIN, *kernels.WITH_XFORMERS], ids=lambda kernel: kernel.__name__)
def test_every_seen_kernel_alone_and_beside_an_unseen_one(
    kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.install_xformers(monkeypatch)
    assert answer(wrapped(kernel), tokens()) == ""
    with pytest.raises(CaptureError, match=FOUND):
        wrapped(beside_unseen(kernel))(tokens(), correspondence=MATCHES)


# Layouts


def mixed(x: Tensor) -> Tensor:
    """Attention among all tokens `[A, L, C]` of a batch, by a kernel that nothing sees."""
    tokens = x.flatten(0, 1)
    with torch._C.DisableTorchFunction():
        return ((tokens @ tokens.mT * 0.1).softmax(-1) @ tokens).view_as(x)


def plant(attention: nn.Module) -> None:
    """Let a module add the output of an unseen kernel to its own."""
    forward = attention.forward
    attention.forward = lambda x, *args, **kwargs: forward(x, *args, **kwargs) + mixed(x)


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "joint": (JointModel, "joint", {"layout": "b (v h w)"}),
    "temporal": (JointModel, "temporal", {"layout": "(b h w) v"}),
    "own keys": (
        RowModel,
        "rows",
        {"layout": TokenLayout("(b v h) w", key="(b u h) (v w)"), "kernel_call": 1},
    ),
    "whole rows": (RowModel, "whole_rows", {"layout": "(b h) (v w)"}),
}


@pytest.mark.parametrize(("build", "layer", "options"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_kind_of_layout(build: Callable[[], nn.Module], layer: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = cameo.wrap(build(), layer=layer, **options)
    assert answer(model, frames(), 3, correspondence=next_view()) == ""
    plant(model.unwrap().get_submodule(layer))
    model = cameo.wrap(model.base_model, layer=layer, **options)
    with pytest.raises(CaptureError, match=FOUND):
        model(frames(), 3, correspondence=next_view())


@every_tiny
def test_every_layer_of_every_backbone(row: Row) -> None:
    subject = row.subject()
    denoiser = subject.build()
    layers = cameo.backbone.get_backbone(row.backbone).layers_for(denoiser, **row.wrap)
    paths = [layer.path for layer in layers if layer.unsupported is None]
    model = subject.wrapped(denoiser, layer=paths, normalize="all_views").train()
    matches = [
        checks.random_matches(layer.token_grids(row.size, row.size, row.views)) for layer in model.supervised_layers
    ]
    checks.run(model, subject.inputs(denoiser), correspondence=matches)
    assert model._unseen.answers == dict.fromkeys(paths, "")


@every_tiny
def test_an_unseen_kernel_in_every_backbone(row: Row) -> None:
    subject = row.subject()
    model = subject.wrapped().train()
    plant(model.base_model.get_submodule(model.supervised_layers[0].path))
    with pytest.raises(CaptureError, match=FOUND):
        checks.run(model, subject.inputs(model.base_model), correspondence=checks.matches_for(model, row.grids))


@pytest.mark.parametrize("kind", video.TRANSFORMERS.values(), ids=video.TRANSFORMERS)
def test_transformers_of_diffusers(kind: video.Transformer) -> None:
    model = cameo.wrap(kind.model(), layer=kind.layer, layout=kind.layout)
    matches = checks.random_matches((video.GRID,) * video.VIEWS)
    latents = torch.randn(1, video.VIEWS, 4, *video.GRID, generator=torch.Generator().manual_seed(0))
    assert answer(model, **kind.inputs(latents), correspondence=matches) == ""
