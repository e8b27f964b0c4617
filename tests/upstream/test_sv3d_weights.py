"""Weights of SGM's `VideoUNet`: `SV3DUNet` computes the same with them, and a checkpoint file becomes a pipeline.

Axes: B samples, V views, T frames, h w token grid, C channels, K heads.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from einops import rearrange
from safetensors.torch import save_file
from torch import nn

from cameo.adapters.sv3d.convert import from_sgm, settings_from_sgm, to_sgm
from cameo.adapters.sv3d.denoiser import SV3DUNet
from cameo.backbone import get_backbone
from cameo.errors import DataError
from tests.helpers.upstream_sv3d import (
    CHANNELS,
    CONTEXT,
    FEATURES,
    FRAMES,
    HEADS,
    SAMPLES,
    arguments,
    build,
)


@pytest.fixture
def double(sgm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SGM's norms and embeddings, which are fixed to float32, go on in float64."""
    monkeypatch.setattr(sgm.util.GroupNorm32, "forward", nn.GroupNorm.forward)
    for module in (sgm.video_model, sgm.video_attention):
        original = module.timestep_embedding
        monkeypatch.setattr(
            module,
            "timestep_embedding",
            lambda *args, _original=original, **kwargs: _original(*args, **kwargs).double(),
        )


@pytest.mark.parametrize("numbers", [1, 3])
@pytest.mark.parametrize(
    "layout", [{}, {"attention_resolutions": [2, 4], "channel_mult": [1, 2, 2], "num_res_blocks": 2}]
)
@pytest.mark.usefixtures("double")
def test_own_unet_computes_the_same(sgm: SimpleNamespace, numbers: int, layout: dict[str, Any]) -> None:
    features = {1: 256, 3: 1280}[numbers]
    theirs = build(sgm, adm_in_channels=features, **layout).double()
    settings = settings_from_sgm(theirs.state_dict(), head_channels=CHANNELS // HEADS)
    ours = SV3DUNet(**settings).double()
    weights = from_sgm(theirs.state_dict(), ours.config)
    ours.load_state_dict(weights)  # all there, nothing else
    back = to_sgm(ours.state_dict(), ours.config)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, back[name]) for name, value in theirs.state_dict().items())

    given = arguments(grid=(4, 6), dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    level = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    angles = 6 * torch.rand(SAMPLES, FRAMES, numbers, generator=generator, dtype=torch.float64)
    embed = sgm.util.timestep_embedding
    widths = (256, 512, 512)[:numbers]
    parts = [embed(angles[..., column].flatten(), width) for column, width in enumerate(widths)]
    context = given["context"].view(SAMPLES, FRAMES, 1, CONTEXT)[:, :1].expand(-1, FRAMES, -1, -1)
    given |= {
        "timesteps": level.repeat_interleave(FRAMES),
        "y": torch.cat(parts, dim=-1).double(),
        "context": context.flatten(0, 1),
    }
    with torch.no_grad():
        expected = theirs(**given)
        sample = rearrange(given["x"], "(b t) c h w -> b t c h w", t=FRAMES)
        output = ours(sample, level, context[:, 0], angles).sample
        swapped = ours(sample, level, context[:, 0], angles.flip(1)).sample
    torch.testing.assert_close(output.flatten(0, 1), expected, rtol=1e-9, atol=1e-9)
    assert (swapped - output).abs().max() > 1e-4  # the angles are looked at, frame by frame


def test_a_checkpoint_file_becomes_a_pipeline(sgm: SimpleNamespace, tmp_path: Path) -> None:
    from tests.helpers.sv3d_models import tiny_vae

    model, adapter = build(sgm), get_backbone("sv3d")
    state = {f"model.diffusion_model.{name}": value for name, value in model.state_dict().items()}
    state["first_stage_model.decoder.conv_in.weight"] = torch.zeros(1)
    file = tmp_path / "sv3d_p.safetensors"
    save_file(state, file)
    built = adapter.load(str(file), vae=tiny_vae(), head_channels=CHANNELS // HEADS)
    assert torch.equal(built.unet.conv_in.weight, model.input_blocks[0][0].weight)
    assert built.unet.config.num_attention_heads == (HEADS, 2 * HEADS)
    assert built.unet.config.projection_class_embeddings_input_dim == FEATURES
    with pytest.raises(ValueError, match=r"vae: .* is read for its U-Net only; pass the VAE"):
        adapter.load(str(file))
    save_file({"time_embed.0.weight": torch.zeros(2)}, file)
    with pytest.raises(DataError, match=r"expected those of SGM's VideoUNet, got none called 'input_blocks.1.0"):
        adapter.load(str(file), vae=tiny_vae())
