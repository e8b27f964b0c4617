"""How a CAT3D-style model is told the cameras."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from tests.helpers.cat3d_models import SIZE, batch, pipeline


def test_rays_are_in_the_frame_of_the_first_camera() -> None:
    built, given = pipeline(), batch()
    condition = built.condition(given["intrinsics"], given["extrinsics"], 1, (SIZE, SIZE))
    direction, moment = condition[:, :, 1:4], condition[:, :, 4:]
    torch.testing.assert_close(direction.norm(dim=2), torch.ones_like(direction[:, :, 0]))
    assert not moment[:, 0].any()  # the first camera stands at the origin
    assert moment[:, 1].any()
    turned = torch.eye(4)
    turned[:3, :3] = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    turned[:3, 3] = torch.tensor([3.0, 1, -2])
    moved = built.condition(given["intrinsics"], given["extrinsics"] @ turned, 1, (SIZE, SIZE))
    torch.testing.assert_close(moved, condition, atol=1e-5, rtol=1e-5)  # the choice of the world does not matter


def test_condition_dropout_blanks_the_rays_and_keeps_the_mask() -> None:
    built, given = pipeline(), batch(samples=8)
    plain = built.training_inputs(given, generator=torch.Generator().manual_seed(0))
    channels = plain.noisy.shape[2]

    def condition(share: float) -> Tensor:
        inputs = built.training_inputs(given, generator=torch.Generator().manual_seed(0), condition_dropout=share)
        assert torch.equal(inputs.noisy, plain.noisy)
        assert torch.equal(inputs.timesteps, plain.timesteps)
        return rearrange(inputs.args[0][:, channels:], "(b v) c h w -> b v c h w", b=8)

    full = rearrange(plain.args[0][:, channels:], "(b v) c h w -> b v c h w", b=8)
    assert not condition(1)[:, :, 1:].any()
    assert torch.equal(condition(1)[:, :, :1], full[:, :, :1])
    kept = condition(0.5)[:, :, 1:].flatten(1).any(1)
    assert 0 < int(kept.sum()) < 8
    assert torch.equal(condition(0.5)[kept], full[kept])
