"""The blind test: pictures of scenes that a run has not used, their key, and their judgment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks.convergence import blind
from cameo.training.data import build_dataset
from cameo.training.output_folder import WITHOUT_CAMEO
from cameo.training.settings import save_config
from cameo.training.setup import add_lora, load_pipeline, wrap_denoiser
from tests.helpers.sequences import write_sequence
from tests.helpers.training_runs import fresh_accelerate, make_config, scene_cache


@pytest.fixture(autouse=True)
def _shared_scenes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    with fresh_accelerate():
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished comparison, whose two adapters differ."""
    for folder, loss_weight in ((tmp_path, 0.1), (tmp_path / WITHOUT_CAMEO, 0.0)):
        config = make_config(folder, loss_weight=loss_weight)
        pipeline = load_pipeline(config)
        add_lora(pipeline.denoiser, config)
        for name, parameter in pipeline.denoiser.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.1 + loss_weight)
        wrap_denoiser(pipeline, config).save_pretrained(folder / "adapter")
        save_config(config, folder / "config.yaml")
    return tmp_path


def test_pictures_are_in_the_order_of_the_key(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[dict[str, Any]] = []
    draws = iter([0, 1, 1])
    monkeypatch.setattr(blind.secrets, "randbelow", lambda _: next(draws))
    monkeypatch.setattr(blind, "comparison_figure", lambda batch, views, **_: drawn.append(views) or Figure())
    blind.main([str(run), "--scenes", "3"])
    assert sorted(path.name for path in (run / "blind").iterdir()) == [
        "key.json",
        *(f"scene-0{n}.png" for n in (1, 2, 3)),
    ]
    text = capsys.readouterr().out
    assert "with" not in text
    key = json.loads((run / "blind" / "key.json").read_text())
    assert key["columns"] == [["without CAMEO", "with CAMEO"], *[["with CAMEO", "without CAMEO"]] * 2]
    samples = blind.unseen_samples(make_config(run), 3)
    assert [sample["key"] for sample in samples] == key["samples"]
    expected = {
        name: blind._images(blind._load(folder), samples)
        for name, folder in (("with CAMEO", run), ("without CAMEO", run / WITHOUT_CAMEO))
    }
    for place, (order, views) in enumerate(zip(key["columns"], drawn, strict=True)):
        for side, name in zip(("left", "right"), order, strict=True):
            assert list(views[side]) == ["one-step prediction", "sampled in 2 steps"]
            for kind, images in views[side].items():
                assert torch.equal(images[0], expected[name][kind][place])
    assert not torch.equal(drawn[0]["left"]["one-step prediction"], drawn[0]["right"]["one-step prediction"])

    with pytest.raises(SystemExit, match="expected one letter, L or R, for each of 3 scenes"):
        blind.judge(run, "LR")
    with pytest.raises(SystemExit, match="holds pictures already"):
        blind.draw(run, 3)
    blind.main([str(run), "--answers", "rll"])
    assert capsys.readouterr().out == "hits 3 of 3, two-sided binomial p = 0.250; key RLL\n"
    with pytest.raises(SystemExit, match="was judged already"):
        blind.judge(run, "RLL")


def test_no_pictures_of_an_unfinished_run(run: Path) -> None:
    with pytest.raises(SystemExit, match="draw the pictures first"):
        blind.judge(run, "LR")
    (run / WITHOUT_CAMEO / "adapter").rename(run / "moved")
    with pytest.raises(SystemExit, match=r"without_cameo/adapter: not found; expected .* compare_without_cameo=true"):
        blind.draw(run, 3)


def test_samples_are_those_that_the_run_has_not_used(tmp_path: Path) -> None:
    config = make_config(tmp_path, num_validation_scenes=4)
    samples = blind.unseen_samples(config, 2)
    assert sorted(sample["scene"] for sample in samples) == [4, 5]

    sequence = write_sequence(tmp_path / "office")
    config = make_config(tmp_path, train_data_dir=str(sequence), max_overlap=0.99)
    held_out = build_dataset(config, "validation")
    used = {held_out[index]["key"] for index in range(config.num_validation_samples)}
    found = [sample["key"] for sample in blind.unseen_samples(config, 1)]
    assert not used & set(found)
    with pytest.raises(SystemExit, match="--scenes 99: the held-out data has"):
        blind.unseen_samples(config, 99)
