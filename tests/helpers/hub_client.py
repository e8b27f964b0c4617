"""Everything that needs a Hub, in one process of its own: the client reads `HF_ENDPOINT` when it is imported.

Run as `python -m tests.helpers.hub_client FOLDER`; writes what happened in each step to `FOLDER/steps.json`.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from peft import LoraConfig

import cameo
from cameo.backbone import get_backbone
from tests.helpers.backbone_checks import build_pipeline
from tests.helpers.hub_server import READ_TOKEN, WRONG_TOKEN

# A LoRA of each is pushed: its backbone, its preset and the options of `cameo.wrap`.
PRESETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cat3d": ("cat3d", "tiny", {}),
    "cat3d-transformer": ("cat3d", "transformer-tiny", {}),
    "mvdream": ("mvdream", "tiny", {}),
    "imagedream": ("mvdream", "imagedream-tiny", {}),
    "sv3d": ("sv3d", "tiny", {}),
    "sv3d-inflated": ("sv3d", "tiny", {"inflate": True}),
    "zero123plus": ("zero123plus", "tiny", {}),
}
steps: dict[str, Any] = {}


def step(name: str, action: Callable[[], Any]) -> Any:
    """Record the result or the error of one step."""
    try:
        result = action()
    except Exception as error:
        steps[name] = {"error": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
        return None
    steps[name] = {"value": result if isinstance(result, str | bool | int | list) else None}
    return result


def output(model: torch.nn.Module, backbone: str = "cat3d") -> torch.Tensor:
    args, kwargs = get_backbone(backbone).example_inputs(model)
    with torch.no_grad():
        return model.eval()(*args, **kwargs).sample


def with_lora(name: str, revision: str | None) -> cameo.CameoModel:
    unet = get_backbone("cat3d").load(name, revision=revision).unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    model = cameo.wrap(unet, backbone="cat3d")
    model.cameo_config.base_model, model.cameo_config.base_revision = name, revision
    return model


def main(folder: Path) -> None:
    torch.manual_seed(0)
    pipeline = get_backbone("cat3d").build("tiny")
    full = cameo.wrap(pipeline.unet, backbone="cat3d")
    (folder / "optimizer.bin").write_bytes(b"not for the Hub")

    step("full", lambda: full.push_to_hub("painter/base", pipeline=pipeline, license="openrail"))
    base_revision = HfApi().model_info("painter/base").sha
    again = cameo.from_pretrained("painter/base")
    step("full comes back", lambda: torch.equal(output(again.unwrap()), output(full.unwrap())))
    step("full names its revision", lambda: again.cameo_config.base_revision == base_revision)

    lora = with_lora("painter/base", base_revision)
    state = torch.random.get_rng_state()
    facts = {"metrics": {"psnr": 21.5}, "pictures": [folder / "view.png"], "include_head": True}
    step("lora", lambda: lora.push_to_hub("rooms", private=True, commit_message="first", **facts))
    step("random numbers untouched", lambda: torch.equal(state, torch.random.get_rng_state()))
    loaded = step("load", lambda: cameo.from_pretrained("painter/rooms", cache_dir=folder / "cache"))
    step("lora comes back", lambda: torch.equal(output(loaded.unwrap()), output(lora.unwrap())))
    heads = zip(loaded.alignment_heads.parameters(), lora.alignment_heads.parameters(), strict=True)
    step("head comes back", lambda: all(torch.equal(one, other) for one, other in heads))
    offline = {"cache_dir": folder / "cache", "local_files_only": True}
    step("load offline", lambda: cameo.from_pretrained("painter/rooms", **offline) is not None)

    step("pull request", lambda: lora.push_to_hub("painter/rooms", create_pr=True))
    step("branch", lambda: lora.push_to_hub("painter/rooms", revision="v2"))
    step("load branch", lambda: cameo.from_pretrained("painter/rooms", revision="v2") is not None)
    step("load unknown branch", lambda: cameo.from_pretrained("painter/rooms", revision="v3"))
    step("load unknown", lambda: cameo.from_pretrained("painter/nowhere"))
    step("other format", lambda: full.push_to_hub("painter/rooms", pipeline=pipeline, license="openrail"))

    for name, (backbone, preset, options) in PRESETS.items():
        unet = build_pipeline(backbone, preset).denoiser
        fresh = copy.deepcopy(unet)
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
        model = cameo.wrap(unet, backbone=backbone, **options)
        model.cameo_config.base_model = f"preset:{preset}"
        step(f"push {name}", lambda model=model, name=name: model.push_to_hub(f"painter/preset-{name}"))
        back = step(
            f"load {name}",
            lambda fresh=fresh, name=name: cameo.from_pretrained(f"painter/preset-{name}", base_model=fresh),
        )
        outputs = [output(one.unwrap(), backbone) for one in (back, model)]
        step(f"{name} comes back", lambda outputs=outputs: torch.equal(*outputs))

    step("commit fails", lambda: lora.push_to_hub("painter/rooms-broken"))
    step("invalid license", lambda: lora.push_to_hub("painter/other", license="other"))
    with torch.no_grad():
        lora.conv_in.weight.add_(1)
    step("base changed", lambda: lora.push_to_hub("painter/changed"))
    full.cameo_config.base_model = None
    step("no license", lambda: full.push_to_hub("painter/unlicensed"))

    token = os.environ.pop("HF_TOKEN")
    push = {"repo_id": "painter/tokens", "license": "mit", "pipeline": pipeline}
    step("no token", lambda: full.push_to_hub(**push))
    step("wrong token", lambda: full.push_to_hub(**push, token=WRONG_TOKEN))
    step("read token", lambda: full.push_to_hub(**push, token=READ_TOKEN))
    step("no member", lambda: full.push_to_hub("gallery/rooms", license="mit", pipeline=pipeline, token=token))
    step("no id", lambda: full.push_to_hub("painter/my rooms", license="mit", pipeline=pipeline, token=token))
    constants.ENDPOINT = "http://127.0.0.1:1"
    step("no connection", lambda: full.push_to_hub(**push, token=token))
    (folder / "steps.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
