"""The published form of Zero123++'s U-Net, and its conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor
from torch import Tensor, nn

import cameo
from cameo.adapters.zero123plus import keep_references
from cameo.adapters.zero123plus.denoiser import ReferenceUNet
from cameo.errors import CaptureError
from tests.helpers import zero123plus_models as parts
from tests.helpers.zero123plus_published import ADAPTER, PublishedWrapper


def published() -> PublishedWrapper:
    return PublishedWrapper(parts.stable_diffusion_unet())


def test_the_published_wrapper_is_recognized() -> None:
    wrapper = published()
    assert ADAPTER.recognizes(wrapper)
    model = cameo.wrap(wrapper, "zero123plus")
    assert [layer.index for layer in model.supervised_layers] == [10]
    assert model.supervised_layers[0].path == "unet.up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    assert model.token_grids(320, 320, 7) == ((32, 32),) + ((20, 20),) * 6
    ours = ReferenceUNet.from_unet(parts.stable_diffusion_unet())
    args, kwargs = small_inputs(wrapper)
    with torch.no_grad():
        assert torch.equal(ours(*args, **kwargs).sample, model(*args, **kwargs).sample)


def small_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs with a reference of 64 pixels instead of 512, which would take long."""
    args, kwargs = ADAPTER.example_inputs(model)
    given = kwargs["cross_attention_kwargs"]
    assert given["cond_lat"].shape[-2:] == (64, 64)
    return args, {"cross_attention_kwargs": {name: value[:, :, :8, :8] for name, value in given.items()}}


def published_gradients(wrapper: nn.Module) -> dict[str, Tensor]:
    model = cameo.wrap(wrapper, "zero123plus", head="mean").train()
    args, kwargs = small_inputs(wrapper)
    match = parts.random_matches(((4, 4),) * 7)
    output = model(*args, **kwargs, correspondence=match).sample
    (output.square().mean() + model.alignment_loss).backward()
    return {name: one.grad for name, one in wrapper.named_parameters() if one.grad is not None}


def test_published_processors_lose_their_references_and_the_cure_works() -> None:
    expected = published_gradients(published())
    wrapper = published()
    wrapper.unet.enable_gradient_checkpointing()
    args, kwargs = small_inputs(wrapper)
    with pytest.raises(KeyError, match=r"attn1\.processor"):  # what would happen
        wrapper(*args, **kwargs).sample.sum().backward()
    with pytest.raises(CaptureError, match=r"KeyError\. Call .*keep_references\(model\)"):
        published_gradients(wrapper)
    wrapper = published()
    wrapper.unet.enable_gradient_checkpointing()
    assert keep_references(wrapper) is wrapper
    assert ADAPTER.recognizes(wrapper)
    assert ADAPTER.unsupported(wrapper) is None
    found = published_gradients(wrapper)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    with pytest.raises(ValueError, match="holds no reference-only processors"):
        keep_references(wrapper)


def test_published_processors_that_are_replaced_are_noticed(tmp_path: Path) -> None:
    wrapper = published()
    model = cameo.wrap(wrapper, "zero123plus").train()
    args, kwargs = small_inputs(wrapper)
    wrapper.unet.set_attn_processor(AttnProcessor2_0())
    message = r"read no reference image.*set_reference_processors\(unet\), after which no switch"
    with pytest.raises(CaptureError, match=message):
        model(*args, **kwargs, correspondence=parts.random_matches(((4, 4),) * 7))
    with pytest.raises(ValueError, match=f"does not fit any more.*{message}"):
        model.save_pretrained(tmp_path / "saved")
    wrapper = keep_references(published())
    expected = wrapper(*args, **kwargs).sample
    wrapper.unet.set_attn_processor(SlicedAttnProcessor(1))
    torch.testing.assert_close(wrapper(*args, **kwargs).sample, expected, atol=1e-5, rtol=1e-4)


def scaled_by_the_number_of_tokens(
    attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None
) -> Tensor:
    return hidden_states * encoder_hidden_states.shape[1]


def test_the_cure_keeps_the_kernels() -> None:
    wrapper = published()
    attention = wrapper.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.processor.chained_proc = scaled_by_the_number_of_tokens
    args, kwargs = small_inputs(wrapper)
    with torch.no_grad():
        before = wrapper(*args, **kwargs).sample
        assert torch.equal(keep_references(wrapper)(*args, **kwargs).sample, before)
