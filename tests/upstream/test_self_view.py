"""Layers of the published classes, cut to self-view attention."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from cameo.probing.ablation import self_view_only
from tests.helpers import backbone_checks as checks


def view_by_view(module: nn.Module, tokens: Tensor, views: int) -> Tensor:
    """The same attention, called with one view at a time."""
    alone = module(rearrange(tokens, "b (v n) c -> (b v) n c", v=views))
    return rearrange(alone, "(b v) n c -> b (v n) c", v=views)


def test_a_cut_layer_equals_itself_run_view_by_view(
    subject: checks.Subject,
) -> None:
    model = subject.wrapped().eval()
    (layer,), inputs = model.supervised_layers, subject.inputs(model.base_model)
    module, calls = model.base_model.get_submodule(layer.path), []
    with torch.no_grad():
        whole = checks.run(model, inputs)
        with self_view_only(model, layer, subject.grids):
            hook = module.register_forward_hook(lambda _, args, output: calls.append((args[0], output)), prepend=True)
            cut = checks.run(model, inputs)
            hook.remove()
        assert not checks.same(cut, whole)
        assert checks.same(checks.run(model, inputs), whole)
        if subject.backbone == "zero123plus":  # its module joins the reference by itself; tests/probing runs it
            return
        tokens, output = calls[-1]
        if tokens.shape[1] < sum(height * width for height, width in subject.grids):
            return  # its processor joins the views by itself, so the module cannot be called with one of them
        hooks = dict(module._forward_hooks), dict(module._forward_pre_hooks)
        module._forward_hooks.clear(), module._forward_pre_hooks.clear()  # those that join the frames of sv3d/inflated
        expected = view_by_view(module, tokens, len(subject.grids))
        module._forward_hooks.update(hooks[0]), module._forward_pre_hooks.update(hooks[1])
    torch.testing.assert_close(output, expected)
