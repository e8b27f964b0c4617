"""What cannot be loaded is explained, and the base stays as it was."""

from __future__ import annotations

import pytest
from diffusers import UNet2DConditionModel
from peft import get_peft_model

import cameo
from cameo.errors import DataError
from tests.helpers.saved_models import ADAPTER, LORA, Net, lora, wrapped, wrapped_lora, wrapped_net


class TestErrors:
    def test_no_such_folder(self):
        with pytest.raises(DataError, match="no such folder, and not the id of a Hub repository"):
            cameo.from_pretrained("nowhere")

    def test_no_config(self, base_folder):
        with pytest.raises(DataError, match=r"cameo_config.json: no such file"):
            cameo.from_pretrained(base_folder)

    @pytest.mark.parametrize("missing", ["adapter_model.safetensors", "adapter_config.json"])
    def test_incomplete_adapter(self, tmp_path, missing):
        folder = wrapped_net(get_peft_model(Net(), lora(target_modules=["to_q"]))).save_pretrained(tmp_path / "rooms")
        (folder / missing).unlink()
        with pytest.raises(DataError, match=missing if missing.endswith("json") else "no weights; expected one of"):
            cameo.from_pretrained(folder, base_model=Net())

    def test_incomplete_full_model(self, tmp_path):
        folder = wrapped(ADAPTER.build("tiny").unet, "preset:tiny").save_pretrained(tmp_path / "rooms")
        (folder / "config.json").unlink()
        with pytest.raises(DataError, match=r"config.json: no such file; the saved model is incomplete"):
            cameo.from_pretrained(folder)

    def test_two_formats(self, tmp_path):
        folder = wrapped_net(Net()).save_pretrained(tmp_path / "rooms")
        (folder / LORA).write_bytes(b"")
        with pytest.raises(DataError, match="several formats"):
            cameo.from_pretrained(folder, base_model=Net())

    @pytest.mark.parametrize("base_model", [None, "preset:tiny"])
    def test_base_unknown(self, base, tmp_path, base_model):
        folder = wrapped_lora(base, base_model).save_pretrained(tmp_path / "rooms")
        with pytest.raises(ValueError, match=r"pass the base as base_model="):
            cameo.from_pretrained(folder)

    def test_base_gone(self, base, tmp_path):
        folder = wrapped_lora(base, tmp_path / "gone").save_pretrained(tmp_path / "rooms", local_base=True)
        with pytest.raises(DataError, match=r"base .*gone': no such folder;.*pass base_model="):
            cameo.from_pretrained(folder)

    def test_matches_no_module(self, base, tmp_path):
        folder = wrapped_lora(base).save_pretrained(tmp_path / "rooms")
        other = UNet2DConditionModel(
            block_out_channels=(32,),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
        )
        before = set(other.state_dict())
        with pytest.raises(ValueError, match=r"matches no module of this UNet2DConditionModel.*another model"):
            cameo.from_pretrained(folder, base_model=other)
        assert set(other.state_dict()) == before

    def test_another_shape(self, base, tmp_path):
        folder = wrapped_lora(base).save_pretrained(tmp_path / "rooms")
        other = ADAPTER.build("tiny", block_out_channels=(64, 64)).unet
        before = set(other.state_dict())
        with pytest.raises(ValueError, match=r"has 96 (in|out)puts, that module .* has 64; pass a base of the trained"):
            cameo.from_pretrained(folder, base_model=other)
        assert set(other.state_dict()) == before

    def test_base_with_an_adapter(self, base, tmp_path):
        folder = wrapped_lora(base).save_pretrained(tmp_path / "rooms")
        with pytest.raises(ValueError, match="carries an adapter already"):
            cameo.from_pretrained(folder, base_model=base)

    def test_wrapped_base(self, tmp_path):
        model = wrapped_net(Net())
        folder = model.save_pretrained(tmp_path / "rooms")
        with pytest.raises(TypeError, match=r"base_model=model.unwrap\(\)"):
            cameo.from_pretrained(folder, base_model=model)
