"""Push models of several kinds to a Hub, and keep what they compute, for those who load them by their cards.

Run as `python -m tests.helpers.card_author FOLDER`; writes `FOLDER/<name>.pt`, the inputs and the output of each model,
and `FOLDER/steps.json`, what was printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from PIL import Image

import cameo
from cameo.backbone import get_backbone
from cameo.commands.main import main as command
from cameo.hub.loading import without_adapter

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
METRICS = {
    "base": {"PSNR of the predicted view (dB)": 11.8, "denoising loss": 0.27},
    "without CAMEO": {"PSNR of the predicted view (dB)": 12.5, "denoising loss": 0.26},
    "with CAMEO": {"PSNR of the predicted view (dB)": 13.25, "denoising loss": 0.25},
}
printed: dict[str, Any] = {}


def keep(path: Path, denoiser: torch.nn.Module, *, views: int = 2) -> None:
    """Keep inputs and output of a denoiser; with one view each is denoised by itself, as plain diffusers does."""
    (sample, *others), kwargs = get_backbone("cat3d").example_inputs(denoiser)
    if views == 1:
        kwargs = {"cross_attention_kwargs": {"num_views": 1}}
    with torch.no_grad():
        output = denoiser.eval()(sample, *others, **kwargs).sample
    torch.save({"args": (sample, *others), "kwargs": kwargs, "output": output}, path)


def with_lora(denoiser: torch.nn.Module, base: str, revision: str | None = None) -> cameo.CameoModel:
    settings = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, "base_model_name_or_path": "/home/author/base"}
    denoiser.add_adapter(LoraConfig(target_modules=TARGETS, **settings))
    model = cameo.wrap(denoiser, backbone="cat3d", weight=0.1)
    model.cameo_config.base_model, model.cameo_config.base_revision = base, revision
    model.cameo_config.training = {"data": "rooms", "validation samples": 8, "cache": "/home/author/latents"}
    return model


def push(name: str, *arguments: str) -> None:
    """Run `cameo push` and keep what it prints."""
    out, status = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            command(["push", *arguments])
        except SystemExit as end:
            status = int(end.code or 0)
    printed[name] = {"status": status, "text": out.getvalue()}


def main(folder: Path) -> None:
    torch.manual_seed(0)
    adapter = get_backbone("cat3d")
    Image.new("RGB", (4, 4)).save(folder / "view.png")
    facts = {"metrics": METRICS, "pictures": {"What there is to see": folder / "view.png"}}

    pipeline = adapter.build("tiny", position="none")  # whole in plain diffusers
    full = cameo.wrap(pipeline.unet, backbone="cat3d")
    full.push_to_hub("painter/base", pipeline=pipeline, license="openrail", metrics=METRICS)
    keep(folder / "base.pt", pipeline.unet)
    keep(folder / "base-plain.pt", pipeline.unet, views=1)

    unet = with_lora(adapter.load("painter/base").unet, "painter/base")
    unet.push_to_hub("painter/unet-lora", **facts)
    keep(folder / "unet-lora.pt", unet.base_model)
    keep(folder / "unet-lora-plain.pt", unet.base_model, views=1)

    bundled = "bundled:cat3d-transformer-tiny"
    dit = with_lora(adapter.load(bundled).unet, bundled)
    run = folder / "office-run"
    dit.save_pretrained(run / "adapter", **facts)
    (run / "adapter" / "notes.txt").write_text("not for the Hub")
    (run / "adapter" / "optimizer.bin").write_bytes(b"not for the Hub")
    keep(folder / "dit-lora.pt", dit.base_model)
    push("run", str(run), "dit-lora", "private=true")
    named = Path(dit.save_pretrained(folder / "named", repo_id="painter/old-name", **facts)) / "README.md"
    named.write_text(named.read_text().replace("## Use", "By the author.\n\n## Use"))
    push("another name", str(folder / "named"), "painter/renamed", "license=mit", "create_pr=false")

    # A base that is a folder of the author's: there it is loaded, gone it is not, and the Hub hears of neither.
    local = folder / "base-folder"
    adapter.load(bundled).save_pretrained(str(local))
    local_lora = with_lora(adapter.load(str(local)).unet, str(local))
    local_lora.save_pretrained(folder / "local", license="mit", local_base=True)
    push("local base", str(folder / "local"), "painter/local")
    local.rename(folder / "base-gone")
    push("base gone", str(folder / "local"), "painter/gone")
    preset = with_lora(without_adapter(dit.base_model), "preset:transformer-tiny")
    preset.save_pretrained(folder / "preset")
    push("preset", str(folder / "preset"), "painter/preset")

    push("no folder", str(folder / "nowhere"), "painter/x")
    push("no model", str(folder / "office-run" / "adapter" / "pictures"), "painter/x")
    push("one argument", str(folder / "local"))
    push("wrong token", str(folder / "preset"), "painter/x", "token=hf_" + "x" * 34)
    push("no id", str(folder / "preset"), "painter/my rooms")
    weights = folder / "preset" / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    push("damaged", str(folder / "preset"), "painter/x")
    (folder / "steps.json").write_text(json.dumps(printed))


if __name__ == "__main__":
    warnings.filterwarnings("error", message="saving:")  # nothing is left out of what is saved here
    main(Path(sys.argv[1]))
