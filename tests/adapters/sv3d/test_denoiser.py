"""SV3D's U-Net: one camera per frame, joined layers and LoRA that are saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import cameo
from cameo.adapters.common.noise_schedules import edm_euler
from cameo.adapters.sv3d.denoiser import SV3DUNet
from cameo.adapters.sv3d.pipeline import SV3DPipeline
from cameo.backbone import get_backbone
from cameo.errors import ShapeError
from tests.helpers.models import next_view
from tests.helpers.sv3d_models import BOTH, pipeline, plain_unet, run, tiny_vae


def test_an_inflated_model_is_saved_and_loaded(tmp_path: Path) -> None:
    unet = pipeline(position="none").unet
    model = cameo.wrap(unet, "sv3d", inflate=True).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    expected = run(model)
    for again in (
        cameo.from_pretrained(model.save_pretrained(tmp_path / "cameo"), base_model=pipeline().unet),
        SV3DUNet.from_pretrained(tmp_path / "cameo"),
    ):
        assert torch.equal(run(again), expected)
    pipe = pipeline(position="none")
    pipe.unet = unet
    pipe.save_pretrained(tmp_path / "pipeline")
    assert torch.equal(run(get_backbone("sv3d").load(str(tmp_path / "pipeline")).unet), expected)
    plain = pipeline(position="none").unet
    plain.load_state_dict(unet.state_dict())
    assert not torch.equal(run(plain), expected)


@BOTH
def test_lora_is_saved_as_diffusers_does(inflate: bool, tmp_path: Path) -> None:
    from peft import LoraConfig

    unet = pipeline().unet
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    model = cameo.wrap(unet, "sv3d", inflate=inflate).train()
    run(model, correspondence=next_view(shift=0))
    model.alignment_loss.backward()
    path = model.supervised_layers[0].path
    assert unet.get_submodule(path).to_q.lora_B["default"].weight.grad.any()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = run(model.eval())
    folder = model.save_pretrained(tmp_path)
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    again = cameo.from_pretrained(folder, base_model=pipeline().unet)
    assert torch.equal(run(again), expected)


def fourier(number: float, width: int) -> Tensor:
    """Cosines, then sines, of a number times falling frequencies from 1 to almost 1/10000."""
    angles = number * 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()]).float()


@pytest.mark.parametrize("camera", [True, False])
def test_every_residual_block_gets_the_embedding_of_each_frame(camera: bool) -> None:
    unet = pipeline(camera=camera).unet
    seen: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if name.endswith("time_emb_proj"):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    numbers = torch.rand(2, 3, 3 if camera else 1) * 3
    levels = [0.3, -0.7]
    with torch.no_grad():
        unet(torch.zeros(2, 3, unet.config.in_channels, 8, 8), torch.tensor(levels), torch.zeros(2, 1, 32), numbers)
        expected = torch.zeros(2, 3, 128)
        for sample in range(2):
            for frame in range(3):
                widths = (16, 32, 32) if camera else (16,)
                values = zip(numbers[sample, frame].tolist(), widths, strict=True)
                features = torch.cat([fourier(number, width) for number, width in values])
                time = unet.time_embedding(fourier(levels[sample], 32)[None])
                expected[sample, frame] = F.silu(time + unet.add_embedding(features[None]))[0]
    assert len(seen) == 2 * (2 + 2 + 4)
    for name, found in seen.items():
        found = found if found.ndim == 3 else rearrange(found, "(b t) e -> b t e", t=3)
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_the_camera_of_one_frame_changes_the_output() -> None:
    unet = pipeline().unet
    sample, context = torch.randn(1, 3, unet.config.in_channels, 8, 8), torch.zeros(1, 1, 32)
    numbers = torch.zeros(1, 3, 3)
    with torch.no_grad():
        before = unet(sample, 0.5, context, numbers).sample
        numbers[0, 1, 2] = 2.0
        assert not torch.equal(unet(sample, 0.5, context, numbers).sample, before)
        assert torch.equal(unet(sample, 0.5, context, numbers * 0, return_dict=False)[0], before)
    with pytest.raises(ShapeError, match=r"added_time_ids: expected \[1, 3, 3\] for \[B, T, N\], got \[1, 3\]"):
        unet(sample, 0.5, context, numbers[:, :, 0])
    assert not any(hasattr(block, "frame_embedding") for block in unet.modules())
    with pytest.raises(RuntimeError):
        unet(sample[:, :, :5], 0.5, context, numbers)
    assert not any(hasattr(block, "frame_embedding") for block in unet.modules())


def test_a_plain_unet_becomes_ours_and_shares_its_weights() -> None:
    plain = plain_unet(1280).eval()
    built = SV3DPipeline(plain, edm_euler(), vae=tiny_vae())
    assert isinstance(built.unet, SV3DUNet)
    assert built.unet.conv_in.weight is plain.conv_in.weight
    assert not built.unet.training
    assert built.unet.config.latent_stride == 4
    with pytest.raises(ValueError, match=r"expected addition_time_embed_dim \(SV3D_u\) or 5 times .*got 768 with 256"):
        SV3DPipeline(plain_unet(768), edm_euler(), vae=tiny_vae())
