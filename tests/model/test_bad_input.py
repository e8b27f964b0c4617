"""Bad cameras, geometry, models and settings at the public entry points: an error with its cure, or a defined loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cameo
from cameo.backbone import get_backbone
from cameo.data.batches import match_batch
from cameo.evaluation.validation import validate
from cameo.geometry.cameras import check_cameras
from cameo.probing.denoising import ValidationSettings
from cameo.training.settings import load_config
from cameo.training.setup import load_pipeline
from tests.helpers.bad_input import Bench, changed
from tests.helpers.batches import make_batch
from tests.helpers.training_runs import fresh_accelerate, make_config, make_trainer, scene_cache

NAN = float("nan")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    with fresh_accelerate():
        yield


def setting(line: str) -> Callable[[Bench], Any]:
    def load(b: Bench) -> None:
        path = b.folder / "run.yaml"
        path.write_text("preset: tiny\n")
        load_config(path, [line])

    return load


def flipped(b: Bench) -> None:
    b.match(extrinsics=changed(b.batch["extrinsics"], (0, 1, 0, 0), -1.0))


def other_batch(b: Bench) -> None:
    b.forward(cameo.Correspondence.cat([b.match(), b.match()]))


def fewer_views(b: Bench) -> None:
    b.forward(b.match().take_views([0, 1]))


def frozen(b: Bench) -> None:
    _, model = b.wrapped()
    model.base_model.requires_grad_(False)
    model.train()
    args, kwargs = get_backbone("cat3d").example_inputs(model.base_model)
    index = torch.full((1, 2, 2, 16), -1)
    model(*args, correspondence=cameo.Correspondence(index, ((4, 4), (4, 4))), **kwargs)


def nothing_to_train(b: Bench) -> None:
    make_trainer(b.folder, target_modules=["no_such_module"])


def empty_validation(b: Bench) -> None:
    pipeline, model = b.wrapped()
    apart = b.batch["extrinsics"].clone()
    apart[:, 0, 0, 3] += 1000.0  # the reference view sees nothing of the others
    batch = {**b.batch, "extrinsics": apart}
    sample = {name: value[0] if not isinstance(value, int) else value for name, value in batch.items()}
    validate(model, pipeline, [sample], ValidationSettings(num_samples=1, noise_levels=(1.0,)))


CASES: dict[str, tuple[Callable[[Bench], Any], type[Exception], str]] = {
    # cameras
    "no intrinsics": (lambda b: b.match(intrinsics=None), ValueError, r"intrinsics.*camera"),
    "intrinsics of another batch": (
        lambda b: b.match(intrinsics=b.batch["intrinsics"][:, :2]),
        ValueError,
        r"intrinsics|extrinsics",
    ),
    "focal length 0": (
        lambda b: b.match(intrinsics=changed(b.batch["intrinsics"], (0, 1, 0, 0), 0.0)),
        ValueError,
        r"intrinsics: sample 0, view 1 .*focal",
    ),
    "singular rotation": (
        lambda b: b.match(extrinsics=changed(b.batch["extrinsics"], (0, 2, 0), 0.0)),
        ValueError,
        r"extrinsics: sample 0, view 2 .*rotation.*Cure",
    ),
    "left-handed camera": (flipped, ValueError, r"extrinsics: sample 0, view 1 .*Cure"),
    "NaN pose": (
        lambda b: check_cameras(b.batch["intrinsics"], changed(b.batch["extrinsics"], (0, 0, 0, 3), NAN)),
        ValueError,
        r"extrinsics: sample 0, view 0 ",
    ),
    "3x4 extrinsics": (
        lambda b: b.match(extrinsics=b.batch["extrinsics"][:, :, :3]),
        ValueError,
        r"extrinsics: expected",
    ),
    # geometry
    "depth without its channel": (
        lambda b: b.match(depth=b.batch["depth"][:, :, 0]),
        ValueError,
        r"depth: expected \[B, V, 1, H, W\]",
    ),
    "integer depth": (
        lambda b: b.match(depth=b.batch["depth"].int()),
        ValueError,
        r"depth: expected floating point.*Cure",
    ),
    "points last": (
        lambda b: cameo.Correspondence.from_point_maps(torch.zeros(1, 2, 8, 8, 3), token_grid=4),
        ValueError,
        r"points: expected \[B, V, 3, H, W\], got \[1, 2, 8, 8, 3\]",
    ),
    "no geometry": (
        lambda b: match_batch({"images": b.batch["images"], "key": ["room/1"]}, (4, 4)),
        ValueError,
        r"sample \['room/1'\]: has no depth and no point_map.*, or loss_weight=0 to train without",
    ),
    "point maps where depth is asked for": (
        lambda b: match_batch({"point_map": torch.zeros(1, 2, 3, 8, 8), "key": ["room/1"]}, (4, 4)),
        ValueError,
        r"room/1.*has no depth, .*correspondence=point_map",
    ),
    "unknown correspondence": (
        lambda b: match_batch(b.batch, (4, 4), kind="depht"),
        ValueError,
        r"unknown correspondence 'depht': did you mean 'depth'",
    ),
    # model
    "not that backbone": (
        lambda b: cameo.wrap(nn.Linear(2, 2), backbone="cat3d"),
        ValueError,
        r"backbone 'cat3d' does not fit: Linear .*Pass the U-Net",
    ),
    "nothing to inflate": (
        lambda b: b.wrapped(inflate=True),
        ValueError,
        r"inflate=True: 'cat3d' has no layer that sees one view each",
    ),
    "loss before a forward": (
        lambda b: b.wrapped()[1].alignment_loss,
        RuntimeError,
        r"call the model with correspondence=",
    ),
    "token grid of another layer": (
        lambda b: b.forward(
            cameo.Correspondence.from_depth(
                b.batch["depth"], b.batch["intrinsics"], b.batch["extrinsics"], token_grid=8
            )
        ),
        ValueError,
        r"expected .*got",
    ),
    "correspondence of another batch": (other_batch, ValueError, r"expected .*got"),
    "correspondence of fewer views": (fewer_views, ValueError, r"expected .*got"),
    "nothing trains": (frozen, RuntimeError, r"carry no gradient.*add LoRA or unfreeze"),
    "image size the model cannot take": (
        lambda b: b.wrapped()[0].training_inputs(make_batch(samples=1, views=2, size=36)),
        ValueError,
        r"images: expected height and width divisible by 8",
    ),
    "no target view": (
        lambda b: b.wrapped()[0].training_inputs({**b.batch, "num_reference_views": 3}),
        ValueError,
        r"num_reference_views: expected 1 to 2 of 3 views, got 3",
    ),
    "unknown preset option": (
        lambda b: load_pipeline(make_config(b.folder, preset_options={"image_sise": 32})),
        ValueError,
        r"option.*'image_sise': did you mean 'image_size'",
    ),
    "LoRA on modules that do not exist": (nothing_to_train, ValueError, r"no_such_module"),
    "adapter folder that does not exist": (
        lambda b: cameo.from_pretrained(b.folder / "none"),
        ValueError,
        r"none: no such folder",
    ),
    # settings
    "unknown setting": (
        setting("train_batchsize=4"),
        ValueError,
        r"'train_batchsize': did you mean 'train_batch_size'",
    ),
    "one view": (setting("num_views=1"), ValueError, r"num_views: expected at least 2, got 1"),
    "text for a number": (setting("max_train_steps=many"), ValueError, r"'many'"),
    "evaluation of what nobody sees": (
        empty_validation,
        ValueError,
        r"no target pixel is seen by a reference.*min_overlap",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_explained(name: str, tmp_path: Path) -> None:
    act, kind, message = CASES[name]
    with pytest.raises(kind, match=rf"(?s){message}"):
        act(Bench(tmp_path))


@pytest.mark.parametrize("missing", [0.0, -1.0, NAN, float("inf")])
def test_missing_depth_gives_a_loss_of_zero_with_a_graph(missing: float, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    model = bench.forward(bench.match(depth=torch.full_like(bench.batch["depth"], missing)))
    assert model.num_supervised == 0
    assert model.alignment_loss.item() == 0.0
    model.alignment_loss.backward()
    gradients = [parameter.grad for parameter in model.alignment_heads.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_one_view_gives_a_loss_of_zero(tmp_path: Path) -> None:
    _, model = Bench(tmp_path).wrapped()
    batch = make_batch(samples=2, views=1, size=32)
    match = cameo.Correspondence.from_depth(batch["depth"], batch["intrinsics"], batch["extrinsics"], token_grid=4)
    args, kwargs = get_backbone("cat3d").example_inputs(model.base_model)
    model(*args, correspondence=match, **{**kwargs, "cross_attention_kwargs": {"num_views": 1}})
    assert model.alignment_loss.item() == 0.0
    assert model.num_supervised == 0
