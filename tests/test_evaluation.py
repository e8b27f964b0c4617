"""The shared evaluation: attention precision, covisible pixels, validation, pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cameo.alignment import AlignmentHead
from cameo.correspondence import Correspondence
from cameo.data import MultiViewDataset, collate
from cameo.errors import DataError
from cameo.evaluation.attention import attention_hits, attention_maps
from cameo.evaluation.mode import evaluation_mode
from cameo.evaluation.pictures import attention_figure, comparison_figure, save_figure
from cameo.evaluation.validation import ValidationSettings, covisible_pixels, validate
from cameo.training.data import build_dataset
from cameo.training.setup import load_pipeline, wrap_denoiser, write_pictures
from cameo.wrap import CameoModel
from tests.conftest import make_batch
from tests.training_runs import fresh_accelerate, make_config, scene_cache

LEVELS = (0.5, 0.95, 1.0)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    with fresh_accelerate():
        yield


def random_match(samples: int = 2, views: int = 3, side: int = 4, seed: int = 0) -> Correspondence:
    generator = torch.Generator().manual_seed(seed)
    tokens = side * side
    index = torch.randint(-1, tokens, (samples, views, views, tokens), generator=generator)
    index[:, range(views), range(views)] = -1
    return Correspondence(index, sizes=((side, side),) * views)


def one_hot(target: Tensor, tokens: int) -> Tensor:
    """Attention `[B, 1, V, N, V, N]` that looks at `target` `[B, V, V, N]`."""
    return torch.nn.functional.one_hot(target.clamp_min(0), tokens).float().permute(0, 1, 3, 2, 4)[:, None]


def test_oracle_attention_hits_always_and_shifted_attention_as_geometry_says() -> None:
    match = random_match()
    hits, pairs = attention_hits({"mean": one_hot(match.index, 16)}, match)
    assert pairs == int((match.index >= 0).sum())
    assert hits["mean"].tolist() == [[pairs, pairs]]

    # One column to the right: never exact; within one token unless the shift wraps into the next row's first column.
    shifted = (match.index + 1) % 16
    hits, pairs = attention_hits({"mean": one_hot(shifted, 16)}, match)
    columns = match.index[match.visible] % 4
    assert hits["mean"].tolist() == [[0, int((columns < 3).sum())]]

    # Two rows down, within two tokens where it stays inside.
    lower = match.index + 8
    hits, _ = attention_hits({"mean": one_hot(lower % 16, 16)}, match, within=(1, 2))
    rows = match.index[match.visible] // 4
    assert hits["mean"].tolist() == [[0, int((rows < 2).sum()) + int((rows >= 2).sum())]]  # wraps: two rows up


def test_random_attention_hits_at_chance() -> None:
    match = random_match(samples=40)
    attention = torch.rand(40, 2, 3, 16, 3, 16, generator=torch.Generator().manual_seed(1))
    hits, pairs = attention_hits({"best_head": attention}, match)
    # Chance within one token: the number of neighbours, edges included, of each true token, over all tokens.
    neighbours = 0
    for token in match.index[match.visible].tolist():
        row, column = divmod(token, 4)
        neighbours += sum(abs(row - r) <= 1 and abs(column - c) <= 1 for r in range(4) for c in range(4))
    expected = torch.tensor([1 / 16, neighbours / pairs / 16])
    # Some 3600 pairs: the standard error of a share is below 0.009.
    torch.testing.assert_close(hits["best_head"] / pairs, expected.expand(2, 2), rtol=0, atol=0.03)


def test_uniform_attention_is_no_more_than_its_first_token() -> None:
    match = random_match()
    hits, pairs = attention_hits({"mean": torch.full((2, 1, 3, 16, 3, 16), 1 / 16)}, match)
    targets = match.index[match.visible]
    assert hits["mean"].tolist() == [
        [int((targets == 0).sum()), int(torch.isin(targets, torch.tensor([0, 1, 4, 5])).sum())]
    ]
    assert hits["mean"][0, 0] / pairs < 0.15


def test_attention_maps_are_the_softmax_of_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 2, 6, 5, generator=generator) for _ in range(2))
    index = torch.full((2, 2, 2, 6), -1)
    match = Correspondence(index, sizes=((2, 3), (2, 2)))  # the second view has four tokens and two of padding
    head = AlignmentHead(3)
    maps = attention_maps(query, key, match, head, 0.7)
    count = (6, 4)
    for b, i, n, j in ((0, 0, 2, 1), (1, 1, 3, 0), (1, 0, 5, 0)):
        logits = torch.stack([key[b, k, j, : count[j]] @ query[b, k, i, n] * 0.7 for k in range(3)])
        heads = logits.softmax(-1)
        torch.testing.assert_close(maps["best_head"][b, :, i, n, j, : count[j]], heads)
        torch.testing.assert_close(maps["mean"][b, 0, i, n, j, : count[j]], heads.mean(0))
        torch.testing.assert_close(maps["through_head"][b, 0, i, n, j, : count[j]], head(logits)[0].softmax(-1))
        assert not maps["mean"][b, 0, i, n, j, count[j] :].any()
    assert "through_head" not in attention_maps(query, key, match, None, 0.7)


def test_covisible_pixels_are_those_of_a_plain_loop() -> None:
    """A wall at z = 4 with a post at z = 2 before it, seen by three cameras side by side."""
    size, focal = 16, 16.0
    batch = make_batch(samples=1, views=3, size=size)
    shifts = [0.0, 0.5, 1.0]
    batch["extrinsics"][0, :, 0, 3] = -torch.tensor(shifts)
    post = (0.2, 0.8)  # x range in the world, full height
    for view, shift in enumerate(shifts):
        for column in range(size):
            direction = (column + 0.5 - size / 2) / focal
            x = shift + 2 * direction
            batch["depth"][0, view, 0, :, column] = 2.0 if post[0] <= x < post[1] else 4.0
    batch["num_reference_views"] = 2
    seen = covisible_pixels(batch)
    assert seen.shape == (1, 3, 1, size, size)
    assert not seen[0, :2].any()
    for column in range(size):
        z = float(batch["depth"][0, 2, 0, 0, column])
        x = shifts[2] + z * (column + 0.5 - size / 2) / focal
        # The shifts are whole pixels at both depths, so every point lands on the centre of a pixel.
        landings = [(r, focal * (x - shifts[r]) / z + size / 2) for r in range(2)]
        expected = any(0 <= at < size and float(batch["depth"][0, r, 0, 0, int(at)]) == z for r, at in landings)
        assert seen[0, 2, 0, :, column].tolist() == [expected] * size, column
    assert 0 < int(seen[0, 2].sum()) < size * size


def test_covisible_pixels_need_depth() -> None:
    batch = make_batch()
    del batch["depth"]
    with pytest.raises(DataError, match=r"sample \['wall-0', 'wall-1'\]: has no depth, and evaluation"):
        covisible_pixels(batch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[CameoModel, Any, MultiViewDataset]:
    os.environ["CAMEO_CACHE"], before = scene_cache(), os.environ.get("CAMEO_CACHE")
    try:
        config = make_config(tmp_path_factory.mktemp("model"))
        pipeline = load_pipeline(config)
        model = wrap_denoiser(pipeline, config).train()
        return model, pipeline, build_dataset(config, "validation")
    finally:
        os.environ.pop("CAMEO_CACHE") if before is None else os.environ.update(CAMEO_CACHE=before)


def test_validation_is_deterministic_and_leaves_the_model_alone(trained: tuple[CameoModel, Any, Any]) -> None:
    model, pipeline, data = trained
    frozen_part = model.base_model.mid_block.eval()  # a user's choice within a model that trains
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    settings = ValidationSettings(num_samples=3, batch_size=3, noise_levels=LEVELS)
    first, second = (validate(model, pipeline, data, settings) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not frozen_part.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    frozen_part.train()

    # Other batch sizes differ in the order of float32 sums: 1e-6 relative were seen, a thousandth of a dB never.
    apart = validate(model, pipeline, data, ValidationSettings(num_samples=3, batch_size=1, noise_levels=LEVELS))
    assert apart["pairs"] == first["pairs"]
    assert apart["pixels"] == first["pixels"]
    assert apart["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert apart["psnr_covisible"] == pytest.approx(first["psnr_covisible"], abs=1e-4)
    assert apart["psnr_all"] == pytest.approx(first["psnr_all"], abs=1e-4)
    for name, value in apart["precision"].items():  # an argmax between two equal tokens may turn
        assert value == pytest.approx(first["precision"][name], abs=2 / first["pairs"])


def test_validation_figures_match_an_independent_computation(trained: tuple[CameoModel, Any, Any]) -> None:
    model, pipeline, data = trained
    settings = ValidationSettings(num_samples=2, batch_size=2, noise_levels=(0.5, 1.0), seed=7)
    found = validate(model, pipeline, data, settings)
    losses, all_pixels, covisible = [], [], []
    for sample in range(2):
        batch = collate([data[sample]])
        shape = pipeline.latent_shape(batch["images"].shape)[1:]
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(7 + sample))
        alphas = pipeline.scheduler.alphas_cumprod
        for level in (0.5, 1.0):
            step = torch.tensor([round(level * 999)])
            inputs = pipeline.training_inputs(batch, noise=noise[None], timesteps=step)
            with evaluation_mode(model):
                prediction = model.base_model(*inputs.args, **inputs.kwargs).sample
            views = batch["images"].shape[1]
            velocity = prediction.view(1, views, *shape[1:])
            losses.append((velocity - inputs.target)[:, 1:].square().mean().item())
            if level == 1.0:
                alpha = alphas[step]
                clean = alpha.sqrt() * inputs.noisy - (1 - alpha).sqrt() * velocity
                patch = pipeline.config.patch_size
                image = torch.nn.functional.pixel_shuffle(clean, patch) / 2 + 0.5
                squared = (image.clamp(0, 1) - batch["images"])[0, 1:].square()
                all_pixels.append(10 * math.log10(1 / squared.mean().item()))
                seen = covisible_pixels(batch)[0, 1:].expand_as(squared)
                covisible.append(10 * math.log10(1 / squared[seen].mean().item()))
    assert found["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert found["psnr_all"] == pytest.approx(sum(all_pixels) / 2, abs=1e-4)
    assert found["psnr_covisible"] == pytest.approx(sum(covisible) / 2, abs=1e-4)
    assert found["settings"]["seed"] == 7


def test_validation_without_anything_visible_is_an_error(trained: tuple[CameoModel, Any, Any]) -> None:
    model, pipeline, _ = trained
    batch = make_batch(samples=1, views=2, size=32)
    batch["extrinsics"][0, 1, :3, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))  # looks the other way
    sample = {name: value[0] if isinstance(value, (Tensor, list)) else value for name, value in batch.items()}
    settings = ValidationSettings(num_samples=1, noise_levels=(1.0,))
    with pytest.raises(ValueError, match=r"no target pixel is seen by a reference view .*Raise min_overlap"):
        validate(model, pipeline, [sample], settings)


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
    with pytest.raises(ValueError, match=r"batch \['wall-0'\]: no token of a first target view is visible"):
        attention_figure({"one": model}, pipeline, batch, inputs)

    class Blind:
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**data[index], "depth": torch.zeros_like(data[index]["depth"])}

    with pytest.warns(UserWarning, match=r"attention.png is left out: batch"):
        files = write_pictures({"one": model}, pipeline, Blind(), make_config(tmp_path), tmp_path)
    assert [path.name for path in files] == ["views.png"]
