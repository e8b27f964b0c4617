"""Whether a layout describes the tokens of a model: right ones fit, and each known mistake is called by its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo import CameoModel, TokenLayout
from cameo.adapters.common.joint_views import inflate
from cameo.checks.layout_check import LayoutCheck
from cameo.errors import ShapeError
from tests.helpers import video_transformers as video
from tests.helpers.backbone_rows import TINY, Row, every_tiny
from tests.helpers.models import Attention

FLUX = video.TRANSFORMERS["FLUX.1 double"]
GRID = (4, 6)


def latents(grid: tuple[int, int] = video.GRID, views: int = video.VIEWS, channels: int = 4) -> Tensor:
    return torch.randn(1, views, channels, *grid, generator=torch.Generator().manual_seed(0))


def flux(layout: TokenLayout = FLUX.layout) -> CameoModel:
    return cameo.wrap(FLUX.model(), layer=FLUX.layer, layout=layout)


def arranged(arrange: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[tuple[()], dict[str, Any]]]:
    """Inputs of FLUX for a model that brings views `[B, V, h, w, C]` into tokens `[B, N, C]` in this way."""

    def inputs(images: Tensor) -> tuple[tuple[()], dict[str, Any]]:
        return (), {**FLUX.inputs(images), "hidden_states": arrange(images.movedim(2, -1))}

    return inputs


def as_described(views: Tensor) -> Tensor:
    return views.flatten(1, 3)


def shuffled(views: Tensor) -> Tensor:
    tokens = views.flatten(1, 3)
    return tokens[:, torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(2))]


@pytest.mark.parametrize("kind", video.TRANSFORMERS.values(), ids=video.TRANSFORMERS)
def test_right_layouts_of_transformers_fit(kind: video.Transformer) -> None:
    model = cameo.wrap(kind.model(), layer=kind.layer, layout=kind.layout)
    check = model.check_layout(lambda images: ((), kind.inputs(images)), latents())
    (layer,) = check.layers
    assert check.fits is True
    assert layer.mistake is None
    assert layer.token_grids == (video.GRID,) * video.VIEWS
    assert {cell.place[1] for cell in layer.cells} == {0, 1, 2}
    for cell in layer.cells:
        sample, view, row, column = cell.place
        axes = {"batch_index": sample, "batch": 1, "token_grids": layer.token_grids, "of": cell.of}
        assert cell.fits
        assert cell.expected == kind.layout.locate(view, row, column, **axes)
        assert cell.found == cell.expected
        assert cell.found_place == cell.place


MISTAKES: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "packed 2 x 2": (
        lambda views: rearrange(views, "b v (h p) (w q) c -> b (v h w p q) c", p=2, q=2),
        "packed cells",
        r"each 2 x 2 cell stand together, as after a reshape to \(v h w p q\)",
    ),
    "transposed": (
        lambda views: rearrange(views, "b v h w c -> b (v w h) c"),
        "transposed grid",
        r'columns stand where rows should\. What moved fits TokenLayout\("b \(t \+ v w h\)", t=5\)',
    ),
    "views within rows": (
        lambda views: rearrange(views, "b v h w c -> b (h v w) c"),
        "order of axes",
        r'fits TokenLayout\("b \(t \+ h v w\)"',
    ),
    "reference last": (
        lambda views: as_described(views.roll(-1, dims=1)),
        "order of views",
        r"view 0 where the layout has view 2, view 1 where .* That is references_last=1",
    ),
    "back to front": (
        lambda views: as_described(views.flip(1)),
        "order of views",
        r"view 0 where the layout has view 3, view 1 where the layout has view 2",
    ),
    "two exchanged": (
        lambda views: as_described(views[:, [0, 2, 1, 3]]),
        "order of views",
        r"view 1 where the layout has view 2, view 2 where the layout has view 1",
    ),
    "shuffled": (shuffled, "other", "no known mistake explains which"),
    "last row reversed": (
        lambda views: as_described(torch.cat([views[:, :, :-1], views[:, :, -1:].flip(3)], dim=2)),
        "other",
        "no known mistake explains which",
    ),
}


@pytest.mark.parametrize(("arrange", "mistake", "words"), MISTAKES.values(), ids=MISTAKES)
def test_each_mistake_is_named(arrange: Callable[[Tensor], Tensor], mistake: str, words: str) -> None:
    model, images = flux(), latents(GRID, views=3 if "references_last" in words else 4)
    assert model.check_layout(arranged(as_described), images).fits is True
    check = model.check_layout(arranged(arrange), images)
    (layer,) = check.layers
    assert check.fits is False
    assert layer.mistake == mistake
    assert not all(cell.fits for cell in layer.cells)
    text = str(check)
    assert f"does not fit ({mistake})" in text
    assert layer.words.startswith("queries and keys: ")
    assert re.search(words, layer.words)


@pytest.mark.parametrize(("name", "other"), [("FLUX.1 single", "b (v h w + t)"), ("SD3", "b (t + v h w)")])
def test_text_at_the_other_end(name: str, other: str) -> None:
    kind = video.TRANSFORMERS[name]
    model = cameo.wrap(kind.model(), layer=kind.layer, layout=TokenLayout(other, t=5))
    check = model.check_layout(lambda images: ((), kind.inputs(images)), latents())
    assert check.layers[0].mistake == "text at the other end"
    assert check.layers[0].words.endswith(f"fits {kind.layout!r}")


# Backbones


def inputs_of(row: Row, pipeline: Any) -> Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]:
    def inputs(images: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        found = pipeline.training_inputs(
            {**row.batch(), "images": images},
            generator=torch.Generator().manual_seed(5),
            timesteps=torch.tensor([pipeline.num_train_timesteps // 2]),
        )
        return found.args, found.kwargs

    return inputs


def check_row(row: Row, **layout: Any) -> LayoutCheck:
    pipeline = row.pipeline()
    model = cameo.wrap(pipeline.denoiser, row.backbone, **row.wrap)
    if layout:
        model._supervised = [replace(model.supervised_layers[0], layout=TokenLayout(**layout))]
    return model.check_layout(inputs_of(row, pipeline), row.batch()["images"])


def test_every_backbone_of_this_repository_is_checked() -> None:
    installed = {point.name for point in entry_points(group="cameo.backbones") if point.value.startswith("cameo.")}
    assert installed == {row.backbone for row in TINY}


@every_tiny
def test_the_backbones_fit(row: Row) -> None:
    check = check_row(row)
    assert check.fits is True
    assert check.layers[0].token_grids == row.grids


OWN_VIEW = {"query": "(b v) (h w)", "own_view_shows": 0}
TILES = {"r": 3, "c": 2, "references_last": 1}


@pytest.mark.parametrize(
    ("name", "layout", "mistake", "words"),
    [
        ("cat3d-tiny", {"query": "b (v h w)", "references_last": 1}, "order of views", "references_last=0"),
        ("mvdream-tiny", {"query": "b (v w h)"}, "transposed grid", 'fits TokenLayout("b (v h w)")'),
        (
            "zero123plus-tiny",
            {"query": "b (c h r w)", "key": "b (c h r w + h' w')", **TILES},
            "order of axes",
            'fits TokenLayout("b (r h c w)", key="b (c h r w + h\' w\')"',
        ),
        ("sv3d-tiny-own-view", OWN_VIEW, "order of views", "references_last=1"),
    ],
)
def test_wrong_layouts_of_backbones_are_named(name: str, layout: dict[str, Any], mistake: str, words: str) -> None:
    (row,) = (row for row in TINY if str(row) == name)
    (layer,) = check_row(row, **layout).layers
    assert layer.mistake == mistake
    assert words in layer.words


# What cannot be told, and what is refused


class Joined(nn.Module):
    """Attention over the tokens `[B, N, C]` that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attention(tokens)


def joined(layout: TokenLayout | str = "b (v h w)") -> CameoModel:
    torch.manual_seed(0)
    return cameo.wrap(Joined(), layer="attention", layout=layout)


def tokens_of(images: Tensor) -> Tensor:
    return images.movedim(2, -1).flatten(1, 3)


class Pyramid(nn.Module):
    """Joint attention over the tokens of `[B, V, C, h, w]`, then over cells of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = Attention(), Attention()

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(tokens_of(images)).reshape(images.movedim(2, -1).shape).movedim(-1, 2)
        return self.coarse(tokens_of(F.avg_pool2d((images + fine).flatten(0, 1), 2).unflatten(0, images.shape[:2])))


def test_layers_with_different_grids_are_checked_together() -> None:
    torch.manual_seed(0)
    model = cameo.wrap(Pyramid(), layer=["fine", "coarse"], layout="b (v h w)")
    check = model.check_layout(lambda images: ((images,), {}), latents(GRID, channels=16))
    assert check.fits is True
    assert [layer.token_grids[0] for layer in check.layers] == [(4, 6), (2, 3)]
    model._supervised[1] = replace(model.supervised_layers[1], layout=TokenLayout("b (v w h)"))
    check = model.check_layout(lambda images: ((images,), {}), latents(GRID, channels=16))
    assert check.fits is False
    assert [layer.mistake for layer in check.layers] == [None, "transposed grid"]


IMAGES = latents(channels=16)
UNKNOWN: dict[str, tuple[Callable[[Tensor], Any] | None, str]] = {
    "nothing": (None, "inputs= and images= were not given"),
    "other images": (lambda images: ((tokens_of(IMAGES),), {}), "inputs= must use the images"),
    "new noise": (
        lambda images: ((torch.randn(1, 36, 16, generator=NOISE) + tokens_of(images),), {}),
        "make its generator anew in each call, with a fixed seed",
    ),
    "all alike": (
        lambda images: ((torch.ones(1, 36, 16) * tokens_of(images).mean(1, keepdim=True),), {}),
        "queries: the change of one cell moves all alike; keys: ",
    ),
}
NOISE = torch.Generator().manual_seed(1)


@pytest.mark.parametrize(("inputs", "reason"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_cannot_be_told_is_never_fine(inputs: Callable[[Tensor], Any] | None, reason: str) -> None:
    check = joined().check_layout(inputs, IMAGES)
    assert check.fits is None
    assert str(check).startswith('layer attention, TokenLayout("b (v h w)"): cannot tell')
    assert reason in check.layers[0].words
    with pytest.raises(ValueError, match="print the check for the reason"):
        check.figure()


def test_a_movement_that_spreads_over_the_place_and_others_cannot_be_told() -> None:
    def inputs(images: Tensor) -> tuple[tuple[Tensor], dict[str, Any]]:
        views = images.movedim(2, -1)
        return ((0.45 * views + shuffled(views).view_as(views)).flatten(1, 3),), {}

    (layer,) = joined().check_layout(inputs, latents(GRID, channels=16)).layers
    assert layer.fits is None
    assert "queries: the tokens of the changed cells moved 4" in layer.words
    assert "Pass larger images" in layer.words


def test_without_anything_it_cannot_tell() -> None:
    assert joined().check_layout().fits is None


@pytest.mark.parametrize("images", [IMAGES[0], IMAGES.long(), IMAGES[:, :0], "images"], ids=str)
def test_images_of_another_form_are_refused(images: Any) -> None:
    with pytest.raises(ShapeError, match=r"images: expected floating-point pixels or latents \[B, V, C, H, W\], got"):
        joined().check_layout(lambda images: ((tokens_of(images),), {}), images)


def test_another_number_of_tokens_is_refused() -> None:
    model = joined(TokenLayout("b (t + v h w)", t=5))
    with pytest.raises(ShapeError, match=r"got 36 queries in 1 rows, 36 keys in 1\. Pass token_grids="):
        model.check_layout(lambda images: ((tokens_of(images),), {}), IMAGES)


def test_views_with_a_grid_of_their_own_take_token_grids() -> None:
    model = joined("b (h' w' + v h w)")

    def inputs(images: Tensor) -> tuple[tuple[Tensor], dict[str, Any]]:
        tokens = images.movedim(2, -1)
        return (torch.cat([tokens[:, :2].flatten(1, 3), tokens[:, 2, ::2, :].flatten(1, 2)], dim=1),), {}

    with pytest.raises(ShapeError, match="Pass token_grids=, one"):
        model.check_layout(inputs, latents((4, 4), channels=16))
    check = model.check_layout(inputs, latents((4, 4), channels=16), token_grids=((4, 4), (4, 4), (2, 4)))
    assert check.layers[0].mistake == "order of segments"
    assert check.layers[0].words.endswith("fits TokenLayout(\"b (v h w + h' w')\")")


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    model = joined().train()
    with torch.no_grad():
        model.attention.to_q.weight.normal_()
    state = torch.get_rng_state()
    check = model.check_layout(lambda images: ((tokens_of(images) + 0.1 * torch.randn(1, 36, 16),), {}), IMAGES)
    assert check.fits is True  # the noise is the same in each forward
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not hasattr(model, "alignment_loss")


def test_the_picture(tmp_path: Path) -> None:
    check = flux().check_layout(arranged(lambda views: as_described(views.flip(1))), latents())
    figure = check.figure()
    panels = [axes for axes in figure.axes if axes.images]
    assert 2 <= len(panels) <= 6
    for panel in panels:
        picture, (square,) = panel.images[0].get_array(), panel.patches
        row, column = divmod(int(picture.filled(-1).argmax()), picture.shape[1])
        expected = (round(square.get_x() + 0.5), round(square.get_y() + 0.5))
        assert (column, row) != expected
        assert (2 * 5 - column // 5 * 5 + column % 5, row) == expected  # in the view at the other end
    path = check.draw(tmp_path / "new" / "check.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "conventions.md").read_text(encoding="utf-8")
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "check_layout" in code)
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    monkeypatch.chdir(tmp_path)
    names = {
        "torch": torch,
        "timestep": 10,
        "text": torch.zeros(3, 1, 8),
        "model": cameo.wrap(inflate(unet, latent_stride=8), "cat3d"),
    }
    exec(example, names)
    assert names["check"].fits is True
    assert (tmp_path / "layout.png").exists()
