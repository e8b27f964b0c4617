"""A layer of each backbone, cut to self-view attention, equals the layer run view by view."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo import TokenLayout
from cameo.adapters.common.joined_frames import deflate
from cameo.errors import CaptureError
from cameo.probing.ablation import _cross_view_layers, self_view_only
from tests.helpers import backbone_checks as checks
from tests.helpers import models
from tests.helpers.backbone_rows import TINY, Row


def _module_call(module: nn.Module) -> tuple[list[Any], Any]:
    """Record the arguments and outputs of a module's calls; returns the list of records and the hook."""
    calls: list[Any] = []
    hook = module.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, dict(kwargs), output)), with_kwargs=True
    )
    return calls, hook


def joint(module: Any, args: Any, kwargs: dict[str, Any], row: Row) -> Tensor:
    """The processor joins `num_views` views; with num_views=1 it attends view by view."""
    return module(*args, **{**kwargs, "num_views": 1})


def tile_by_tile(module: Any, args: Any, kwargs: dict[str, Any], row: Row) -> Tensor:
    """Run each tile of the canvas in its own write pass, without other tiles and without the reference."""
    tiles = {"r": 3, "c": 2, "h": 4, "w": 4}
    tokens = rearrange(args[0], "b (r h c w) d -> (b r c) (h w) d", **tiles)
    output = module(tokens, **{**kwargs, "mode": "w", "ref_dict": {}})
    return rearrange(output, "(b r c) (h w) d -> b (r h c w) d", **tiles)


def frame_by_frame(module: Any, args: Any, kwargs: dict[str, Any], row: Row) -> Tensor:
    """Run every frame of every cell alone."""
    output = module(args[0].flatten(0, 1)[:, None], **kwargs)
    return output[:, 0].unflatten(0, args[0].shape[:2])


def not_joined(module: Any, args: Any, kwargs: dict[str, Any], row: Row) -> Tensor:
    """An inflated layer is given joined tokens by its hooks; here it gets one frame at a time."""
    wrapper_of = nn.ModuleDict({"attn": copy.deepcopy(module)})
    deflate(wrapper_of, "attn")
    tokens = rearrange(args[0], "b (v n) d -> (b v) n d", v=row.views)
    return rearrange(wrapper_of["attn"](tokens, **kwargs), "(b v) n d -> b (v n) d", v=row.views)


VIEW_BY_VIEW = {"cat3d": joint, "mvdream": joint, "zero123plus": tile_by_tile, "sv3d": frame_by_frame}


CROSS_VIEW = [row for row in TINY if not row.wrap.get("own_view")]


@pytest.mark.parametrize("row", CROSS_VIEW, ids=str)
def test_a_layer_of_each_backbone_equals_itself_run_view_by_view(row: Row) -> None:
    subject = row.subject()
    model = subject.wrapped().eval()
    (layer,), inputs = model.supervised_layers, subject.inputs(model.base_model)
    whole = checks.run(model, inputs)
    module = model.base_model.get_submodule(layer.path)
    with torch.no_grad(), self_view_only(model, layer, layer.token_grids(row.size, row.size, row.views)):
        calls, hook = _module_call(module)
        cut = checks.run(model, inputs)
        hook.remove()
    assert not checks.same(cut, whole)
    assert checks.same(checks.run(model, inputs), whole)
    args, kwargs, output = calls[-1]
    alone = not_joined if row.wrap else VIEW_BY_VIEW[row.backbone]
    if row.wrap:  # the hook stands behind the one that separates the frames
        output = rearrange(output, "(b v) n d -> b (v n) d", v=row.views)
    with torch.no_grad():
        expected = alone(module, args, kwargs, row)
    torch.testing.assert_close(output, expected)


def test_a_layer_within_each_view_has_nothing_to_cut() -> None:
    (row,) = (row for row in TINY if row.wrap.get("own_view"))
    model = row.subject().wrapped()
    grids = ((4, 4),) * row.views
    refused = pytest.raises(CaptureError, match="attends within each view, so there is nothing to cut")
    with refused, self_view_only(model, model.supervised_layers[0], grids):
        pass
    assert all("temporal" in layer.path for layer in _cross_view_layers(model))


@pytest.mark.parametrize("row", [row for row in TINY if row.backbone in ("cat3d", "mvdream")], ids=str)
def test_with_every_layer_cut_no_view_depends_on_another(row: Row) -> None:
    subject = row.subject()
    model = subject.wrapped().eval()
    (x, *rest), kwargs = subject.inputs(model.base_model)
    far = x.clone()
    far[1] += 1  # the second view
    with ExitStack() as stack, torch.no_grad():
        for layer in model.attention_layers:
            stack.enter_context(self_view_only(model, layer, layer.token_grids(row.size, row.size, row.views)))
        near, changed = (checks.run(model, ((first, *rest), kwargs))[0] for first in (x, far))
    assert torch.equal(near[0], changed[0])
    assert torch.equal(near[2:], changed[2:])
    assert not torch.equal(near[1], changed[1])
    with torch.no_grad():
        assert not torch.equal(checks.run(model, ((x, *rest), kwargs))[0][0], near[0])


def test_row_wise_and_temporal_layers_of_other_models() -> None:
    """Models without an adapter: one of three calls of the kernel (MV-Adapter), whole rows, frames of a cell."""
    token_grids = (models.GRID,) * models.VIEWS
    torch.manual_seed(0)
    rows, frames = models.RowModel(), models.JointModel()
    for base, arguments, path, layout, call in (
        (rows, (models.frames(), models.VIEWS), "rows", TokenLayout("(b v h) w", key="(b u h) (v w)"), 1),
        (rows, (models.frames(), models.VIEWS), "whole_rows", TokenLayout("(b h) (v w)"), None),
        (frames, (models.frames(), models.VIEWS), "joint", TokenLayout("b (v h w)"), None),
        (frames, (models.frames(), models.VIEWS), "temporal", TokenLayout("(b h w) v"), None),
    ):
        model = cameo.wrap(base, layer=path, layout=layout, heads=models.HEADS, kernel_call=call, normalize="all_views")
        module, (layer,) = base.get_submodule(path), model.supervised_layers
        with torch.no_grad(), self_view_only(model, layer, token_grids):
            calls, hook = _module_call(module)
            model(*arguments)
            hook.remove()
        ((given, _, output),) = calls
        with torch.no_grad():
            if path == "rows":  # with one view, each view is a sample of its own
                expected = module(given[0], given[1], 1, given[3])
            else:
                alone = module(rearrange(given[0], "b (v n) d -> (b v) n d", v=models.VIEWS))
                expected = rearrange(alone, "(b v) n d -> b (v n) d", v=models.VIEWS)
        torch.testing.assert_close(output, expected)
        model.unwrap()
