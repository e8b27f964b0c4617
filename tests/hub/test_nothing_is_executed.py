"""Models, settings and data of others run no code: every form that is known to do so somewhere is tried.

The payload of each touches a file, on unpickling or on being imported.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import cameo
from cameo.adapters.common.latent_pipeline import LatentPipeline
from cameo.backbone import get_backbone
from cameo.data import open_views
from cameo.data.matches import MatchReader
from cameo.settings import read_yaml
from cameo.training.settings import load_config
from tests.helpers.backbone_checks import build_pipeline
from tests.helpers.posed_formats import WRITERS, room_views

BACKBONES = ("cat3d", "mvdream", "sv3d", "zero123plus")
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.place}'",)


def module(place: Path) -> str:
    """A module that touches a file when it is imported."""
    return f"from pathlib import Path\nPath({str(place)!r}).touch()\nclass Evil:\n    from_pretrained = print\n"


@pytest.fixture
def touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that a payload touches; it must be absent in the end."""
    place = tmp_path / "touched"
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks whether to trust is told to
    yield place
    assert not place.exists(), "the payload was run"


def raw_pickle(touched: Path) -> bytes:
    return pickle.dumps(Touch(touched))


def torch_pickle(touched: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"weight": Touch(touched)}, stream)
    return stream.getvalue()


def legacy_pickle(touched: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"weight": Touch(touched)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def object_array(touched: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Touch(touched)], dtype=object), allow_pickle=True)
    return stream.getvalue()


def object_arrays(touched: Path) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, depth=np.array([Touch(touched)], dtype=object))
    return stream.getvalue()


def as_joblib(touched: Path) -> bytes:
    """What joblib writes without arrays is a pickle."""
    return pickle.dumps([Touch(touched)], protocol=4)


PICKLES: list[Callable[[Path], bytes]] = [
    raw_pickle,
    torch_pickle,
    legacy_pickle,
    object_array,
    object_arrays,
    as_joblib,
]


@pytest.mark.parametrize("dump", PICKLES)
def test_the_payload_runs_where_it_is_unpickled(dump: Callable[[Path], bytes], tmp_path: Path) -> None:
    """Without this, the tests below would pass with a payload that does nothing."""
    place, content = tmp_path / "touched", dump(tmp_path / "touched")
    if "object" in dump.__name__:
        loaded = np.load(io.BytesIO(content), allow_pickle=True)
        _ = loaded["depth"] if "arrays" in dump.__name__ else loaded
    elif dump in (raw_pickle, as_joblib):
        pickle.loads(content)
    else:
        torch.load(io.BytesIO(content), weights_only=False)
    assert place.exists()


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def index(**changes: Any) -> Callable[[Path, Path], None]:
    def act(folder: Path, touched: Path) -> None:
        for place in (folder, folder / "unet", folder / "scheduler"):
            for name in ("evil", "pipeline", "modeling_evil", "diffusers_evil"):
                (place / f"{name}.py").write_text(module(touched))
        edit(folder / "model_index.json", **changes)

    return act


def config(name: str, **changes: Any) -> Callable[[Path, Path], None]:
    def act(folder: Path, touched: Path) -> None:
        index()(folder, touched)
        edit(folder / name, **changes)

    return act


def weights(dump: Callable[[Path], bytes], name: str, *, keep: bool = False) -> Callable[[Path, Path], None]:
    def act(folder: Path, touched: Path) -> None:
        if not keep:
            (folder / "unet" / WEIGHTS).unlink()
        (folder / "unet" / name).write_bytes(dump(touched))

    return act


AUTO_MAP = {"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
PIPELINES: dict[str, Callable[[Path, Path], None]] = {
    **{f"{dump.__name__} as safetensors": weights(dump, WEIGHTS) for dump in PICKLES[:3]},
    **{
        f"{dump.__name__} as {name}": weights(dump, name)
        for dump in PICKLES[:3]
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.pt", "model.ckpt")
    },
    "a pickle beside the weights": weights(torch_pickle, "diffusion_pytorch_model.bin", keep=True),
    "a component of a module in its folder": index(unet=["evil", "Evil"]),
    "a component of a module of the folder around": index(unet=["pipeline", "Evil"]),
    "a scheduler of a module in its folder": index(scheduler=["evil", "Evil"]),
    "a component of os": index(unet=["os", "system"]),
    "a component of subprocess": index(unet=["subprocess", "Popen"]),
    "a component of a module on the path": index(unet=["evil_on_the_path", "Evil"]),
    "a component of a private place": index(unet=["diffusers.evil", "__import__"]),
    "a pipeline class in a file": index(_class_name=["pipeline", "Evil"]),
    "a pipeline class in a file by name": index(_class_name="pipeline"),
    "a further component": index(extra=["evil", "Evil"]),
    "a module as a name": index(unet=["../evil", "Evil"]),
    "auto_map of the index": index(auto_map=AUTO_MAP),
    "auto_map of a component": config("unet/config.json", auto_map=AUTO_MAP, trust_remote_code=True),
    "the class of a component's settings": config("unet/config.json", _class_name="evil.Evil"),
    "a class of a scheduler's settings": config("scheduler/scheduler_config.json", _class_name="evil.Evil"),
    "quantized by a module": config("unet/config.json", quantization_config={"quant_method": "evil"}),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    for backbone in BACKBONES:
        build_pipeline(backbone, "tiny").save_pretrained(folder / backbone)
    return {backbone: folder / backbone for backbone in BACKBONES}


@pytest.mark.parametrize("backbone", ["cat3d", *(pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES[1:])])
def test_pipelines(
    backbone: str, whole: dict[str, Path], touched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path = tmp_path / "path"
    on_path.mkdir()
    (on_path / "evil_on_the_path.py").write_text(module(touched))
    monkeypatch.setattr(sys, "path", [str(on_path), *sys.path])
    for name, act in PIPELINES.items():
        folder = tmp_path / name.replace("/", " ")
        shutil.copytree(whole[backbone], folder)
        act(folder, touched)
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(ValueError, OSError):
            get_backbone(backbone).load(str(folder))
        assert not touched.exists(), f"{name}: the payload was run"
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(ValueError, OSError, RuntimeError):
            LatentPipeline.from_pretrained(str(folder))
        assert not touched.exists(), f"{name}: the payload was run by the class for all"
        shutil.rmtree(folder)


def adapters(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    unet = get_backbone("cat3d").build("tiny", block_out_channels=(8, 8), heads=2, norm_num_groups=4).unet
    settings = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    if kind == "diffusers LoRA":
        unet.add_adapter(settings)
    model = get_peft_model(unet, settings) if kind == "PEFT" else unet
    return cameo.wrap(model, backbone="cat3d").save_pretrained(folder / "adapter", include_head=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diffusers LoRA", "PEFT", "full model"])
def test_adapters_and_models(kind: str, touched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = adapters(tmp_path, kind)
    on_path = tmp_path / "path"
    on_path.mkdir()
    (on_path / "evil_on_the_path.py").write_text(module(touched))
    monkeypatch.setattr(sys, "path", [str(on_path), *sys.path])
    files = [path for path in saved.iterdir() if path.suffix in (".safetensors", ".json")]

    base = get_backbone("cat3d").build("tiny", block_out_channels=(8, 8), heads=2, norm_num_groups=4).unet

    def load() -> None:
        for given in (copy.deepcopy(base), None):
            with warnings.catch_warnings(action="ignore"), contextlib.suppress(ValueError, OSError):
                cameo.from_pretrained(saved, base_model=given)

    for path in files:
        content = path.read_bytes()
        for dump in PICKLES[:3]:
            path.write_bytes(dump(touched))
            load()
            path.unlink()
            for name in (path.with_suffix(".bin"), path.with_suffix(".pt"), path.with_suffix(".pkl")):
                name.write_bytes(dump(touched))
                load()
                name.unlink()
            path.write_bytes(content)
        if path.suffix == ".json":
            for changes in (
                {"auto_map": AUTO_MAP},
                {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_on_the_path"}},
                {"megatron_config": {}, "megatron_core": "evil_on_the_path"},
                {"backbone": "evil_on_the_path"},
                {"backbone": None, "layout": {"query": "!!python/object/apply:os.system ['touch x']"}},
                {"_class_name": "evil_on_the_path.Evil"},
                {"peft_type": "evil_on_the_path.Evil"},
                {"init_lora_weights": "evil_on_the_path"},
            ):
                edit(path, **changes)
                load()
                path.write_bytes(content)
    assert "evil_on_the_path" not in sys.modules


def test_original_checkpoints(touched: Path, tmp_path: Path) -> None:
    for dump in PICKLES:
        for suffix in (".pt", ".pth", ".ckpt", ".safetensors"):
            path = tmp_path / f"model{suffix}"
            path.write_bytes(dump(touched))
            for backbone in ("mvdream", "sv3d"):
                with pytest.raises((ValueError, OSError)):
                    get_backbone(backbone).load(
                        str(path), **({"stable_diffusion": "x"} if backbone == "mvdream" else {})
                    )


YAML = (
    "seed: !!python/object/apply:os.system ['touch {0}']",
    "seed: !!python/object/new:os.system ['touch {0}']",
    "seed: !!python/name:os.system",
    "!!python/object/apply:subprocess.Popen\n- ['touch', '{0}']",
    "preset_options: !!python/module:evil_on_the_path",
    "seed: ${{oc.env:$(touch {0})}}",
    "output_dir: '$(touch {0})'\nseed: `touch {0}`",
    "seed: !!python/tuple [1]",
)


@pytest.mark.parametrize("text", YAML)
def test_settings(text: str, touched: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text.format(touched) + "\n")
    for read in (read_yaml, load_config):
        with contextlib.suppress(ValueError, OSError):
            read(path)


def test_shards(touched: Path, tmp_path: Path) -> None:
    for dump in PICKLES:
        for name in ("matches-000-00000.safetensors", "matches.json"):
            (tmp_path / name).write_bytes(dump(touched))
            with pytest.raises(ValueError):  # noqa: PT011 - of every kind
                MatchReader(tmp_path)
            (tmp_path / name).unlink()


POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 24\n%%EndComments\n(%pipe%touch {0}) (w) file closefile\n"
XMP = (
    '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">&e;</x:xmpmeta><?xpacket end="w"?>'
)


def picture(kind: str, touched: Path) -> bytes:
    """A color image that wants something else than to be decoded."""
    from PIL import Image, PngImagePlugin

    stream, image = io.BytesIO(), Image.new("RGB", (64, 48))
    if kind == "PostScript":
        return POSTSCRIPT.format(touched).encode()
    if kind == "SVG":
        return f'<svg xmlns="http://www.w3.org/2000/svg"><script>touch {touched}</script></svg>'.encode()
    if kind == "XMP with an entity":
        image.save(stream, "JPEG", xmp=XMP.encode())
    else:
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP)
        image.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["nerfstudio", "co3d", "rgbd", "webdataset", "zero123"])
def test_data(form: str, touched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    def no_program(*given: Any, **_: Any) -> None:
        pytest.fail(f"a program was started: {given}")

    whole = WRITERS[form](tmp_path / "whole", room_views(3))

    def load() -> None:
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(ValueError):
            opened = open_views(whole, (24, 32))
            opened.select(0, [0, 1])

    load()
    monkeypatch.setattr(subprocess, "Popen", no_program)
    for path in [path for path in sorted(whole.rglob("*")) if path.is_file()][:6]:
        content = path.read_bytes()
        pictures = ("PostScript", "SVG", "XMP with an entity", "XMP in a PNG")
        for changed in [*(dump(touched) for dump in PICKLES), *(picture(kind, touched) for kind in pictures)]:
            path.write_bytes(changed)
            load()
        path.write_bytes(content)
    (whole / "conftest.py").write_text(module(touched))
    (whole / "__init__.py").write_text(module(touched))
    load()
    if form != "webdataset":
        return
    (path,) = whole.glob("*.tar")
    with tarfile.open(path, "a") as archive:
        for ending in ("pickle", "pkl", "pyd", "pth", "cbor", "cls", "depth.npy"):
            for dump in PICKLES:
                member = tarfile.TarInfo(f"extra.{ending}")
                member.size = len(dump(touched))
                archive.addfile(member, io.BytesIO(dump(touched)))
    load()
