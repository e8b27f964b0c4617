"""The shared evaluation: attention precision, covisible pixels, validation, pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cameo import wrap
from cameo.alignment import AlignmentHead
from cameo.attention.layout import TokenLayout
from cameo.correspondence import Correspondence
from cameo.data import EmbeddedScenes, MultiViewDataset, collate
from cameo.errors import DataError
from cameo.evaluation.pictures import attention_figure, comparison_figure, save_figure
from cameo.evaluation.validation import validate
from cameo.model import holder
from cameo.pipeline import TrainingInputs
from cameo.probing.denoising import ValidationSettings, covisible_pixels
from cameo.probing.hits import attention_maps, count_hits
from cameo.probing.mode import evaluation_mode
from cameo.probing.truth import Truth
from cameo.training.data import build_dataset
from cameo.training.setup import load_pipeline, wrap_denoiser, write_pictures
from cameo.wrap import CameoModel
from tests.helpers.batches import make_batch
from tests.helpers.training_runs import fresh_accelerate, make_config, scene_cache

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
    return Correspondence(index, token_grids=((side, side),) * views)


def one_hot(target: Tensor, tokens: int) -> Tensor:
    """Logits `[B, 1, V, N, V, N]` that are highest at `target` `[B, V, V, N]`."""
    return torch.nn.functional.one_hot(target.clamp_min(0), tokens).float().permute(0, 1, 3, 2, 4)[:, None]


def hits_of(logits: Tensor, match: Correspondence, within: tuple[int, ...] = (0, 1)) -> tuple[dict[str, Tensor], int]:
    """Hits `[R, W]` of a layer with these logits `[B, K, V, N, V, N]`, and the pairs that they are counted over."""
    truth, (views, tokens) = Truth.plain(match), logits.shape[-2:]
    keys = torch.eye(views * tokens).view(views, tokens, -1).expand(*logits.shape[:2], -1, -1, -1)
    found = count_hits(logits.flatten(-2), keys, truth, None, 1.0, within)
    return {name: hits.sum((1, 2)) for name, hits in found.items()}, int(truth.pairs.sum())


def plain_hits(
    maps: dict[str, Tensor], match: Correspondence, within: tuple[int, ...] = (0, 1)
) -> tuple[dict[str, Tensor], int]:
    """Count the hits of `attention_maps` pair by pair."""
    found = {name: torch.zeros(attention.shape[1], len(within)) for name, attention in maps.items()}
    pairs = match.matched.nonzero().tolist()
    for b, i, j, x in pairs:
        width, target = match.token_grids[j][1], int(match.index[b, i, j, x])
        for name, attention in maps.items():
            best = attention[b, :, i, x, j].argmax(-1)
            away = torch.maximum((best // width - target // width).abs(), (best % width - target % width).abs())
            found[name] += (away[:, None] <= torch.tensor(within)).float()
    return found, len(pairs)


def test_oracle_attention_hits_always_and_shifted_attention_as_geometry_says() -> None:
    match = random_match()
    hits, pairs = hits_of(one_hot(match.index, 16), match)
    assert pairs == int((match.index >= 0).sum())
    assert hits["mean"].tolist() == [[pairs, pairs]]

    # One column to the right: never exact; within one token unless the shift wraps into the next row's first column.
    shifted = (match.index + 1) % 16
    hits, pairs = hits_of(one_hot(shifted, 16), match)
    columns = match.index[match.matched] % 4
    assert hits["mean"].tolist() == [[0, int((columns < 3).sum())]]

    # Two rows down, within two tokens where it stays inside.
    lower = match.index + 8
    hits, _ = hits_of(one_hot(lower % 16, 16), match, within=(1, 2))
    rows = match.index[match.matched] // 4
    assert hits["mean"].tolist() == [[0, int((rows < 2).sum()) + int((rows >= 2).sum())]]  # wraps: two rows up


def test_random_attention_hits_at_chance() -> None:
    match = random_match(samples=40)
    attention = torch.rand(40, 2, 3, 16, 3, 16, generator=torch.Generator().manual_seed(1))
    hits, pairs = hits_of(attention, match)
    # Chance within one token: the number of neighbours, edges included, of each true token, over all tokens.
    neighbours = 0
    for token in match.index[match.matched].tolist():
        row, column = divmod(token, 4)
        neighbours += sum(abs(row - r) <= 1 and abs(column - c) <= 1 for r in range(4) for c in range(4))
    expected = torch.tensor([1 / 16, neighbours / pairs / 16])
    # Some 3600 pairs: the standard error of a share is below 0.009.
    torch.testing.assert_close(hits["best_head"] / pairs, expected.expand(2, 2), rtol=0, atol=0.03)


def test_uniform_attention_is_no_more_than_its_first_token() -> None:
    match = random_match()
    hits, pairs = hits_of(torch.full((2, 1, 3, 16, 3, 16), 1 / 16), match)
    targets = match.index[match.matched]
    assert hits["mean"].tolist() == [
        [int((targets == 0).sum()), int(torch.isin(targets, torch.tensor([0, 1, 4, 5])).sum())]
    ]
    assert hits["mean"][0, 0] / pairs < 0.15


def test_attention_maps_are_the_softmax_of_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 2, 6, 5, generator=generator) for _ in range(2))
    token_grids = ((2, 3), (2, 2))  # the second view has four tokens and two of padding
    head = AlignmentHead(3)
    maps = attention_maps(query, key, token_grids, head, 0.7)
    count = (6, 4)
    for b, i, n, j in ((0, 0, 2, 1), (1, 1, 3, 0), (1, 0, 5, 0)):
        logits = torch.stack([key[b, k, j, : count[j]] @ query[b, k, i, n] * 0.7 for k in range(3)])
        heads = logits.softmax(-1)
        torch.testing.assert_close(maps["best_head"][b, :, i, n, j, : count[j]], heads)
        torch.testing.assert_close(maps["mean"][b, 0, i, n, j, : count[j]], heads.mean(0))
        torch.testing.assert_close(maps["through_head"][b, 0, i, n, j, : count[j]], head(logits)[0].softmax(-1))
        assert not maps["mean"][b, 0, i, n, j, count[j] :].any()
    assert "through_head" not in attention_maps(query, key, token_grids, None, 0.7)


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

    # Other batch token_grids differ in the order of float32 sums: 1e-6 relative were seen, a thousandth of a dB never.
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
    with pytest.raises(ValueError, match=r"no target pixel is seen by a reference view, .*Raise min_overlap"):
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
    with pytest.raises(
        ValueError, match=r"batch \['wall-0'\]: no token of a target view is visible in a reference view"
    ):
        attention_figure({"one": model}, batch, inputs)

    class Blind:
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**data[index], "depth": torch.zeros_like(data[index]["depth"])}

    with pytest.warns(UserWarning, match=r"attention.png is left out: batch"):
        files = write_pictures({"one": model}, pipeline, Blind(), make_config(tmp_path), tmp_path)
    assert [path.name for path in files] == ["views.png"]


class Kernel(nn.Module):
    """An attention layer that hands its arguments to the kernel."""

    heads = 2

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, key)


class Planted(nn.Module):
    """Denoiser and pipeline in one, whose attention looks where the test says; views as the layout has them.

    `arrange` brings queries and keys `[B, V, N, D]`, in correspondence order, to the `[AB, L, D]` of the kernel;
    `shift` moves what is looked at by some tokens.
    """

    num_train_timesteps = 1000

    def __init__(self, layout: TokenLayout, arrange: Any, *, shift: int = 0, sign: float = 1.0) -> None:
        super().__init__()
        self.attn, self.weight = Kernel(), nn.Parameter(torch.zeros(1))
        self.layout, self.arrange, self.shift, self.sign = layout, arrange, shift, sign

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return self.attn(query, key)

    def wrapped(self, **options: Any) -> CameoModel:
        model = wrap(self, layer="attn", layout=self.layout, stride=12, **options)
        self.layer = model.supervised_layers[0]
        return model

    def latent_shape(self, image_shape: Any) -> tuple[int, ...]:
        return tuple(image_shape)

    def training_inputs(self, batch: Any, **options: Any) -> TrainingInputs:
        samples, views, _, height, width = batch["images"].shape
        token_grids = self.layer.token_grids(height, width, views)
        cameras = batch["depth"], batch["intrinsics"], batch["extrinsics"]
        match = Correspondence.from_depth(*cameras, token_grid=token_grids)
        tokens = match.index.shape[-1]
        counts = torch.tensor([h * w for h, w in token_grids])[None, None, :, None]
        looked_at = (match.index + self.shift) % counts
        codes = nn.functional.one_hot(looked_at, tokens) * match.matched[..., None]  # [B, i, j, N, N]
        query = codes.permute(0, 1, 3, 2, 4).flatten(3).float() * 99 * self.sign
        # Most of all each token looks at itself, which must count for nothing.
        query += 999 * torch.eye(views * tokens).view(views, tokens, -1)
        key = torch.eye(views * tokens).view(1, views, tokens, -1).expand(samples, -1, -1, -1)
        query, key = (part[:, None].expand(-1, 2, -1, -1) for part in self.arrange(query, key, token_grids))
        none = torch.zeros(views, dtype=torch.bool)
        return TrainingInputs((query, key), {}, batch["images"], batch["images"], none, options["timesteps"])

    def denoising_loss(self, output: Any, inputs: TrainingInputs) -> Tensor:
        return torch.full((len(inputs.noisy),), 0.25)

    def predict_clean(self, output: Any, inputs: TrainingInputs) -> Tensor:
        """Off by 0.1 in views from 1 on, by 0.5 in view 0."""
        off = torch.full((inputs.noisy.shape[1], 1, 1, 1), 0.1)
        off[0] = 0.5
        return inputs.noisy + off


def joined(query: Tensor, key: Tensor, token_grids: Any) -> tuple[Tensor, Tensor]:
    return query.flatten(1, 2), key.flatten(1, 2)


def prompt_last(query: Tensor, key: Tensor, token_grids: Any) -> tuple[Tensor, Tensor]:
    order = [*range(1, query.shape[1]), 0]
    return query[:, order].flatten(1, 2), key[:, order].flatten(1, 2)


def tiled(query: Tensor, key: Tensor, token_grids: Any) -> tuple[Tensor, Tensor]:
    """Views 1 to 6 as 3 x 2 tiles of one image; the reference's tokens stand behind those of the tiles in the keys."""
    height, width = token_grids[1]
    rows = [
        (1 + 2 * tile_row + tile_column, row * width + column)
        for tile_row in range(3)
        for row in range(height)
        for tile_column in range(2)
        for column in range(width)
    ]
    views, tokens = torch.tensor(rows).T
    reference = key[:, 0, : token_grids[0][0] * token_grids[0][1]]
    return query[:, views, tokens], torch.cat([key[:, views, tokens], reference], dim=1)


def per_cell(query: Tensor, key: Tensor, token_grids: Any) -> tuple[Tensor, Tensor]:
    """One call per token of the grid; a view is looked at if its token there is."""
    order = [*range(1, query.shape[1]), 0]
    return query[:, order].transpose(1, 2).flatten(0, 1), key[:, order].transpose(1, 2).flatten(0, 1)


ZERO123 = TokenLayout("b (r h c w)", key="b (r h c w + h' w')", r=3, c=2, references_last=1)
SETTINGS = ValidationSettings(num_samples=2, batch_size=2, noise_levels=(0.5, 1.0))


def rig_data(rig: str, references: int, tmp: Path) -> MultiViewDataset:
    options: dict[str, Any] = {"content": "objects", "rig": rig, "size": (48, 48), "cache_dir": tmp, "progress": False}
    scenes = EmbeddedScenes(num_scenes=2, **options)
    count = scenes.views_per_scene
    return MultiViewDataset(scenes, num_views=count, num_reference_views=references, selection="in_order")


def true_match(data: Any, token_grids: Any) -> Correspondence:
    batch = collate([data[0], data[1]])
    return Correspondence.from_depth(batch["depth"], batch["intrinsics"], batch["extrinsics"], token_grid=token_grids)


def test_validation_without_references(tmp_path: Path) -> None:
    data, pipeline = rig_data("mvdream", 0, tmp_path), Planted(TokenLayout("b (v h w)"), joined)
    found = validate(pipeline.wrapped(), pipeline, data, SETTINGS)
    assert found["psnr_covisible"] is None
    assert "num_reference_views=0" in found["notes"]["psnr_covisible"]
    assert found["pixels"] == 0
    assert found["loss"] == 0.25
    # All four views are targets, the first of them at 6 dB, the others at 20 dB.
    assert found["psnr_all"] == pytest.approx(-10 * math.log10((0.25 + 3 * 0.01) / 4), abs=1e-4)
    assert found["precision"]["mean@0"] == found["precision"]["best_head@1"] == 1.0
    assert found["precision_view"] is None
    assert found["pairs"] == 2 * int(true_match(data, 4).matched.sum())

    figures = pictures_of(pipeline, data)
    assert [axis.get_title() for axis in figures[0].axes[:4]] == [
        "truth, view 0",
        "one, view 0",
        "truth, view 1",
        "one, view 1",
    ]
    assert [axis.get_title() for axis in figures[1].axes[:2]] == ["query in view 0", "one\nin view 1"]


def pictures_of(pipeline: Planted, data: Any) -> list[Any]:
    """The comparison, and the attention with its marks checked: what is looked at is the true match."""
    batch = collate([data[0], data[1]])
    inputs = pipeline.training_inputs(batch, timesteps=torch.tensor([999, 999]))
    model = holder(pipeline) or pipeline.wrapped()
    attention = attention_figure({"one": model}, batch, inputs)
    for axis in attention.axes[:2]:  # what is drawn is the view that the title names
        drawn = torch.from_numpy(axis.images[0].get_array()).movedim(-1, 0)
        view = int(axis.get_title().split()[-1])
        assert any(torch.equal(drawn, one[view]) for one in batch["images"])  # type: ignore[attr-defined]
    for right in attention.axes[1::2]:
        match, best = (line.get_xydata().tolist() for line in right.lines)
        assert match == best
    comparison = comparison_figure(batch, {"one": pipeline.predict_clean(None, inputs)})
    return [comparison, attention]


def test_validation_of_tiles_with_a_reference_on_a_grid_of_its_own(tmp_path: Path) -> None:
    """Zero123++: the reference has no queries, and tokens half as large as those of the tiles."""
    data = rig_data("zero123plus-v1.2", 1, tmp_path)
    token_grids = ((8, 8), *[(4, 4)] * 6)
    index = true_match(data, token_grids).index[:, 1:]
    pairs = int((index >= 0).sum())
    # One token further is one column further, in the grid of the view looked at, or else in the next row.
    beside = int((index[:, :, 0] % 8 < 7).where(index[:, :, 0] >= 0, False).sum())
    beside += int((index[:, :, 1:] % 4 < 3).where(index[:, :, 1:] >= 0, False).sum())
    for shift, exact, near in ((0, pairs, pairs), (1, 0, beside)):
        pipeline = Planted(ZERO123, tiled, shift=shift)
        model = pipeline.wrapped()
        pipeline.layer = replace(pipeline.layer, reference_size=(96, 96))
        model._supervised = [pipeline.layer]
        found = validate(model, pipeline, data, SETTINGS)
        assert found["pairs"] == 2 * pairs > 0
        assert found["precision"]["mean@0"] == pytest.approx(exact / pairs)
        assert found["precision"]["mean@1"] == pytest.approx(near / pairs)
        # Target views only, whatever carries the denoising loss.
        assert found["psnr_all"] == pytest.approx(20, abs=1e-4)
        assert found["psnr_covisible"] == pytest.approx(20, abs=1e-4)
        if not shift:
            _, attention = pictures_of(pipeline, data)
            query, looked_at = attention.axes[:2]
            assert [query.get_title(), looked_at.get_title()] == ["query in view 1", "one\nin view 0"]
            # Centres of tokens of 12 px there and 6 px here.
            assert all(float(at) % 12 == 6 for at in query.lines[0].get_xydata().ravel())
            assert all(float(at) % 6 == 3 for at in looked_at.lines[0].get_xydata().ravel())


def test_validation_without_the_image_prompt(tmp_path: Path) -> None:
    """ImageDream: the reference is part of the attention, and not of what is supervised."""
    data = rig_data("imagedream", 1, tmp_path)
    pipeline = Planted(TokenLayout("b (v h w)", unsupervised_views=1, references_last=1), prompt_last)
    found = validate(pipeline.wrapped(), pipeline, data, SETTINGS)
    assert found["pairs"] == 2 * int(true_match(data, 4).matched[:, 1:, 1:].sum()) > 0
    assert found["precision"]["mean@0"] == 1.0
    assert found["psnr_covisible"] == pytest.approx(20, abs=1e-4)
    assert found["pixels"] > 0
    _, attention = pictures_of(pipeline, data)
    assert [axis.get_title() for axis in attention.axes[:2]] == ["query in view 1", "one\nin view 2"]


class Pairs:
    """Two cameras at each of two places before a wall: the second one of a place shows the same in each cell."""

    def __getitem__(self, index: int) -> Any:
        batch = make_batch(samples=1, views=4, size=48, seed=index)
        batch["extrinsics"][0, :, 0, 3] = torch.tensor([0.0, 0.0, -0.5, -0.5])
        return {name: value[0] if isinstance(value, (Tensor, list)) else value for name, value in batch.items()}


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, 0.0)])
def test_validation_of_a_layer_that_sees_one_token_per_view(sign: float, expected: float) -> None:
    pipeline = Planted(TokenLayout("(b h w) v", references_last=1), per_cell, sign=sign)
    model = pipeline.wrapped(normalize="all_views")
    found = validate(model, pipeline, Pairs(), SETTINGS)  # type: ignore[arg-type]
    assert found["precision"] is None
    assert "one token of each view" in found["notes"]["precision"]
    # Each query has a match in one of three other views.
    assert found["precision_view"]["mean"] == found["precision_view"]["best_head"] == expected
    assert found["precision_view"]["chance"] == pytest.approx(1 / 3)
    assert found["pairs"] == 2 * 2 * 4 * 16
    assert found["psnr_all"] == pytest.approx(20, abs=1e-4)
    batch = collate([Pairs()[0]])
    inputs = pipeline.training_inputs(batch, timesteps=torch.tensor([999]))
    with pytest.raises(ValueError, match="layer 'attn' attends to a part of the other view"):
        attention_figure({"one": model}, batch, inputs)


def test_hits_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, 2, 4, 9, 8, generator=generator) for _ in range(2))
    torch.manual_seed(0)
    match, head = random_match(samples=3, views=4, side=3), AlignmentHead(2)
    cells = replace(match, index=match.index[..., :1].clamp(max=0), token_grids=((1, 1),) * 4)
    counted = []
    for block in (1 << 24, 3000, 1):
        monkeypatch.setattr("cameo.probing.hits.BLOCK_ENTRIES", block)
        token = count_hits(query, key, Truth.plain(match), head, 1.0, (0, 1))
        view = count_hits(query[..., :1, :], key[..., :1, :], Truth.plain(cells), head, 1.0, (0, 1))
        counted.append([{name: hits.sum((1, 2)).tolist() for name, hits in part.items()} for part in (token, view)])
    assert counted[0] == counted[1] == counted[2]
    whole, _ = plain_hits(attention_maps(query, key, match.token_grids, head, 1.0), match)
    assert {name: value.tolist() for name, value in whole.items()} == counted[0][0]


def test_noise_levels_that_are_all_low_are_refused(tmp_path: Path) -> None:
    data, pipeline = rig_data("mvdream", 0, tmp_path), Planted(TokenLayout("b (v h w)"), joined)
    settings = ValidationSettings(num_samples=1, noise_levels=(0.5,))
    with pytest.raises(ValueError, match=r"noise level of high_noise=0.95 or more.*got noise_levels=\(0.5,\)"):
        validate(pipeline.wrapped(), pipeline, data, settings)


def test_layer_that_reaches_no_match_has_no_precision(tmp_path: Path) -> None:
    data = rig_data("mvdream", 0, tmp_path)

    class Blind:
        def __getitem__(self, index: int) -> Any:
            return {**data[index], "depth": torch.zeros_like(data[index]["depth"])}

    pipeline = Planted(TokenLayout("b (v h w)"), joined)
    found = validate(pipeline.wrapped(), pipeline, Blind(), SETTINGS)  # type: ignore[arg-type]
    assert found["precision"] is None
    assert "no query of the layer reaches" in found["notes"]["precision"]
    assert found["pairs"] == 0
    assert found["psnr_all"] is not None
