"""The names of SV3D's weights in SGM and in diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel

from cameo.adapters.sv3d.convert import from_sgm, to_sgm
from cameo.errors import DataError
from tests.helpers.sv3d_models import pipeline


def test_names_of_the_weights_are_those_of_diffusers() -> None:
    unet = pipeline().unet
    config = {name: value for name, value in unet.config.items() if name not in ("latent_stride", "joined_layers")}
    plain = UNetSpatioTemporalConditionModel.from_config(config)
    assert {name: value.shape for name, value in plain.state_dict().items()} == {
        name: value.shape for name, value in unet.state_dict().items()
    }
    weights = from_sgm(to_sgm(unet.state_dict(), unet.config), unet.config)
    assert all(torch.equal(weights[name], value) for name, value in unet.state_dict().items())
    with pytest.raises(DataError, match=r"weights: 'input_blocks\.9\.0\.op\.weight' has no counterpart"):
        from_sgm({"input_blocks.9.0.op.weight": torch.zeros(1)}, unet.config)
