"""One layer cut to self-view attention, and what that costs the model."""

from __future__ import annotations

import copy
import math
import threading
import types
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

import cameo
from cameo import CameoModel, TokenLayout, probe_layers
from cameo.adapters.cat3d import BUNDLED
from cameo.adapters.common.joined_frames import deflate
from cameo.attention.capture import AttentionCapture, AttentionLayer
from cameo.errors import CaptureError
from cameo.evaluation.validation import validate
from cameo.pipeline import TrainingInputs
from cameo.probing import ablation as perturbation
from cameo.probing.ablation import Drop, LayerEffect, effects_figure, effects_table, perturb_layers, self_view_only
from cameo.probing.bootstrap import paired_bootstrap
from cameo.probing.denoising import ValidationSettings, sample_batches
from cameo.training.data import build_dataset
from cameo.training.setup import load_pipeline
from tests.attention.test_capture import (  # noqa: F401 - a fixture
    DIMENSION,
    HEADS,
    PLAIN,
    WITH_XFORMERS,
    bmm_then_scale,
    in_slices,
    sdpa,
    xformers_ops,
)
from tests.helpers import backbone_checks as checks
from tests.helpers import models
from tests.helpers.backbone_rows import TINY, Row, every_tiny
from tests.helpers.batches import make_batch
from tests.helpers.training_runs import make_config, scene_cache

KERNELS = [sdpa, *PLAIN, *WITH_XFORMERS]
NO_VIEW, REFERENCE = -1, 99
GRID, OWN_GRID, VIEWS, SAMPLES = (2, 3), (3, 2), 3, 2
SIZES = {"b": SAMPLES, "v": VIEWS, "h": GRID[0], "w": GRID[1]}


def by(pattern: str, **lengths: int) -> Tensor:
    """View of every token `[A, L]` of an attention whose axes `pattern` names, independently of `TokenLayout`."""
    return repeat(torch.arange(lengths.get("v", VIEWS)), f"v -> {pattern}", **{**SIZES, **lengths})


def canvas() -> Tensor:
    """Six views on 3 x 2 tiles."""
    return repeat(rearrange(torch.arange(6), "(r c) -> r c", r=3), "r c -> b (r h c w)", b=SAMPLES, h=2, w=3)


def some(view: int, tokens: int) -> Tensor:
    return torch.full((SAMPLES, tokens), view)


# Layout, token grids in correspondence order, views of the queries and of the keys [A, L].
CASES: dict[str, tuple[TokenLayout, tuple[tuple[int, int], ...], Tensor, Tensor]] = {
    "joint": (TokenLayout("b (v h w)"), (GRID,) * 3, by("b (v h w)"), by("b (v h w)")),
    "image prompt without a loss": (
        TokenLayout("b (v h w)", unsupervised_views=1, references_last=1),
        (GRID,) * 3,
        by("b (v h w)"),
        by("b (v h w)"),
    ),
    "view that no correspondence has": (
        TokenLayout("b (v h w)", unsupervised_views=1),
        (GRID,) * 2,
        by("b (v h w)"),
        by("b (v h w)"),
    ),
    "canvas and reference": (
        TokenLayout("b (r h c w)", key="b (r h c w + h' w')", references_last=1, r=3, c=2),
        (OWN_GRID, *(GRID,) * 6),
        canvas(),
        torch.cat([canvas(), some(REFERENCE, 6)], 1),
    ),
    "rows": (TokenLayout("(b h) (v w)"), (GRID,) * 3, by("(b h) (v w)"), by("(b h) (v w)")),
    "columns": (TokenLayout("(b w) (v h)"), (GRID,) * 3, by("(b w) (v h)"), by("(b w) (v h)")),
    "temporal": (TokenLayout("(b h w) v"), (GRID,) * 3, by("(b h w) v"), by("(b h w) v")),
    "views in the rows": (
        TokenLayout("(b v h) w", key="(b u h) (v w)"),
        (GRID,) * 3,
        by("(b v h) w"),
        by("(b u h) (v w)", u=3),
    ),
    "views before samples": (
        TokenLayout("(v b) (h w)", key="(u b) (v h w)"),
        (GRID,) * 3,
        by("(v b) (h w)"),
        by("(u b) (v h w)", u=3),
    ),
    "text": (
        TokenLayout("b (t + v h w)", t=4),
        (GRID,) * 3,
        torch.cat([some(NO_VIEW, 4), by("b (v h w)")], 1),
        torch.cat([some(NO_VIEW, 4), by("b (v h w)")], 1),
    ),
    "text among the keys": (
        TokenLayout("b (v h w)", key="b (v h w + t)", t=4),
        (GRID,) * 3,
        by("b (v h w)"),
        torch.cat([by("b (v h w)"), some(NO_VIEW, 4)], 1),
    ),
}
# Rows of this layout are not whole samples in a slice of 5.
ROWWISE = [name for name, (layout, *_) in CASES.items() if layout.query.startswith(("(b v", "(v b"))]
# Every layout with one kernel of each way to cut, every kernel with layouts of each kind.
PAIRS = sorted(
    {(case, kernel) for case in CASES for kernel in (sdpa, bmm_then_scale)}
    | {(case, kernel) for case in ("canvas and reference", "temporal", "views in the rows") for kernel in KERNELS}
    - {(case, in_slices) for case in ROWWISE},
    key=lambda pair: (pair[0], pair[1].__name__),
)


class Layer(nn.Module):
    """Attention whose queries, keys and values come from outside."""

    def __init__(self, kernel: Callable[..., Tensor] = sdpa) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.kernel(query, key, value)


class Model(nn.Module):
    def __init__(self, kernel: Callable[..., Tensor] = sdpa) -> None:
        super().__init__()
        self.layer, self.other = Layer(kernel), Layer(kernel)

    def forward(self, *call: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(*call), self.other(*call)


def make_site(case: str, **options: Any) -> AttentionLayer:
    return AttentionLayer(0, "layer", HEADS, CASES[case][0], **options)


def random_call(case: str) -> tuple[Tensor, ...]:
    *_, of_query, of_key = CASES[case]
    generator = torch.Generator().manual_seed(2)
    views = of_query, of_key, of_key
    return tuple(torch.randn(*view.shape, HEADS * DIMENSION, generator=generator) for view in views)


def token_by_token(case: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in float64, each query over the list of keys it may see."""
    *_, of_query, of_key = CASES[case]
    output = torch.empty(*query.shape, dtype=torch.float64)
    for row, token in torch.cartesian_prod(torch.arange(query.shape[0]), torch.arange(query.shape[1])).tolist():
        view = of_query[row, token]
        seen = (of_key[row] == view) | (of_key[row] == NO_VIEW) | (view == NO_VIEW)
        q, k, v = (
            rearrange(x.double(), "... (k d) -> k ... d", k=HEADS)
            for x in (query[row, token], key[row, seen], value[row, seen])
        )
        weights = (torch.einsum("kd,kmd->km", q, k) * DIMENSION**-0.5).softmax(-1)
        output[row, token] = torch.einsum("km,kmd->kd", weights, v).flatten()
    return output


@pytest.mark.parametrize(("case", "kernel"), PAIRS, ids=lambda value: getattr(value, "__name__", value))
def test_each_query_sees_its_own_view_only(case: str, kernel: Any, xformers_ops: types.ModuleType) -> None:  # noqa: F811
    model, call = Model(kernel), random_call(case)
    whole = model(*call)
    with self_view_only(model, make_site(case), CASES[case][1]), torch.no_grad():
        cut, other = model(*call)
    torch.testing.assert_close(cut.double(), token_by_token(case, *call), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(cut, whole[0], atol=1e-3)
    assert torch.equal(other, whole[1])
    assert all(map(torch.equal, model(*call), whole))


def test_part_of_a_sample_is_refused(xformers_ops: types.ModuleType) -> None:  # noqa: F811
    for case in ROWWISE:
        model = Model(in_slices)
        with (
            pytest.raises(CaptureError, match=r"of one sample are \d+ rows of the kernel, and a call has 5"),
            self_view_only(model, make_site(case), CASES[case][1]),
        ):
            model(*random_call(case))


def test_queries_of_other_views_do_not_change_a_bit() -> None:
    """Cut, what one view holds cannot reach another view, whatever it is."""
    model, (query, key, value) = Model(), random_call("joint")
    far = [torch.where(CASES["joint"][2][..., None] == 1, 1e4 * x, x) for x in (query, key, value)]
    with self_view_only(model, make_site("joint"), (GRID,) * 3):
        near, changed = model(query, key, value)[0], model(*far)[0]
    others = CASES["joint"][2] != 1
    assert torch.equal(near[others], changed[others])
    assert not torch.equal(near[~others], changed[~others])


def test_gradients_are_those_of_the_attention_that_ran() -> None:
    call = [x.requires_grad_() for x in random_call("joint")]
    with self_view_only(model := Model(), make_site("joint"), (GRID,) * 3):
        model(*call)[0].square().sum().backward()
    truth = [x.detach().double().requires_grad_() for x in call]
    token_by_token("joint", *truth).square().sum().backward()
    for one, true in zip(call, truth, strict=True):
        torch.testing.assert_close(one.grad.double(), true.grad, rtol=1e-4, atol=1e-5)


def test_a_capture_inside_sees_all_keys() -> None:
    model, call, layer = Model(), random_call("joint"), make_site("joint")
    with self_view_only(model, layer, (GRID,) * 3):
        cut = model(*call)[0]
        with AttentionCapture(model, [layer]) as captured:
            assert torch.equal(model(*call)[0], cut)
        assert torch.equal(model(*call)[0], cut)
    assert captured["layer"].key.shape == (SAMPLES, HEADS, 18, DIMENSION)


def test_only_this_model_and_this_thread_are_affected() -> None:
    model, call = Model(), random_call("joint")
    twin, whole, found = copy.deepcopy(model), model(*call)[0], []
    with self_view_only(model, make_site("joint"), (GRID,) * 3):
        assert not torch.equal(model(*call)[0], whole)
        assert torch.equal(twin(*call)[0], whole)
        thread = threading.Thread(target=lambda: found.append(model(*call)[0]))
        thread.start()
        thread.join()
    assert torch.equal(found[0], whole)
    assert checks.hooks(model) == 0


def test_an_exception_restores_the_model() -> None:
    def out_of_memory(*_: Tensor) -> Tensor:
        raise MemoryError("mine")

    model, call = Model(), random_call("joint")
    whole = model(*call)[0]
    model.layer.kernel = out_of_memory
    with pytest.raises(MemoryError, match="mine"), self_view_only(model, make_site("joint"), (GRID,) * 3):
        model(*call)
    model.layer.kernel = sdpa
    assert torch.equal(model(*call)[0], whole)
    assert checks.hooks(model) == 0


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x[:, None] for x in (q, k, v)), torch.ones(18, 18, dtype=torch.bool))[:, 0]


def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(sdpa(q, k, v), k, v)


def half_the_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([sdpa(part, k, v) for part in q.chunk(2, dim=1)], dim=1)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (masked, "masks its attention"),
        (twice, "called the attention kernel 2 times"),
        (half_the_tokens, "expected 18 queries and 18 keys .* got 9 and 18"),
        (lambda q, k, v: q, "no attention kernel was seen"),
    ],
)
def test_what_cannot_be_cut_says_why(kernel: Any, message: str) -> None:
    model = Model(kernel)
    with pytest.raises(CaptureError, match=message), self_view_only(model, make_site("joint"), (GRID,) * 3):
        model(*random_call("joint"))
    assert checks.hooks(model) == 0


def test_a_block_in_which_nothing_was_cut_is_an_error() -> None:
    with pytest.raises(CaptureError, match="did not run"), self_view_only(Model(), make_site("joint"), (GRID,) * 3):
        pass
    case = "canvas and reference"
    reference = torch.zeros(SAMPLES, 6, HEADS * DIMENSION)  # the write pass alone
    with (
        pytest.raises(CaptureError, match="nothing to cut"),
        self_view_only(model := Model(), make_site(case), CASES[case][1]),
    ):
        model(reference, reference, reference)


def test_sizes_of_another_batch_are_refused() -> None:
    with (
        pytest.raises(CaptureError, match=r"expected 12 queries .* got 18 and 18"),
        self_view_only(model := Model(), make_site("joint"), (GRID,) * 2),
    ):
        model(*random_call("joint"))
    with (
        pytest.raises(ValueError, match="needs 7 views, got 3"),
        self_view_only(Model(), make_site("canvas and reference"), (GRID,) * 3),
    ):
        pass


# Real models


def _module_call(module: nn.Module) -> tuple[list[Any], Any]:
    """Hook that keeps the arguments and outputs of a module's calls."""
    calls: list[Any] = []
    hook = module.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, dict(kwargs), output)), with_kwargs=True
    )
    return calls, hook


def joint(module: Any, args: Any, kwargs: dict[str, Any], row: Row) -> Tensor:
    """The processor joins `num_views` views; told there is one, it attends view by view."""
    return module(*args, **{**kwargs, "num_views": 1})


def tile_by_tile(module: Any, args: Any, kwargs: dict[str, Any], row: Row) -> Tensor:
    """Each tile of the canvas in a write pass of its own: no other tile and no reference."""
    tiles = {"r": 3, "c": 2, "h": 4, "w": 4}
    tokens = rearrange(args[0], "b (r h c w) d -> (b r c) (h w) d", **tiles)
    output = module(tokens, **{**kwargs, "mode": "w", "ref_dict": {}})
    return rearrange(output, "(b r c) (h w) d -> b (r h c w) d", **tiles)


def frame_by_frame(module: Any, args: Any, kwargs: dict[str, Any], row: Row) -> Tensor:
    """Every frame of every cell alone."""
    output = module(args[0].flatten(0, 1)[:, None], **kwargs)
    return output[:, 0].unflatten(0, args[0].shape[:2])


def not_joined(module: Any, args: Any, kwargs: dict[str, Any], row: Row) -> Tensor:
    """An inflated layer is given joined tokens by its hooks; here it gets one frame at a time."""
    holder = nn.ModuleDict({"attn": copy.deepcopy(module)})
    deflate(holder, "attn")
    tokens = rearrange(args[0], "b (v n) d -> (b v) n d", v=row.views)
    return rearrange(holder["attn"](tokens, **kwargs), "(b v) n d -> b (v n) d", v=row.views)


VIEW_BY_VIEW = {"cat3d": joint, "mvdream": joint, "zero123plus": tile_by_tile, "sv3d": frame_by_frame}


@every_tiny
def test_a_layer_of_each_backbone_equals_itself_run_view_by_view(row: Row) -> None:
    subject = row.subject()
    model = subject.wrapped().eval()
    (layer,), inputs = model.supervised_layers, subject.inputs(model.base_model)
    whole = checks.run(model, inputs)
    module = model.base_model.get_submodule(layer.path)
    with torch.no_grad(), self_view_only(model, layer, layer.token_grids(row.size, row.size, row.views)):
        calls, hook = _module_call(module)
        cut = checks.run(model, inputs)
        hook.remove()
    assert not checks.same(cut, whole)
    assert checks.same(checks.run(model, inputs), whole)
    args, kwargs, output = calls[-1]
    alone = not_joined if row.wrap else VIEW_BY_VIEW[row.backbone]
    if row.wrap:  # the hook stands behind the one that separates the frames
        output = rearrange(output, "(b v) n d -> b (v n) d", v=row.views)
    with torch.no_grad():
        expected = alone(module, args, kwargs, row)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("row", [row for row in TINY if row.backbone in ("cat3d", "mvdream")], ids=str)
def test_with_every_layer_cut_no_view_depends_on_another(row: Row) -> None:
    subject = row.subject()
    model = subject.wrapped().eval()
    (x, *rest), kwargs = subject.inputs(model.base_model)
    far = x.clone()
    far[1] += 1  # the second view
    with ExitStack() as stack, torch.no_grad():
        for layer in model.attention_layers:
            stack.enter_context(self_view_only(model, layer, layer.token_grids(row.size, row.size, row.views)))
        near, changed = (checks.run(model, ((first, *rest), kwargs))[0] for first in (x, far))
    assert torch.equal(near[0], changed[0])
    assert torch.equal(near[2:], changed[2:])
    assert not torch.equal(near[1], changed[1])
    with torch.no_grad():
        assert not torch.equal(checks.run(model, ((x, *rest), kwargs))[0][0], near[0])


def test_row_wise_and_temporal_layers_of_other_models() -> None:
    """Models without an adapter: one of three calls of the kernel (MV-Adapter), whole rows, frames of a cell."""
    token_grids = (models.GRID,) * models.VIEWS
    torch.manual_seed(0)
    rows, frames = models.RowModel(), models.JointModel()
    for base, arguments, path, layout, call in (
        (rows, (models.frames(), models.VIEWS), "rows", TokenLayout("(b v h) w", key="(b u h) (v w)"), 1),
        (rows, (models.frames(), models.VIEWS), "whole_rows", TokenLayout("(b h) (v w)"), None),
        (frames, (models.frames(), models.VIEWS), "joint", TokenLayout("b (v h w)"), None),
        (frames, (models.frames(), models.VIEWS), "temporal", TokenLayout("(b h w) v"), None),
    ):
        model = cameo.wrap(base, layer=path, layout=layout, heads=models.HEADS, kernel_call=call, normalize="all_views")
        module, (layer,) = base.get_submodule(path), model.supervised_layers
        with torch.no_grad(), self_view_only(model, layer, token_grids):
            calls, hook = _module_call(module)
            model(*arguments)
            hook.remove()
        ((given, _, output),) = calls
        with torch.no_grad():
            if path == "rows":  # told that there is one view, it takes each view for a sample
                expected = module(given[0], given[1], 1, given[3])
            else:
                alone = module(rearrange(given[0], "b (v n) d -> (b v) n d", v=models.VIEWS))
                expected = rearrange(alone, "(b v) n d -> b (v n) d", v=models.VIEWS)
        torch.testing.assert_close(output, expected)
        model.unwrap()


def test_a_compiled_layer_is_cut_too() -> None:
    model, call = Model(), random_call("joint")
    model.layer.compile(backend="eager")
    with self_view_only(model, make_site("joint"), (GRID,) * 3), torch.no_grad():
        cut = model(*call)[0]
    torch.testing.assert_close(cut.double(), token_by_token("joint", *call), rtol=1e-5, atol=1e-6)


# What a cut costs


class Planted(nn.Module):
    """Denoiser and pipeline in one, with two cross-view layers of which only the first is used.

    Each of two views attends to the other one, and shows the mean of its tokens of 8 x 8 pixels; those of the second
    view are black, as it is yet unknown. The second layer attends just as well, and nobody takes what it finds.
    """

    num_train_timesteps = 1000

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.weight = Layer(), Layer(), nn.Parameter(torch.zeros(1))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.unused(query, key, value)
        return self.used(query, key, value) + self.weight

    def latent_shape(self, image_shape: Any) -> tuple[int, ...]:
        return tuple(image_shape)

    def training_inputs(self, batch: Any, *, noise: Tensor, timesteps: Tensor) -> TrainingInputs:
        images = batch["images"]
        assert noise.shape == images.shape
        values = images.unfold(3, 8, 8).unfold(4, 8, 8).mean((-1, -2))  # [B, V, 3, h, w]
        tokens = F.pad(rearrange(values, "b v c h w -> b (v h w) c"), (0, HEADS * DIMENSION - 3))
        tokens[:, tokens.shape[1] // 2 :] = 0
        views = torch.eye(images.shape[1]).repeat_interleave(values.shape[-1] ** 2, dim=0)
        far = F.pad(50 * (1 - views), (0, DIMENSION - views.shape[1])).repeat(1, HEADS)  # of view 0 to the others
        near = F.pad(views, (0, DIMENSION - views.shape[1])).repeat(1, HEADS)
        query, key = (x.expand(len(images), -1, -1) for x in (far, near))
        target = torch.zeros(images.shape[1], dtype=torch.bool)
        target[int(batch["num_reference_views"]) :] = True
        return TrainingInputs((query, key, tokens), {}, images, images, target, timesteps)

    def predict_clean(self, output: Tensor, inputs: TrainingInputs) -> Tensor:
        side = inputs.target.shape[-1] // 8
        pictures = rearrange(output[..., :3], "b (v h w) c -> b v c h w", h=side, w=side)
        return pictures.repeat_interleave(8, 3).repeat_interleave(8, 4)

    def denoising_loss(self, output: Tensor, inputs: TrainingInputs) -> Tensor:
        squared = (self.predict_clean(output, inputs) - inputs.target).square()
        return squared[:, inputs.loss_views].mean((1, 2, 3, 4))


def planted_samples(scenes: int = 6, *, views: int = 2) -> list[dict[str, Any]]:
    """Scenes of one colour each: the reference shows it, and only cross-view attention brings it to the target."""
    samples = []
    for scene in range(scenes):
        batch = make_batch(samples=1, views=views, size=32, seed=scene)
        colour = torch.rand(3, generator=torch.Generator().manual_seed(scene))
        sample = {name: value[0] if isinstance(value, Tensor) else value for name, value in batch.items()}
        sample["images"] = colour[None, :, None, None] * torch.ones(views, 1, 32, 32)
        for number in range(2):  # two samples of each scene
            samples.append({**sample, "key": f"scene-{scene}/{number}"})
    return samples


SETTINGS = ValidationSettings(num_samples=12, batch_size=5, noise_levels=(1.0,))


def planted() -> tuple[CameoModel, Planted]:
    base = Planted()
    return cameo.wrap(base, layer=["used", "unused"], layout="b (v h w)", heads=HEADS, stride=8), base


def test_a_layer_that_is_used_costs_and_one_that_is_not_costs_nothing() -> None:
    model, pipeline = planted()
    data = planted_samples()
    used, unused = perturb_layers(model, pipeline, data, SETTINGS)
    assert (used.index, used.path, unused.index, unused.path) == (0, "used", 1, "unused")
    assert unused.drop_loss == unused.drop_psnr_all == unused.drop_psnr_covisible == Drop(0.0, 0.0, 0.0)
    # Whole, the picture is perfect (100 dB is the cap); cut, the target stays black.
    black = [float((sample["images"][1] ** 2).mean()) for sample in data[::2]]
    assert used.loss == pytest.approx(sum(black) / 6, rel=1e-5)
    assert used.drop_loss.mean == pytest.approx(used.loss, rel=1e-4)
    expected = [100 + 10 * math.log10(value) for value in black]
    assert used.drop_psnr_all.mean == pytest.approx(sum(expected) / 6, abs=1e-3)
    assert list(used.per_scene["psnr_all"]) == [f"scene-{scene}" for scene in range(6)]
    assert list(used.per_scene["psnr_all"].values()) == pytest.approx(expected, abs=1e-3)
    low, high = paired_bootstrap([0.0] * 6, expected)[1:]
    assert used.drop_psnr_all[1:] == pytest.approx((low, high), abs=1e-3)
    assert used.drop_psnr_all.low > 30


def test_effects_are_the_same_again_and_for_other_batch_sizes() -> None:
    model, pipeline = planted()
    data = planted_samples()
    first = perturb_layers(model, pipeline, data, SETTINGS)
    assert perturb_layers(model, pipeline, data, SETTINGS) == first
    other = perturb_layers(model, pipeline, data, ValidationSettings(12, 3, (1.0,)))
    assert other[0].drop_psnr_all == pytest.approx(first[0].drop_psnr_all, abs=1e-4)
    picked = perturb_layers(model, pipeline, data, SETTINGS, layers=["unused", 0])
    assert picked == [first[1], first[0]]


def test_bad_requests_name_the_cure() -> None:
    model, pipeline = planted()
    with pytest.raises(ValueError, match=r"unknown layer 'unsued': did you mean 'unused'"):
        perturb_layers(model, pipeline, planted_samples(), SETTINGS, layers=["unsued"])
    with pytest.raises(ValueError, match=r"at least 2 scenes, got 1 \(scene-0\).*Raise num_samples"):
        perturb_layers(model, pipeline, planted_samples(), ValidationSettings(2, noise_levels=(1.0,)))


def test_a_layer_that_cannot_be_cut_stands_there_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pipeline = planted()
    layer = AttentionLayer(0, "used", HEADS, TokenLayout("b (v h w)"), stride=8, unsupported="it attends to the text")
    monkeypatch.setattr(CameoModel, "layers", [layer])
    (effect,) = perturb_layers(model, pipeline, planted_samples(), SETTINGS)
    assert effect == LayerEffect(0, "used", reason="it attends to the text")
    assert effects_table([effect]).endswith("| 0 | used | - | - | - | - | - | - |\n\nused: it attends to the text")
    with pytest.raises(ValueError, match="at least one layer that was cut, got 1 without"):
        effects_figure([effect])


def test_without_references_all_pixels_remain() -> None:
    model, pipeline = planted()
    data = [{**sample, "num_reference_views": 0} for sample in planted_samples()]
    used, _ = perturb_layers(model, pipeline, data, SETTINGS)
    assert used.psnr_covisible is None
    assert used.drop_psnr_covisible is None
    assert used.drop_psnr_all == Drop(0.0, 0.0, 0.0)  # the first view wins what the second one loses
    assert used.psnr_all < 20
    assert "psnr_covisible" not in used.per_scene
    (bars,) = effects_figure([used]).axes[0].containers[1:]  # beside the error bars
    assert len(bars) == 1


def test_the_figure_shows_each_drop_and_its_interval() -> None:
    effects = [
        LayerEffect(0, "a", 1.0, 2.0, 3.0, Drop(0, 0, 0), Drop(1.0, 0.5, 1.75), Drop(-0.5, -1.0, 0.25)),
        LayerEffect(1, "b", reason="no"),
        LayerEffect(2, "c", 1.0, 2.0, 3.0, Drop(0, 0, 0), Drop(2.0, 1.5, 2.25), Drop(0.0, 0.0, 0.0)),
    ]
    axes = effects_figure(effects).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0  a", "2  c"]
    bars = [container for container in axes.containers if hasattr(container, "patches")]
    assert [[bar.get_width() for bar in one] for one in bars] == [[1.0, 2.0], [-0.5, 0.0]]
    ends = [segment[:, 0].tolist() for one in bars for segment in one.errorbar.lines[2][0].get_segments()]
    assert ends == [[0.5, 1.75], [1.5, 2.25], [-1.0, 0.25], [0.0, 0.0]]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The shipped base and its validation scenes."""
    config = make_config(
        tmp_path_factory.mktemp("bundled"),
        preset=None,
        preset_options={},
        pretrained_model_name_or_path=BUNDLED,
        data_format="bare_rooms",
        resolution=32,
        num_views=3,
        num_validation_scenes=16,
        views_per_scene=4,
    )
    pipeline = load_pipeline(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMEO_CACHE", scene_cache())
        yield pipeline, build_dataset(config, "validation")


def test_validation_is_not_disturbed_by_a_cut_around_it(bundled: Any) -> None:
    """Inside the block `validate` measures what `perturb_layers` reports, and after it what it measured before."""
    pipeline, data = bundled
    settings = ValidationSettings(num_samples=4, batch_size=4, noise_levels=(1.0,))
    model = cameo.wrap(pipeline.denoiser, "cat3d", head="mean")
    try:
        (effect,) = perturb_layers(model, pipeline, data, settings, layers=[2])
        before = validate(model, pipeline, data, settings)
        with self_view_only(model, model.attention_layers[2], ((8, 8),) * 3):
            cut = validate(model, pipeline, data, settings)
        assert validate(model, pipeline, data, settings) == before
    finally:
        model.unwrap()
    # Four samples of four scenes, so that the mean over scenes is that over samples.
    assert len(effect.per_scene["loss"]) == 4
    assert before["psnr_covisible"] - cut["psnr_covisible"] > 1  # the layer that matters
    for metric in ("loss", "psnr_covisible", "psnr_all"):
        assert getattr(effect, metric) == pytest.approx(cut[metric], rel=1e-6)
        worse = (cut[metric] - before[metric]) * (1 if metric == "loss" else -1)
        assert getattr(effect, f"drop_{metric}").mean == pytest.approx(worse, abs=1e-6)


def test_the_layer_that_the_probe_ranks_first_is_needed_most(bundled: Any) -> None:
    """Of the shipped base: cutting it costs more than cutting any other layer, scene by scene."""
    pipeline, data = bundled
    batches = (batch for _, batch in sample_batches(data, 16, 8, torch.device("cpu")))
    probe = probe_layers(pipeline, batches, (0.5, 0.9, 1.0))
    model = cameo.wrap(pipeline.denoiser, "cat3d", layer="auto", probe=probe)
    settings = ValidationSettings(num_samples=16, noise_levels=(1.0,))
    try:
        effects = perturb_layers(model, pipeline, data, settings)
    finally:
        model.unwrap()
    cut = {effect.path: list(effect.per_scene["psnr_covisible"].values()) for effect in effects}
    best = cut.pop(probe.ranking[0].path)
    assert [layer.path for layer in model.supervised_layers] == [probe.ranking[0].path]
    assert len(best) == 16
    assert len(cut) == 5
    for other in cut.values():
        assert paired_bootstrap(other, best)[1] > 0


def test_a_cut_that_breaks_the_model_is_told_and_not_averaged() -> None:
    layer = AttentionLayer(2, "mid.attn1", heads=1, layout=TokenLayout("b (v h w)"))
    whole = {"loss": {"a": 0.1, "b": 0.2}, "psnr_covisible": {}, "psnr_all": {"a": 10.0, "b": 11.0}}
    cut = {"loss": {"a": 0.2}, "psnr_covisible": {}, "psnr_all": {"a": 9.0, "b": 9.0}}
    effect = perturbation._effect(layer, whole, cut)
    assert effect.reason == "without it the model's loss is not finite in b"
    assert effect.drop_psnr_all is None
    assert effect.per_scene == {}
