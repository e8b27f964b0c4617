"""What `wrap` and the wrapped model refuse, with the cure."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
from torch import nn

import cameo
from cameo import Correspondence
from cameo.backbone import get_backbone
from cameo.errors import ShapeError
from tests.helpers.wrapped_models import DESCRIBED, LAYER, Toy, hooks, matches, run_loss, shared_unet, tokens, toy


@pytest.mark.parametrize(
    ("match", "message"),
    [
        (matches(grid=(2, 2)), r"another token grid or number of views.*model\.token_grid"),
        (matches(views=3), "another token grid or number of views"),
        (matches(1), r"2 times the batch of the correspondence\. Classifier-free guidance doubles it"),
        (matches(3), "has 3 samples; give the model the same number"),
    ],
    ids=["grid", "views", "guidance", "batch"],
)
def test_a_correspondence_of_another_shape(match: Correspondence, message: str) -> None:
    model = toy()
    with pytest.raises(ShapeError, match=message):
        model(tokens(), correspondence=match)
    with pytest.raises(RuntimeError, match="no alignment loss"):
        _ = model.alignment_loss


def test_a_correspondence_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"expected a cameo\.Correspondence or a list of them, got Tensor"):
        toy()(tokens(), correspondence=matches().index)
    with pytest.raises(TypeError, match="got Tensor"):
        toy()(tokens(), correspondence=[matches().index])


def test_a_second_wrap_is_refused_and_the_cure_works() -> None:
    base = Toy()
    model = cameo.wrap(base, layer=LAYER, layout="b (v h w)")
    for again in (base, model):
        with pytest.raises(ValueError, match=r"this model is wrapped already\. Call \.unwrap\(\) on that CameoModel"):
            cameo.wrap(again, layer=LAYER, layout="b (v h w)")
    second = cameo.wrap(model.unwrap(), layer="blocks.2.attention", layout="b (v h w)")
    assert float(run_loss(second).detach()) > 0
    with pytest.raises(RuntimeError, match="unwrapped already"):
        model.unwrap()
    with pytest.raises(ValueError, match="wrapped already"):  # the old wrapper cannot release it
        cameo.wrap(base, layer=LAYER, layout="b (v h w)")
    assert second.unwrap() is base


def test_the_message_of_a_second_wrap_offers_a_list_of_layers() -> None:
    model = toy()
    with pytest.raises(ValueError, match="pass a list as layer= to supervise several layers"):
        cameo.wrap(model.base_model, layer="blocks.2.attention", layout="b (v h w)")
    both = cameo.wrap(model.unwrap(), layer=[LAYER, "blocks.2.attention"], layout="b (v h w)")
    assert len(both.supervised_layers) == 2


def test_parts_and_wholes_of_a_wrapped_model_are_refused() -> None:
    model = toy()
    with pytest.raises(ValueError, match="model: is part of a Toy that is wrapped already"):
        cameo.wrap(model.base_model.blocks[1], layer="attention", layout="b (v h w)")
    for whole in (nn.Sequential(model), nn.Sequential(model.base_model)):
        with pytest.raises(ValueError, match=r"its submodule '0' is wrapped already"):
            cameo.wrap(whole, layer="0", layout="b (v h w)", heads=2)


def test_a_forgotten_wrapper_does_not_lock_the_model() -> None:
    base = Toy()
    cameo.wrap(base, layer=LAYER, layout="b (v h w)")
    gc.collect()
    model = cameo.wrap(base, layer=LAYER, layout="b (v h w)")
    assert float(run_loss(model).detach()) > 0


def test_a_failed_wrap_does_not_lock_the_model() -> None:
    base = Toy()
    with pytest.raises(ValueError, match="unknown head kind"):
        cameo.wrap(base, layer=LAYER, layout="b (v h w)", head="nlp")
    cameo.wrap(base, layer=LAYER, layout="b (v h w)")


def test_a_copy_of_an_unwrapped_model_can_be_wrapped() -> None:
    model = toy()
    base = copy.deepcopy(model.base_model)
    cameo.wrap(base, layer=LAYER, layout="b (v h w)")
    model.unwrap()
    stale = copy.deepcopy(model)
    cameo.wrap(stale.base_model, layer=LAYER, layout="b (v h w)")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backbone": "cat3"}, ValueError, r"unknown backbone 'cat3': did you mean 'cat3d'\?"),
        ({"backbone": "cat3d", "layer": 4}, ValueError, r"layer 4 does not exist: .* 0 down_blocks\.1\..* 3 up_blocks"),
        ({"backbone": "cat3d", "layer": -1}, ValueError, "layer -1 does not exist: this model has 4"),
        (
            {"backbone": "cat3d", "layer": "mid_block.attentions.0.attn1"},
            ValueError,
            r"unknown layer .*did you mean 'mid_block\.attentions\.0\.transformer_blocks\.0\.attn1'\?",
        ),
        ({"backbone": "cat3d", "layer": True}, ValueError, "unknown layer True"),
        ({"backbone": "cat3d", "layer": []}, ValueError, "got an empty list"),
        ({"backbone": "cat3d", "layer": [1, 1]}, ValueError, "the same layer is named twice"),
        ({"backbone": "cat3d", "layout": "b (v h w)"}, ValueError, "'cat3d' knows them"),
        ({"backbone": "cat3d", "weight": -0.1}, ValueError, "weight: expected a finite factor >= 0, got -0.1"),
        ({"backbone": "cat3d", "weight": float("nan")}, ValueError, "weight: expected a finite factor"),
        ({"backbone": "cat3d", "head": "mpl"}, ValueError, r"unknown head kind 'mpl': did you mean 'mlp'\?"),
        ({"backbone": "cat3d", "head": {"dept": 2}}, ValueError, r"unknown head option 'dept': did you mean 'depth'\?"),
        ({"backbone": "cat3d", "head": {"num_heads": 2}}, ValueError, "unknown head option 'num_heads'"),
        ({"backbone": "cat3d", "normalize": "per_veiw"}, ValueError, r"unknown normalize .*did you mean 'per_view'\?"),
        ({"backbone": "cat3d", "reduction": "means"}, ValueError, r"unknown reduction 'means': did you mean 'mean'\?"),
        ({"backbone": "cat3d", "reduction": "released"}, ValueError, 'num_reference_views: reduction="released" needs'),
        ({}, ValueError, r"backbone=None needs layer= .* and layout="),
        ({"layer": "mid_block"}, ValueError, r"backbone=None needs layer= .* and layout="),
        ({"layer": 3, "layout": "b (v h w)"}, TypeError, "expected a dotted module path, got 3"),
        ({"layer": "mid_block.attn1", "layout": "b (v h w)"}, ValueError, "unknown layer 'mid_block.attn1': did you"),
        ({"layer": "mid_block.attentions.0", "layout": "b (v h w)"}, ValueError, "pass heads= to cameo.wrap"),
        ({"layer": "mid_block.attentions.0", "layout": "b (v h"}, ValueError, r"b \(v h"),
        ({"backbone": "cat3d", "inflate": True}, ValueError, "inflate=True: 'cat3d' has no layer that sees one view"),
        ({**DESCRIBED, "inflate": True}, ValueError, "inflate=True needs an adapter"),
        ({"backbone": "cat3d", "kernel_call": 0}, ValueError, r"kernel_call= describe a model .*'cat3d' knows them"),
        ({**DESCRIBED, "kernel_call": -1}, ValueError, "kernel_call: expected an integer of at least 0, got -1"),
        ({**DESCRIBED, "kernel_call": "1"}, ValueError, "kernel_call: expected an integer of at least 0, got '1'"),
        ({**DESCRIBED, "kernel_call": True}, ValueError, "kernel_call: expected an integer of at least 0, got True"),
        ({**DESCRIBED, "stride": 0}, ValueError, "stride: expected an integer of at least 1, got 0"),
        ({**DESCRIBED, "stride": -8}, ValueError, "stride: expected an integer of at least 1, got -8"),
    ],
)
def test_what_wrap_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    base = shared_unet()
    with pytest.raises(error, match=message):
        cameo.wrap(base, **options)
    assert hooks(base) == 0


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone 'cat3d' does not fit: Toy has no modules named like"):
        cameo.wrap(Toy(), "cat3d")
    pipeline = get_backbone("cat3d").build("tiny", block_out_channels=(16, 16), heads=2, norm_num_groups=8)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got Cat3DPipeline; .*pipeline\.unet"):
        cameo.wrap(pipeline, "cat3d")


def test_a_layer_that_no_match_can_reach_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be supervised with normalize='per_view'.*all_views"):
        cameo.wrap(Toy(), layer=LAYER, layout="(b h w) v", normalize="per_view")
    assert cameo.wrap(Toy(), layer=LAYER, layout="(b h w) v").cameo_config.normalize == "all_views"
    assert cameo.wrap(Toy(), layer=LAYER, layout="(b h) (v w)").cameo_config.normalize == "per_view"
