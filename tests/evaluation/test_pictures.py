"""Pictures are written whole, and say why one is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cameo.evaluation.pictures import attention_figure, comparison_figure, save_figure
from cameo.training.report import write_pictures
from cameo.wrap import CameoModel
from tests.helpers.batches import make_batch
from tests.helpers.training_runs import make_config


def test_pictures_are_whole_png_files(
    trained: tuple[CameoModel, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pipeline, data = trained
    config = make_config(tmp_path, num_validation_images=2)
    files = write_pictures({"one": model, "two": model}, pipeline, data, config, tmp_path / "pictures")
    assert [path.name for path in files] == ["views.png", "attention.png"]
    for path in files:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(10**6)) > 50  # not blank
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["attention.png", "views.png"]
    assert model.training

    before = files[0].read_bytes()
    batch = make_batch(samples=1, views=2, size=32)
    figure = comparison_figure(batch, {"one": torch.zeros(1, 2, 3, 32, 32)})

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        save_figure(figure, files[0])
    assert files[0].read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["attention.png", "views.png"]


def test_attention_picture_of_views_that_share_nothing(trained: tuple[CameoModel, Any, Any], tmp_path: Path) -> None:
    model, pipeline, data = trained
    batch = make_batch(samples=1, views=2, size=32)
    batch["depth"].zero_()
    inputs = pipeline.training_inputs(batch, timesteps=torch.tensor([500]))
    with pytest.raises(
        ValueError, match=r"batch \['wall-0'\]: no token of a target view has a match in a reference view"
    ):
        attention_figure({"one": model}, batch, inputs)

    class Blind:
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**data[index], "depth": torch.zeros_like(data[index]["depth"])}

    with pytest.warns(UserWarning, match=r"attention.png is left out: batch"):
        files = write_pictures({"one": model}, pipeline, Blind(), make_config(tmp_path), tmp_path)
    assert [path.name for path in files] == ["views.png"]
