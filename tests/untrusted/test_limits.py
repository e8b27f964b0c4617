"""A downloaded configuration that asks for too much, or says nonsense, is refused by name before memory is taken."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import cameo
from cameo.backbone import get_backbone
from cameo.errors import DataError
from cameo.untrusted.asked import LIMITS, check_asked
from tests.helpers.backbone_checks import build_pipeline

NARROW: dict[str, Any] = {"block_out_channels": (8, 8), "heads": 2, "norm_num_groups": 4}
LORA = "pytorch_lora_weights.safetensors"
HUGE = 10**9


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """Nothing here needs more than a few hundred megabytes beyond what the process has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return get_backbone("cat3d").build("tiny", **NARROW).unet


def saved(kind: str, folder: Path) -> Path:
    unet: Any = denoiser()
    settings = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    if kind == "LoRA":
        unet.add_adapter(settings)
    model = get_peft_model(unet, settings) if kind == "PEFT" else unet
    return cameo.wrap(model, backbone="cat3d").save_pretrained(folder / "saved")


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def header_edited(path: Path, **changes: Any) -> None:
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["lora_adapter_metadata"])
    settings |= {f"unet.{name}": value for name, value in changes.items()}
    save_file(load_file(path), path, metadata={**metadata, "lora_adapter_metadata": json.dumps(settings)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": {"kind": "mlp", "depth": 10**6}}, "depth: expected at most 64 hidden layers, got 1000000"),
        ({"head": {"kind": "mlp", "expansion": HUGE}}, "expansion: expected a head of at most 16,777,216 parameters"),
        ({"head": {"kind": "mlp", "depth": 1.5}}, "depth: expected an integer of at least 0, got 1.5"),
        ({"layers": ["x"] * 10**5, "layouts": None}, "layers: expected at most 1024 module paths, got 100000"),
        ({"layouts": [{"a": 1}]}, "layouts: expected the keyword arguments of TokenLayout"),
        ({"weight": math.inf}, "holds Infinity; expected finite numbers"),
        ({"position": "zzz"}, "unknown position 'zzz'"),
    ],
)
def test_configurations(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved("LoRA", tmp_path)
    edited(folder / "cameo_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        cameo.from_pretrained(folder, base_model=denoiser())


ADAPTERS: list[tuple[dict[str, Any], str]] = [
    ({"r": HUGE}, r"r: expected a rank from 1 to 2, the largest of its weights, got 1000000000"),
    ({"r": 0}, r"r: expected a rank from 1 to 2"),
    ({"r": "2"}, r"r: expected a rank from 1 to 2, .*got '2'"),
    ({"rank_pattern": {"to_q": HUGE}}, r"rank_pattern.to_q: expected a rank from 1 to 2"),
    ({"rank_pattern": 3}, r"rank_pattern: expected module names with values, got 3"),
    ({"lora_alpha": 1e30}, r"lora_alpha: expected a finite number of at most 65536, got 1e\+30"),
    ({"lora_alpha": math.nan}, r"holds NaN; expected finite numbers"),
    ({"lora_alpha": "x"}, r"lora_alpha: expected a finite number .*got 'x'"),
    ({"alpha_pattern": {"to_q": -1e9}}, r"alpha_pattern.to_q: expected a finite number"),
    ({"target_modules": "(a+)+$"}, r"target_modules: .*could take forever to match"),
    ({"target_modules": "(.*.*.*.*.*.*)x$"}, r"target_modules: .*could take forever to match"),
    ({"target_modules": "(("}, r"target_modules: expected a pattern of module names"),
    ({"lora_dropout": 2.0}, r"no model can be built from it \(ValueError: dropout probability"),
    ({"modules_to_save": ["conv_in"]}, r"no model can be built from it \(KeyError"),
]


@pytest.mark.parametrize("kind", ["LoRA", "PEFT"])
@pytest.mark.parametrize(("changes", "message"), ADAPTERS)
def test_adapters(kind: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path)
    name = LORA if kind == "LoRA" else "adapter_config.json"
    (header_edited if kind == "LoRA" else edited)(folder / name, **changes)
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        cameo.from_pretrained(folder, base_model=denoiser())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["LoRA", "PEFT", "full"])
def test_weights_that_are_not_finite(kind: str, value: float, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path)
    (path,) = folder.glob("*.safetensors")
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    state[max(state)].view(-1)[-1] = value
    save_file(state, path, metadata=metadata)
    with pytest.raises(DataError, match=f"{max(state).split('.', 1)[1]} holds (NaN|infinite numbers)"):
        cameo.from_pretrained(folder, base_model=denoiser())


def test_weights_whose_sum_overflows_are_finite(tmp_path: Path) -> None:
    from cameo.hub.loading import check_numbers

    check_numbers(tmp_path, {"a": torch.full((4,), 3e38), "b": torch.full((4,), 1e308, dtype=torch.float64)})


ASKED: list[tuple[str, dict[str, Any], str]] = [
    ("unet/config.json", {"block_out_channels": [HUGE, HUGE]}, r"block_out_channels: expected at most 1048576"),
    ("unet/config.json", {"layers_per_block": 10**6}, r"layers_per_block: expected at most 256, got 1000000"),
    ("unet/config.json", {"layers_per_block": 1e6}, r"layers_per_block: expected at most 256, got 1000000"),
    ("unet/config.json", {"extra": {"deep": [HUGE]}}, r"extra.deep: expected at most 1048576"),
    ("unet/config.json", {"block_out_channels": [8] * 5000}, r"block_out_channels: expected at most 4096 entries"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": HUGE}, r"num_train_timesteps: expected at most"),
    ("unet/config.json", {"attention_head_dim": math.nan}, r"holds NaN"),
]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    for backbone in ("cat3d", "mvdream", "sv3d", "zero123plus"):
        build_pipeline(backbone, "tiny").save_pretrained(folder / backbone)
    return folder


@pytest.mark.parametrize("backbone", ["cat3d", "mvdream", "sv3d", "zero123plus"])
def test_pipelines_of_the_backbones(backbone: str, pipelines: Path) -> None:
    folder = pipelines / backbone
    for name, changes, message in ASKED:
        whole = (folder / name).read_bytes()
        edited(folder / name, **changes)
        with pytest.raises(DataError, match=rf"{name}.*{message}"):
            get_backbone(backbone).load(str(folder))
        (folder / name).write_bytes(whole)
    damages: list[Callable[[bytes], bytes]] = [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"\xff\xfe" + content,
        lambda content: b"3",
        lambda content: b"[" * 10**5,
        lambda content: b'{"_class_name": "x", "_class_name": "y"}',
    ]
    names = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
    for name in [*names, "unet/diffusion_pytorch_model.safetensors"]:
        whole = (folder / name).read_bytes()
        for damage in damages:
            (folder / name).write_bytes(damage(whole))
            with pytest.raises(DataError, match=rf"{name}: damaged or cut short .*download it again"):
                get_backbone(backbone).load(str(folder))
        (folder / name).write_bytes(whole)
    assert get_backbone(backbone).load(str(folder)).unet is not None


def test_a_model_that_is_larger_than_its_weights_takes_no_memory(pipelines: Path, tmp_path: Path) -> None:
    """Within the bounds a configuration may still ask for terabytes; the weights beside it are smaller."""
    folder = cameo.wrap(denoiser(), backbone="cat3d").save_pretrained(tmp_path / "full")
    edited(folder / "config.json", block_out_channels=[1 << 19, 1 << 19])
    with pytest.raises(DataError, match=r"config.json: no model can be built from it"):
        cameo.from_pretrained(folder)


def test_the_owner_may_ask_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"num_layers": 300}
    with pytest.raises(DataError, match=r"mine.json: num_layers: expected at most 256, got 300"):
        check_asked(Path("mine.json"), config)
    monkeypatch.setattr(LIMITS, "layers", 1000)
    check_asked(Path("mine.json"), config)


def test_a_base_in_a_folder_of_the_authors_machine_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipelines: Path
) -> None:
    """A repository of the Hub that names a local path as its base names nothing on this machine."""
    from cameo.hub import save_load

    folder = saved("LoRA", tmp_path)
    edited(folder / "cameo_config.json", base_model=str(pipelines / "cat3d"))
    monkeypatch.setattr(save_load, "local_folder", lambda *_: folder)
    with pytest.raises(ValueError, match=r"names no base; pass the base as base_model="):
        cameo.from_pretrained("painter/rooms")
