"""Bad input through the public entry points: a clear error that names the culprit and the cure, or a defined loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cameo
from cameo.backbone import get_backbone
from cameo.data import EmbeddedScenes, MultiViewDataset, RGBDSequence, Views, collate
from cameo.data.batches import match_batch
from cameo.evaluation.validation import validate
from cameo.geometry.cameras import check_cameras
from cameo.probing.denoising import ValidationSettings
from cameo.training.data import build_dataset
from cameo.training.settings import load_config
from cameo.training.setup import load_pipeline, wrap_denoiser
from tests.helpers.batches import make_batch
from tests.helpers.sequences import write_sequence
from tests.helpers.training_runs import fresh_accelerate, make_config, make_trainer, scene_cache

NAN = float("nan")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    with fresh_accelerate():
        yield


class Bench:
    """What the cases work with: a folder, a batch, and the small model around them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batch = make_batch(samples=1, views=3, size=32)

    def match(self, **changes: Any) -> cameo.Correspondence:
        batch = {**self.batch, **changes}
        return cameo.Correspondence.from_depth(batch["depth"], batch["intrinsics"], batch["extrinsics"], token_grid=4)

    def wrapped(self, **changes: Any) -> tuple[Any, cameo.CameoModel]:
        config = make_config(self.folder, **changes)
        pipeline = load_pipeline(config)
        return pipeline, wrap_denoiser(pipeline, config)

    def forward(self, match: cameo.Correspondence, **changes: Any) -> cameo.CameoModel:
        pipeline, model = self.wrapped()
        inputs = pipeline.training_inputs({**self.batch, **changes}, timesteps=torch.tensor([500]))
        model(*inputs.args, correspondence=match, **inputs.kwargs)
        return model

    def train_on(self, source: Any) -> None:
        trainer = make_trainer(self.folder / "run", max_train_steps=1)
        trainer.dataset = MultiViewDataset(source, num_views=2, length=100)
        trainer.train()

    def views(self, **changes: torch.Tensor) -> Views:
        fields = {name: self.batch[name][0] for name in ("images", "depth", "intrinsics", "extrinsics")}
        return Views(**{**fields, **changes}, key="kitchen")

    def sequence(self) -> Path:
        return write_sequence(self.folder / "office", frames=6)


class OneScene:
    def __init__(self, views: Views) -> None:
        self.one = views

    def __len__(self) -> int:
        return 1

    def views(self, scene: int) -> Views:
        return self.one


def changed(tensor: torch.Tensor, place: Any, value: Any) -> torch.Tensor:
    copy = tensor.clone()
    copy[place] = torch.as_tensor(value, dtype=copy.dtype)
    return copy


def truncated(b: Bench) -> None:
    path = b.sequence() / "frame-000002.color.png"
    path.write_bytes(path.read_bytes()[:200])
    RGBDSequence(path.parent, size=(32, 32))


def without_intrinsics(b: Bench) -> None:
    folder = b.sequence()
    (folder / "camera-intrinsics.txt").unlink()
    build_dataset(make_config(b.folder, train_data_dir=str(folder)), "train")


def without_depth(b: Bench) -> None:
    folder = b.sequence()
    for path in folder.glob("*.depth.png"):
        Image.fromarray(np.zeros((48, 64), dtype=np.uint16)).save(path)
    build_dataset(make_config(b.folder, train_data_dir=str(folder)), "train")


def eight_bit_depth(b: Bench) -> None:
    folder = b.sequence()
    Image.fromarray(np.zeros((48, 64), dtype=np.uint8)).save(folder / "frame-000000.depth.png")
    RGBDSequence(folder, size=(32, 32))


def file_as_folder(b: Bench) -> None:
    path = b.folder / "video.mp4"
    path.touch()
    build_dataset(make_config(b.folder, train_data_dir=str(path)), "train")


def mesh_without_faces(b: Bench) -> None:
    for number in range(9):
        (b.folder / f"chair-{number}.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n")
    EmbeddedScenes(num_scenes=1, size=(8, 8), mesh_dir=b.folder, cache_dir=b.folder / "cache", progress=False)


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
    make_trainer(b.folder, target_modules=["to_q"], weight=0.0).model.requires_grad_(False)
    trainer = make_trainer(b.folder, target_modules=["no_such_module"])
    trainer.train()


def wrapped_twice(b: Bench) -> None:
    _, model = b.wrapped()
    cameo.wrap(model.base_model, backbone="cat3d")


def empty_validation(b: Bench) -> None:
    pipeline, model = b.wrapped()
    batch = {**b.batch, "depth": torch.zeros_like(b.batch["depth"])}
    sample = {name: value[0] if not isinstance(value, int) else value for name, value in batch.items()}
    validate(model, pipeline, [sample], ValidationSettings(num_samples=1, noise_levels=(1.0,)))


def unet() -> nn.Module:
    return get_backbone("cat3d").build("tiny", image_size=32, block_out_channels=(32, 32), norm_num_groups=8).unet


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
        r"sample \['room/1'\]: has no depth and no point_map.*weight=0",
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
    "unknown backbone": (lambda b: cameo.wrap(nn.Linear(2, 2), backbone="cat3"), ValueError, r"did you mean 'cat3d'"),
    "not that backbone": (
        lambda b: cameo.wrap(nn.Linear(2, 2), backbone="cat3d"),
        ValueError,
        r"backbone 'cat3d' does not fit: Linear .*Pass the U-Net",
    ),
    "unknown layer name": (
        lambda b: cameo.wrap(unet(), backbone="cat3d", layer="mid_block.attentions.0.transformer_blocks.0.attn"),
        ValueError,
        r"unknown layer .*did you mean 'mid_block.attentions.0.transformer_blocks.0.attn1'",
    ),
    "nothing to inflate": (
        lambda b: b.wrapped(inflate=True),
        ValueError,
        r"inflate=True: 'cat3d' has no layer that sees one view each",
    ),
    "unknown layer number": (
        lambda b: cameo.wrap(unet(), backbone="cat3d", layer=99),
        ValueError,
        r"layer 99 does not exist.*0 to",
    ),
    "unknown head": (lambda b: cameo.wrap(unet(), backbone="cat3d", head="mpl"), ValueError, r"head.*'mpl'.*'mlp'"),
    "wrapped twice": (wrapped_twice, ValueError, r"wrapped already.*unwrap"),
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
    # data
    "NaN images": (
        lambda b: b.train_on(OneScene(b.views(images=changed(b.batch["images"][0], (1, 0, 3, 3), NAN)))),
        ValueError,
        r"sample kitchen/.*: images hold NaN or infinite values; check the source's files",
    ),
    "images up to 255": (
        lambda b: b.train_on(OneScene(b.views(images=b.batch["images"][0] * 255))),
        ValueError,
        r"sample kitchen/.*expected in \[0, 1\].*uint8",
    ),
    "images with four channels": (
        lambda b: b.views(images=torch.zeros(3, 4, 32, 32)),
        ValueError,
        r"images of 'kitchen': expected \[F, 3, H, W\]",
    ),
    "depth of another size": (
        lambda b: b.views(depth=torch.ones(3, 1, 16, 16)),
        ValueError,
        r"depth of 'kitchen': expected \[3, 1, 32, 32\]",
    ),
    "samples of different token_grids": (
        lambda b: collate(
            [{"images": torch.zeros(2, 3, s, s), "num_reference_views": 1, "key": f"room/{s}"} for s in (8, 16)]
        ),
        ValueError,
        r"images of room/16: expected \[2, 3, 8, 8\].*same image size",
    ),
    "no overlapping views": (
        lambda b: b.train_on(OneScene(b.views(depth=torch.zeros(3, 1, 32, 32)))),
        ValueError,
        r"no scene has 2 views whose overlap.*Widen the bounds",
    ),
    "truncated image": (truncated, ValueError, r"frame-000002.color.png: cannot decode the color image"),
    "sequence without intrinsics": (without_intrinsics, ValueError, r"office: no camera intrinsics .*pass intrinsics="),
    "sequence without any depth": (without_depth, ValueError, r"office: no frame has any depth .*16-bit originals"),
    "8-bit depth image": (eight_bit_depth, ValueError, r"frame-000000.depth.png: expected a 16-bit gray depth image"),
    "absent data folder": (
        lambda b: build_dataset(make_config(b.folder, train_data_dir=str(b.folder / "rooms")), "train"),
        ValueError,
        r"train_data_dir=.*rooms: no such folder",
    ),
    "file as data folder": (file_as_folder, ValueError, r"train_data_dir=.*video.mp4: no such folder"),
    "empty data folder": (
        lambda b: build_dataset(make_config(b.folder, train_data_dir=str(b.folder)), "train"),
        ValueError,
        r"no RGB-D frames found; looked for frame-NNNNNN.color.png",
    ),
    "sequence format without folder": (
        lambda b: build_dataset(make_config(b.folder, data_format="rgbd"), "train"),
        ValueError,
        r"data_format=rgbd needs train_data_dir=",
    ),
    "rig of another number of views": (
        lambda b: build_dataset(make_config(b.folder, camera_rig="mvdream", num_views=3), "train"),
        ValueError,
        r"camera_rig=mvdream with num_views=3: .*has 4 views",
    ),
    "mesh without faces": (mesh_without_faces, ValueError, r"chair-0.obj: .*faces"),
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


def test_training_goes_on_over_a_sample_without_depth(tmp_path: Path) -> None:
    class Sometimes:
        def __init__(self, base: Any) -> None:
            self.base = base

        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = dict(self.base[index])
            return {**sample, "depth": torch.zeros_like(sample["depth"])} if index < 2 else sample

    trainer = make_trainer(tmp_path, max_train_steps=2)
    trainer.dataset = Sometimes(trainer.dataset)
    first, second = trainer.train().history()
    assert (first["alignment_loss"], first["supervised"]) == (0.0, 0.0)
    assert second["alignment_loss"] > 0
    assert second["supervised"] > 0
