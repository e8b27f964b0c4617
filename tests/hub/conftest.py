"""The base that saved adapters are loaded into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.helpers.saved_models import ADAPTER, plain_unet


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "base"
    ADAPTER.build("tiny", position="none").save_pretrained(str(folder))  # whole in plain diffusers
    return folder


@pytest.fixture
def base(base_folder: Path) -> UNet2DConditionModel:
    return plain_unet(base_folder)
