"""Pictures are written whole, and say why one is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from cameo.backbone import get_backbone
from cameo.data import collate
from cameo.evaluation.match_errors import FoundMatches, find_matches
from cameo.evaluation.pictures import comparison_figure, match_error_figure, save_figure
from cameo.probing.hits import ERROR_CLASSES
from cameo.probing.mode import base_weights
from cameo.training import report
from cameo.training.report import write_pictures
from cameo.training.setup import add_lora, load_pipeline, wrap_denoiser
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
        find_matches(model, batch, inputs, through_head=False)

    class Blind:
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**data[index], "depth": torch.zeros_like(data[index]["depth"])}

    with pytest.warns(UserWarning, match=r"attention.png is left out: batch"):
        files = write_pictures({"one": model}, pipeline, Blind(), make_config(tmp_path), tmp_path)
    assert [path.name for path in files] == ["views.png"]


def test_prediction_is_drawn_pixel_by_pixel_with_its_psnr() -> None:
    batch = make_batch(samples=2, views=3, size=8)
    pixels = torch.zeros(2, 3, 1, 8, 8, dtype=torch.bool)
    pixels[:, :, :, :4] = True
    wrong = batch["images"].clone()
    wrong[:, 1, :, :4] += 0.1
    wrong[:, 1, :, 4:] += 0.3  # not among the pixels
    predictions = {
        "base": {"one step": wrong, "sampled": batch["images"]},
        "trained": {"one step": wrong, "sampled": wrong},
    }
    axes = comparison_figure(batch, predictions, samples=2, pixels=pixels).axes
    assert [axis.get_title() for axis in axes] == ["reference", "truth", "base", "trained", *[""] * 12]
    assert [axes[row].get_ylabel() for row in (0, 4, 8, 12)] == ["one step", "sampled"] * 2
    assert [axis.get_xlabel() for axis in axes[:8]] == ["", "", "20.0 dB", "20.0 dB", "", "", "100.0 dB", "20.0 dB"]
    drawn = axes[10].images[0]  # base of the second sample
    assert torch.equal(torch.from_numpy(drawn.get_array()), wrong[1, 1].clamp(0, 1).permute(1, 2, 0))
    assert drawn.get_interpolation() == "nearest"


def test_errors_are_colored_by_their_distance() -> None:
    batch = make_batch(samples=2, views=2, size=32)
    target = torch.full((2, 16), -1)
    target[1, :6] = 0
    found = torch.zeros(2, 16, dtype=torch.long)
    found[1, :6] = torch.tensor([0, 9, 2, 4 * 16 + 4, 16 * 16 - 1, 17])  # 0, 9, 2, 4, 15 and 1 tokens of 16 x 16 away
    matches = FoundMatches(1, 0, (4, 4), (16, 16), target, found, "mean")
    assert matches.errors[1, :7].tolist() == [0, 9, 2, 4, 15, 1, -1]
    figure = match_error_figure(batch, {"one": matches, "other": matches})
    assert len(figure.axes) == 4  # the first sample has no match
    tokens = figure.axes[2].images[1].get_array().reshape(16, 4)
    expected = [ERROR_CLASSES[least] for least in (0, 8, 2, 4, 8, 1)]
    assert [to_hex(token) for token in tokens[:6]] == expected
    assert not tokens[6:].any()
    assert figure.axes[2].get_title() == "one\n33% within 1 token"
    assert "mean over heads" in figure.get_suptitle()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "the match itself",
        "1 token off",
        "2 to 3 tokens off",
        "4 to 7 tokens off",
        "8 tokens off or more",
        "no match in the key view",
    ]

    through_head = replace(matches, readout="through_head")
    figure = match_error_figure(batch, {"one": matches, "other": through_head})
    assert "heads" not in figure.get_suptitle()
    assert figure.axes[3].get_title() == "other\nthrough the alignment head\n33% within 1 token"


def test_attention_is_read_through_a_trained_head_and_else_as_the_mean(trained: tuple[CameoModel, Any, Any]) -> None:
    model, pipeline, data = trained
    batch = collate([data[0]])
    inputs = pipeline.training_inputs(batch, timesteps=torch.tensor([500]))
    assert find_matches(model, batch, inputs, through_head=True).readout == "through_head"
    assert find_matches(model, batch, inputs, through_head=False).readout == "mean"


def test_the_base_is_the_model_without_its_lora(
    trained: tuple[CameoModel, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, lora_dropout=0.1)
    pipeline, plain = load_pipeline(config), load_pipeline(config)
    add_lora(pipeline.denoiser, config)
    with pytest.raises(ValueError, match="has no PEFT adapter"), base_weights(plain.denoiser):
        pass
    for name, parameter in pipeline.denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    next(parameter for parameter in pipeline.denoiser.parameters() if parameter.requires_grad).requires_grad_(False)
    args, kwargs = get_backbone("cat3d").example_inputs(plain.denoiser)
    required = {name: parameter.requires_grad for name, parameter in pipeline.denoiser.named_parameters()}

    def output(denoiser: Any) -> torch.Tensor:
        with torch.no_grad():
            return denoiser.eval()(*args, **kwargs).sample

    expected, with_lora = output(plain.denoiser), output(pipeline.denoiser)
    assert not torch.equal(with_lora, expected)
    with base_weights(pipeline.denoiser):
        assert torch.equal(output(pipeline.denoiser), expected)
    assert torch.equal(output(pipeline.denoiser), with_lora)
    assert {name: parameter.requires_grad for name, parameter in pipeline.denoiser.named_parameters()} == required

    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr(report, "comparison_figure", lambda batch, views, **_: drawn.append(views) or Figure())
    model, untrained = wrap_denoiser(pipeline, config), wrap_denoiser(plain, config)
    data = trained[2]
    write_pictures({"with CAMEO": model}, pipeline, data, config, tmp_path / "lora", show_base=True)
    write_pictures({"with CAMEO": untrained}, plain, data, config, tmp_path / "plain", show_base=True)
    assert [list(views) for views in drawn] == [["base", "with CAMEO"], ["with CAMEO"]]
    for kind, images in drawn[1]["with CAMEO"].items():
        assert torch.equal(drawn[0]["base"][kind], images)
        assert not torch.equal(drawn[0]["with CAMEO"][kind], images)
