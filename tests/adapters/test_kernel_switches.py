"""diffusers' switches for attention kernels on models whose views are joined: the kernel changes, and nothing else."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn

import cameo
from cameo.adapters.common.joint_views import JointAttention, JointViewAttnProcessor, inflate
from cameo.adapters.mvdream.denoiser import ImageTokenAttnProcessor
from cameo.adapters.zero123plus import set_reference_processors
from cameo.adapters.zero123plus.layers import ReferenceAttention, ReferenceAttnProcessor
from cameo.backbone import get_backbone
from cameo.errors import ShapeError
from tests.helpers import cat3d_models, mvdream_models, sv3d_models, zero123plus_models
from tests.helpers.attention_kernels import install_xformers
from tests.helpers.batches import make_batch

FAMILIES = ["cat3d", "cat3d/transformer", "mvdream", "mvdream/imagedream", "zero123plus", "sv3d"]
EACH = pytest.mark.parametrize("family", FAMILIES)


def build(family: str) -> Any:
    """A narrow pipeline of a family, of which every weight is random: fresh ones have layers of zeros."""
    if family == "cat3d/transformer":
        built = get_backbone("cat3d").build("transformer-tiny", image_size=32, width=16, blocks=2, heads=2)
    elif family == "cat3d":
        built = cat3d_models.pipeline()
    elif family == "mvdream":
        built = mvdream_models.pipeline()
    elif family == "mvdream/imagedream":
        built = mvdream_models.with_image_tokens()
    elif family == "zero123plus":
        built = zero123plus_models.pipeline()
    else:
        built = sv3d_models.pipeline()
        adapter = get_backbone("sv3d")
        adapter.inflate(built.unet, adapter.inflatable_layers(built.unet)[0].path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.unet.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    built.unet.eval()
    return built


def adapter_of(family: str) -> Any:
    return get_backbone(family.partition("/")[0])


@torch.no_grad()
def influence(family: str, unet: nn.Module) -> Tensor:
    """What changing view 0 does to the output of the other views."""
    args, kwargs = adapter_of(family).example_inputs(unet)
    before = unet(*args, **kwargs).sample
    if family == "zero123plus":
        given = kwargs["cross_attention_kwargs"]
        kwargs = {"cross_attention_kwargs": {**given, "cond_lat": given["cond_lat"] + 1}}
        return unet(*args, **kwargs).sample - before
    sample = args[0].clone()
    views = sample[0] if sample.ndim == 5 else sample
    views[0] += 1
    changed = unet(sample, *args[1:], **kwargs).sample
    return (changed - before)[:, 1:] if sample.ndim == 5 else (changed - before)[1:]


def batch(family: str, built: Any) -> dict[str, Any]:
    if family.startswith("mvdream"):
        return mvdream_models.batch(built)
    if family == "zero123plus":
        return zero123plus_models.batch(samples=1)
    return sv3d_models.batch() if family == "sv3d" else make_batch(samples=1, size=32)


def sample(family: str, built: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return built.sample(batch(family, built), num_inference_steps=1, generator=generator)


def assign(built: Any) -> None:
    for module in built.unet.modules():
        if isinstance(module, Attention) and not isinstance(module.processor, nn.Module):
            module.processor = AttnProcessor()


SWITCHES: dict[str, Callable[[Any], Any]] = {
    "slicing of the pipeline": lambda built: built.enable_attention_slicing(1),
    "slicing of each attention": lambda built: built.unet.set_attn_processor(SlicedAttnProcessor(1)),
    "PyTorch's kernel": lambda built: built.unet.set_attn_processor(AttnProcessor2_0()),
    "no kernel": lambda built: built.unet.set_attn_processor(AttnProcessor()),
    "by assignment": assign,
    "xformers": lambda built: built.unet.set_attn_processor(XFormersAttnProcessor()),
    "xformers off": lambda built: built.unet.set_use_memory_efficient_attention_xformers(False),
    "backend": lambda built: built.unet.set_attention_backend("_native_math"),
    "the pipeline's own": lambda built: built.enable_xformers_memory_efficient_attention(),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for xformers, whose kernel is for CUDA, and diffusers' backend put back afterwards."""
    install_xformers(monkeypatch)
    monkeypatch.setattr(attention_processor, "xformers", sys.modules["xformers"])
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@EACH
@pytest.mark.parametrize("switch", SWITCHES)
def test_the_views_stay_joined(family: str, switch: str) -> None:
    built = build(family)
    before, sampled = influence(family, built.unet), sample(family, built)
    assert before.abs().amax() > 1e-3
    SWITCHES[switch](built)
    torch.testing.assert_close(influence(family, built.unet), before, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sample(family, built), sampled, atol=1e-4, rtol=1e-4)


@EACH
def test_the_kernel_is_switched(family: str) -> None:
    """The test above would pass if the switches did nothing."""
    unet = build(family).unet
    unet.set_attn_processor(SlicedAttnProcessor(1))
    kinds = {type(processor) for processor in unet.attn_processors.values()}
    assert kinds - {ImageTokenAttnProcessor} == {SlicedAttnProcessor}
    assert (ImageTokenAttnProcessor in kinds) == (family == "mvdream/imagedream")


@pytest.mark.parametrize("family", ["cat3d", "mvdream"])
def test_fused_projections_keep_the_views_joined(family: str) -> None:
    unet = build(family).unet
    before = influence(family, unet)
    unet.fuse_qkv_projections()
    assert FusedAttnProcessor2_0 in {type(processor) for processor in unet.attn_processors.values()}
    torch.testing.assert_close(influence(family, unet), before, atol=1e-5, rtol=1e-4)
    unet.unfuse_qkv_projections()
    torch.testing.assert_close(influence(family, unet), before, atol=1e-5, rtol=1e-4)


@EACH
def test_what_is_saved_after_a_switch_is_joined(family: str, tmp_path: Path) -> None:
    built = build(family)
    before = influence(family, built.unet)
    built.unet.set_attn_processor(SlicedAttnProcessor(1))
    assert adapter_of(family).recognizes(built.unet)
    built.save_pretrained(tmp_path / "pipeline")
    loaded = type(built).from_pretrained(tmp_path / "pipeline")
    torch.testing.assert_close(influence(family, loaded.unet.eval()), before, atol=1e-5, rtol=1e-4)
    model = cameo.wrap(
        built.unet, family.partition("/")[0], **({"inflate": True, "layer": 0} if family == "sv3d" else {})
    )
    model.save_pretrained(tmp_path / "cameo")
    again = cameo.from_pretrained(tmp_path / "cameo", base_model=build(family).unet)
    torch.testing.assert_close(influence(family, again.base_model.eval()), before, atol=1e-5, rtol=1e-4)


@EACH
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_copies_stay_joined(family: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    unet = build(family).unet
    before = influence(family, unet)
    twin = duplicate(unet)
    twin.set_attn_processor(AttnProcessor2_0())  # type: ignore[operator]
    torch.testing.assert_close(influence(family, twin), before, atol=1e-5, rtol=1e-4)
    assert adapter_of(family).recognizes(twin)


def test_a_switch_before_the_views_are_joined() -> None:
    unet = cat3d_models.stable_diffusion_unet()
    unet.set_attn_processor(SlicedAttnProcessor(1))
    inflate(unet)
    assert {type(processor) for processor in unet.attn_processors.values()} == {SlicedAttnProcessor}
    assert influence("cat3d", unet).abs().amax() > 1e-3


def test_attentions_that_join_in_a_way_of_their_own_are_refused() -> None:
    class Other(Attention):
        pass

    unet = cat3d_models.stable_diffusion_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.__class__ = Other
    for join in (inflate, set_reference_processors):
        with pytest.raises(TypeError, match=r"mid_block.*attn1.*: expected diffusers' Attention, got Other"):
            join(unet)
        assert {type(one) for one in unet.modules() if isinstance(one, Attention)} == {Attention, Other}  # none changed


def test_processors_with_weights_stay() -> None:
    built = build("mvdream/imagedream")
    kept = {name: one for name, one in built.unet.attn_processors.items() if isinstance(one, nn.Module)}
    assert len(kept) == 4
    built.enable_xformers_memory_efficient_attention()
    built.unet.set_attn_processor(AttnProcessor())
    assert all(built.unet.attn_processors[name] is one for name, one in kept.items())

    class OfAnotherKind(AttnProcessor):
        pass

    with pytest.raises(ValueError, match=r"got OfAnotherKind, which attends to no image tokens.*self-attentions alone"):
        built.unet.set_attn_processor(OfAnotherKind())


def former(kind: type, **attributes: Any) -> Any:
    """A processor as an earlier release pickled it."""
    made = kind.__new__(kind)
    vars(made).update(attributes)
    return made


def test_a_joined_unet_pickled_by_an_earlier_release() -> None:
    expected = build("cat3d").unet
    unet = type(expected).from_config(expected.config).eval()
    unet.load_state_dict(expected.state_dict())
    unet.conv_in = copy.deepcopy(expected.conv_in)  # with its map of positions
    unet.set_attn_processor(
        {
            name: former(
                JointViewAttnProcessor,
                join=name.endswith("attn1.processor"),
                latent_stride=4,
                use_xformers=False,
                _sdpa=AttnProcessor2_0(),
                _xformers=None,
            )
            for name in unet.attn_processors
        }
    )
    model = cameo.wrap(pickle.loads(pickle.dumps(unet)), "cat3d")
    assert model.token_grid(32, 32) == (4, 4)
    assert torch.equal(influence("cat3d", model.base_model), influence("cat3d", expected))
    assert {type(processor) for processor in model.base_model.attn_processors.values()} == {AttnProcessor2_0}
    assert model.token_grid(32, 32) == (4, 4)
    assert all(isinstance(one, JointAttention) for one in model.base_model.modules() if isinstance(one, Attention))
    with pytest.warns(FutureWarning, match=r"JointViewAttnProcessor is replaced by .*inflate\(unet\)"):
        processor = JointViewAttnProcessor(join=True)
    attention = Attention(query_dim=8, heads=2, dim_head=4, processor=processor)
    with pytest.raises(ShapeError, match="num_views"):
        attention(torch.zeros(4, 2, 8), num_views=3)


def test_a_unet_with_references_pickled_by_an_earlier_release() -> None:
    expected = build("zero123plus").unet
    unet = copy.deepcopy(expected)
    for name in unet.attn_processors:
        attention = unet.get_submodule(name.removesuffix(".processor"))
        settings = {key: vars(attention).pop(key) for key in ("name", "reads", "latent_stride", "reference_size")}
        attention.__class__ = Attention
        attention.set_processor(
            former(ReferenceAttnProcessor, **settings, _kernel=AttnProcessor2_0(), _cuda_kernel=None)
        )
    model = cameo.wrap(pickle.loads(pickle.dumps(unet)), "zero123plus")
    before = model.token_grids(32, 32, 7)
    assert torch.equal(influence("zero123plus", model.base_model), influence("zero123plus", expected))
    assert model.token_grids(32, 32, 7) == before == cameo.wrap(expected, "zero123plus").token_grids(32, 32, 7)
    assert all(isinstance(one, ReferenceAttention) for one in model.base_model.modules() if isinstance(one, Attention))
    with pytest.warns(FutureWarning, match=r"ReferenceAttnProcessor is replaced by .*set_reference_processors\(unet\)"):
        ReferenceAttnProcessor("a", reads=True)
