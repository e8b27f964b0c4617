"""The code on a model card: it runs as it stands, with all its imports and without a name that nobody defined."""

from __future__ import annotations

from collections.abc import Sequence

from cameo.hub.card_facts import CardFacts
from cameo.hub.license import hub_id
from cameo.hub.weights import ADAPTER_FORMATS, LORA_FILE, MODULE_FILE

__all__ = ["PACKAGE", "usage_section"]

PACKAGE = "cameo-diffusion"  # the distribution that installs `cameo`


def usage_section(facts: CardFacts) -> str:
    """Write how the model is loaded: with cameo, and without it where that is possible."""
    parts = ["## Use", *_with_cameo(facts), *_without_cameo(facts), _position_text(facts)]
    return "\n\n".join(part for part in parts if part)


def _with_cameo(facts: CardFacts) -> list[str]:
    variable, place = facts.variable, facts.place
    needed = f"`pip install {PACKAGE}`"
    if facts.backbone_package not in ("", "cameo"):
        needed += f", and the package that installs `{facts.backbone_package}`, where the backbone is from"
    if facts.package == "cameo":
        text = f"`{facts.class_name}` is a class of the library cameo, which is needed: {needed}."
    else:
        text = f"With the library cameo ({needed}):"
    unwrapped = f"{variable} = model.unwrap()"
    if _needs_base(facts):
        code = ["import cameo", "from torch import nn", "", ""]
        code += ["def load_model(base: nn.Module) -> nn.Module:"]
        code += [f'    """Load the weights into `base`, {_described_base(facts)}."""']
        code += [f'    return cameo.from_pretrained("{place}", base_model=base).unwrap()']
    elif facts.weight_format == "pipeline" and facts.config.backbone is not None:
        code = ["from cameo.backbone import get_backbone", ""]
        code += [f'pipeline = get_backbone("{facts.config.backbone}").load("{place}")']
        code += [f"{variable} = pipeline.denoiser"]
    elif facts.weight_format in ADAPTER_FORMATS:
        code = ["import cameo", "from cameo.backbone import get_backbone", ""]
        code += [f'pipeline = get_backbone("{facts.config.backbone}").load({_base_arguments(facts)})']
        code += [f'model = cameo.from_pretrained("{place}", base_model=pipeline.denoiser)']
        code += [f"{unwrapped}  # the denoiser of the pipeline, now with the adapter, in eval mode"]
    else:
        code = ["import cameo", "", f'model = cameo.from_pretrained("{place}")']
        code += [f"{unwrapped}  # the denoiser itself, in eval mode"]
    sampling = _sampling_text(facts) if any(line.startswith("pipeline =") for line in code) else ""
    return [text, _code(code), sampling]


def _sampling_text(facts: CardFacts) -> str:
    """Say how the pipeline is asked for views."""
    training = facts.config.training
    side, views = training.get("resolution"), training.get("views")
    made_for = f" This model was trained on {views} views of {side} x {side} pixels." if side and views else ""
    return (
        "Then `pipeline.sample(batch, num_inference_steps=25)` generates the target views. A batch is made of posed "
        "images by `collate([MultiViewDataset(open_views(folder))[0]])`, all three of `cameo.data`." + made_for
    )


def _without_cameo(facts: CardFacts) -> list[str]:
    name, place, variable = facts.class_name, facts.place, facts.variable
    if facts.weight_format == "module":
        return [
            f"Without cameo: `{MODULE_FILE}` is the state dict of a `{name}`; `safetensors.torch.load_model` reads it."
        ]
    if facts.package == "cameo":
        return ["Without cameo the weights are of no use: diffusers has no such class."]
    if facts.weight_format in ADAPTER_FORMATS:
        return _adapter_without_cameo(facts)
    if not facts.in_diffusers:
        return [f"Without cameo the weights load with the class `{name}` of the base model's own code."]
    folder = f', subfolder="{facts.component}"' if facts.weight_format == "pipeline" else ""
    code = [f"from diffusers import {name}", "", f'{variable} = {name}.from_pretrained("{place}"{folder})']
    text = "Without cameo, in plain diffusers:"
    if facts.config.position != "none":
        text = "Without cameo, the weights alone, in plain diffusers without the map of positions:"
    return [text, _code(code), JOINED]


JOINED = (
    "How the views meet in the attention, and what the model is told of the cameras, is code of the base model and not "
    "in these files: plain diffusers calls the network as it is."
)


def _adapter_without_cameo(facts: CardFacts) -> list[str]:
    """Load an adapter by diffusers, or by PEFT, into a base of diffusers or of the reader's own code."""
    name, variable = facts.class_name, facts.variable
    by_peft = facts.weight_format == "peft"
    if by_peft:
        load, imports = f'PeftModel.from_pretrained({variable}, "{facts.place}")', ["from peft import PeftModel"]
    else:
        options = f'prefix="{facts.component}", weight_name="{LORA_FILE}"'
        load, imports = f'{variable}.load_lora_adapter("{facts.place}", {options})', []
    where = "with PEFT" if by_peft else "in plain diffusers"
    if facts.config.position != "none":
        where += " and without the map of positions"
    if facts.in_diffusers:
        imports = [f"from diffusers import {name}", *imports]
    if facts.plain_base:
        base = _base_arguments(facts, f'subfolder="{facts.component}"')
        code = [*imports, "", f"{variable} = {name}.from_pretrained({base})"]
        code += [f"{variable} = {load}" if by_peft else load]
        return [f"Without cameo, {where}:", _code(code), JOINED]
    kind = name if facts.in_diffusers else "nn.Module"
    if not facts.in_diffusers:
        imports += ["from torch import nn"]
    code = [*imports, "", "", f"def add_adapter({variable}: {kind}) -> {'nn.Module' if by_peft else 'None'}:"]
    if by_peft and "from torch import nn" not in imports:
        code.insert(len(imports), "from torch import nn")
    code += [f'    """Put the adapter on a `{name}`, {_described_base(facts)}."""']
    code += [f"    return {load}" if by_peft else f"    {load}"]
    text = f"Without cameo, {where}:"
    if origin := hub_id(facts.config.base_model):
        text = (
            f"Without cameo, {where}. The network is the one that cameo makes of `{origin}`, which diffusers alone may "
            "not build: it can have more input channels, or be converted."
        )
    return [text, _code(code), JOINED]


def _described_base(facts: CardFacts) -> str:
    base = facts.config.base_model or ""
    if base.startswith("preset:"):
        return f"the {facts.class_name} with random weights ({base}) that the training started from, not published"
    if hub_id(base) is not None or base.startswith("bundled:"):
        return f"the {facts.class_name} that the training started from, made from {base}"
    return f"the {facts.class_name} that the training started from, which is not published here"


def _base_arguments(facts: CardFacts, *more: str) -> str:
    config = facts.config
    revision = [f'revision="{config.base_revision}"'] if config.base_revision else []
    return ", ".join([f'"{config.base_model}"', *more, *revision])


def _needs_base(facts: CardFacts) -> bool:
    """Whether the base, or the model's class, cannot be found by its name."""
    base, backbone = facts.config.base_model or "", facts.config.backbone
    by_name = backbone is not None and facts.is_named_elsewhere
    if facts.weight_format in ADAPTER_FORMATS:
        return not by_name or base.startswith("preset:")
    if facts.weight_format == "diffusers" and backbone is None:
        return not facts.in_diffusers
    return facts.weight_format != "pipeline" and not by_name


def _position_text(facts: CardFacts) -> str:
    """Say that a map beside the weights belongs to the model; empty where there is none."""
    config = facts.config
    if config.position == "none":
        return ""
    name = f'"{config.position}"'
    plain = ": plain diffusers loads the U-Net without it, and its output is another" if facts.in_diffusers else ""
    return (
        "**The weights alone are not the whole model.** Behind its first convolution it adds a fixed map of positions "
        f"(`position={name}`), which is in no file of weights{plain}. The pipelines of cameo and "
        "`cameo.from_pretrained` add the map; in your own code call "
        f'`cameo.backbone.get_backbone("{config.backbone}").set_position({facts.variable}, {name})`.'
    )


def _code(lines: Sequence[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"
