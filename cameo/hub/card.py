"""The model card: front matter the Hub understands, code that runs, and the facts of the training."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cameo.config import CameoConfig
from cameo.hub.license import hub_id
from cameo.hub.weights import ADAPTER_FORMATS, LORA_FILE, MODULE_FILE
from cameo.tables import markdown_table

__all__ = ["CardFacts", "Metrics", "Pictures", "copy_pictures", "model_card"]

Metrics = Mapping[str, float | str | Mapping[str, float | str]]
Pictures = Mapping[str, Any] | Sequence[Any]

PAPER = "2512.03045"
TAGS = ["cameo", "multi-view-diffusion", "novel-view-synthesis"]
KINDS = {
    "diffusers_lora": "LoRA adapter",
    "peft": "PEFT adapter",
    "pipeline": "full model with its pipeline",
    "diffusers": "full model",
    "module": "full model (weights only)",
}
CITATION = f"""@article{{kwon2025cameo,
  title   = {{CAMEO: Correspondence-Attention Alignment for Multi-View Diffusion Models}},
  author  = {{Kwon, Minkyung and Choi, Jinhyeok and Park, Jiho and Jeon, Seonghu and Jang, Jinhyuk and
             Seo, Junyoung and Kwak, Minseop and Kim, Jin-Hwa and Kim, Seungryong}},
  journal = {{arXiv preprint arXiv:{PAPER}}},
  year    = {{2025}}
}}"""


@dataclass
class CardFacts:
    """What a card says about one saved model.

    Attributes:
        place: Hub id, or the folder's name, as the code on the card is to spell it.
        on_hub: whether `place` is a Hub id.
        weight_format: format of the weights, see `cameo.hub.weights`.
        config: the settings saved beside the weights.
        class_name: class of the base module.
        component: name of the denoiser in its pipeline, the prefix of a LoRA file's keys.
        in_diffusers: whether the class is one of diffusers.
        license: front-matter entries, see `cameo.hub.license.find_license`; may be empty.
        has_head: whether the alignment head is in the folder.
        pipeline_tag: task on the Hub.
        adapter: facts about the adapter's size.
        metrics: name to value, or group to names and values.
        pictures: caption to path relative to the card.
    """

    place: str
    on_hub: bool
    weight_format: str
    config: CameoConfig
    class_name: str
    component: str
    in_diffusers: bool
    license: dict[str, str]
    has_head: bool = False
    pipeline_tag: str = "image-to-3d"
    adapter: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics | None = None
    pictures: dict[str, str] = field(default_factory=dict)


def model_card(facts: CardFacts) -> str:
    """Write the card of a saved model: front matter, how to load it, facts, metrics, pictures, citation.

    Example:
        >>> config = CameoConfig(backbone=None, layers=["mid.attn1"])
        >>> facts = CardFacts("me/rooms", True, "peft", config, "Net", "unet", False, {"license": "mit"})
        >>> "license: mit" in model_card(facts).splitlines()
        True

    Source: Hub documentation, "Model cards".
    """
    from huggingface_hub import ModelCard

    sections = [
        _introduction(facts),
        _usage(facts),
        _details(facts),
        _metrics(facts.metrics),
        _pictures(facts),
    ]
    sections += [_license_text(facts), f"## Citation\n\n```bibtex\n{CITATION}\n```"]
    body = "\n\n".join(section for section in sections if section)
    text = f"---\n{_front_matter(facts)}\n---\n\n{body}\n"
    ModelCard(text)  # raises on front matter that does not parse
    return text


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    adapter = facts.weight_format in ADAPTER_FORMATS
    entries: dict[str, Any] = dict(facts.license)
    if base := hub_id(facts.config.base_model):
        entries["base_model"] = base
        entries["base_model_relation"] = "adapter" if adapter else "finetune"
    tags = [*TAGS, *([facts.config.backbone] if facts.config.backbone else [])]
    if facts.adapter.get("type", "").lower() == "lora":
        tags.append("lora")
    library = {"peft": "peft", "module": "pytorch"}.get(facts.weight_format, "diffusers")
    data = ModelCardData(library_name=library, pipeline_tag=facts.pipeline_tag, tags=tags, **entries)
    return str(data.to_yaml())


def _introduction(facts: CardFacts) -> str:
    backbone = (
        f"the multi-view diffusion backbone `{facts.config.backbone}`"
        if facts.config.backbone
        else "a multi-view diffusion model"
    )
    return (
        f"# {facts.place.rpartition('/')[2]}\n\n"
        f"{KINDS[facts.weight_format]} for {backbone} (`{facts.class_name}`), trained with "
        f"[CAMEO](https://arxiv.org/abs/{PAPER}): during training the attention between views is supervised "
        "with geometric correspondence. "
    ) + _inference_text(facts.config)


def _inference_text(config: CameoConfig) -> str:
    if not config.inflate:
        return "Inference needs nothing of it: the model runs as the base model does."
    layers = ", ".join(f"`{path}`" for path in config.layers)
    return (
        f"**Inference differs from the base model:** {layers} saw one view at a time and now attends across all views "
        "of a sample, with the weights it had. `cameo.from_pretrained` sets this up; in your own code call "
        f'`cameo.backbone.get_backbone("{config.backbone}").inflate(denoiser, path)` before loading the weights.'
    )


def _usage(facts: CardFacts) -> str:
    variable = facts.component if facts.component.isidentifier() else "denoiser"
    argument, needed = "", ""
    if _needs_base(facts):
        argument = ", base_model=base"
        needed = f"`base` is the `{facts.class_name}` this was trained on, loaded by your own code."
    lines = ["import cameo", "", f'model = cameo.from_pretrained("{facts.place}"{argument})']
    lines.append(f"{variable} = model.unwrap()  # the denoiser itself, in eval mode")
    parts = ["## Use", "With cameo (`pip install cameo-diffusion`):", needed, _code(lines)]
    parts += [*_usage_without_cameo(facts, variable), _position_text(facts, variable)]
    return "\n\n".join(part for part in parts if part)


def _position_text(facts: CardFacts, variable: str) -> str:
    """Say that a map beside the weights belongs to the model; empty where there is none."""
    config = facts.config
    if config.position == "none":
        return ""
    name = f'"{config.position}"'
    return (
        "**The weights alone are not the whole model.** Behind its first convolution it adds a fixed map of positions "
        f"(`position={name}`), which is in no file of weights: plain diffusers loads the U-Net without it, and its "
        "output is another. The pipelines of cameo and `cameo.from_pretrained` add the map; in your own code call "
        f'`cameo.backbone.get_backbone("{config.backbone}").set_position({variable}, {name})`.'
    )


def _needs_base(facts: CardFacts) -> bool:
    """Whether `from_pretrained` cannot find the base, or the model's class, by itself."""
    base, backbone = facts.config.base_model or "", facts.config.backbone
    by_name = bool(base) and backbone is not None
    if facts.weight_format in ADAPTER_FORMATS:
        return not by_name or base.startswith("preset:")
    if facts.weight_format == "diffusers" and backbone is None:
        return not facts.in_diffusers
    return facts.weight_format != "pipeline" and not by_name


def _usage_without_cameo(facts: CardFacts, variable: str) -> list[str]:
    name, place, has_map = facts.class_name, facts.place, facts.config.position != "none"
    if facts.weight_format == "diffusers_lora":
        kind = f"a `{name}`), in plain diffusers" if facts.in_diffusers else f"a `{name}`, a class of its own code)"
        if has_map and facts.in_diffusers:
            kind = f"a `{name}` with its map of positions)"
        text = f"Without `cameo.from_pretrained`, on the base model's `{variable}` ({kind}:"
        options = f'prefix="{facts.component}", weight_name="{LORA_FILE}"'
        code = [f'{variable}.load_lora_adapter("{place}", {options})']
    elif facts.weight_format == "peft":
        text = f"Without cameo, with PEFT; `base` is the `{name}` this was trained on:"
        code = ["from peft import PeftModel", "", f'model = PeftModel.from_pretrained(base, "{place}")']
    elif facts.weight_format == "module":
        text = f"Without cameo; `base` is a `{name}`:"
        path, code = f'"{place}/{MODULE_FILE}"', ["from safetensors.torch import load_model"]
        if facts.on_hub:
            path = f'hf_hub_download("{place}", "{MODULE_FILE}")'
            code.insert(0, "from huggingface_hub import hf_hub_download")
        code += ["", f"load_model(base, {path})"]
    elif facts.in_diffusers:
        text = "Without cameo, in plain diffusers:"
        if has_map:
            text = "Without cameo, the weights alone, in plain diffusers without the map of positions:"
        folder = f', subfolder="{facts.component}"' if facts.weight_format == "pipeline" else ""
        code = [f"from diffusers import {name}", ""]
        code.append(f'{variable} = {name}.from_pretrained("{place}"{folder})')
    else:
        return [f"Without cameo the weights load with the class `{name}` of the base model's own code."]
    joined = "How the views meet in the attention is part of the base model's own code, not of these files."
    return [text, _code(code), joined]


def _details(facts: CardFacts) -> str:
    config = facts.config
    rows: dict[str, Any] = {
        "Backbone": config.backbone or f"{facts.class_name}, token layout {config.layout or config.layouts}",
        "Base weights": _base_text(config),
        "Supervised layer": ", ".join(config.layers),
        "Alignment head": _compact(config.head)
        + (", included" if facts.has_head else ", not included (training only)"),
        "Alignment weight": config.weight,
        "Loss": f"normalize {config.normalize}, reduction {config.reduction}",
    }
    if config.layer_choice:
        rows["Layer chosen by"] = _choice_text(config.layer_choice)
    if config.position != "none":
        rows["Position map"] = f"{config.position}, fixed, behind the first convolution; not part of the weights"
    if config.inflate:
        rows["Inflated"] = "the supervised layer attends across all views, in training and at inference"
    if config.own_view:
        rows["Supervised"] = "within each view, whose own tokens show the reference view too"
    if facts.adapter:
        rows["Adapter"] = _compact(facts.adapter)
    rows.update(config.training)
    if config.cameo_version:
        rows["cameo"] = config.cameo_version
    return "## Training\n\n" + markdown_table(("", ""), [(name, _compact(value)) for name, value in rows.items()])


def _choice_text(choice: Mapping[str, Any]) -> str:
    """Say how the layer was chosen, with the figures of the first of the ranking."""
    places = [
        f"{place['index']}: {_number(place['skill'])}"
        + (" ({} to {})".format(*map(_number, place["interval"])) if place["interval"] else "")
        for place in choice["ranking"]
    ]
    return (
        f"`cameo.probe_layers` on {choice['samples']} samples of {choice['scenes']} scenes: {choice['rule']}. "
        f"Skill by layer (95 % interval over scenes): {'; '.join(places)}"
    )


def _base_text(config: CameoConfig) -> str:
    if config.base_model is None:
        return "not recorded"
    if config.base_model.startswith("preset:"):
        return f"none: trained from scratch ({config.base_model})"
    return config.base_model + (f" at {config.base_revision}" if config.base_revision else "")


def _metrics(metrics: Metrics | None) -> str:
    if not metrics:
        return ""
    metrics = {name: value for name, value in metrics.items() if value is not None and value != {}}  # not measured
    groups = {name: value for name, value in metrics.items() if isinstance(value, Mapping)}
    single = {name: value for name, value in metrics.items() if name not in groups}
    tables = []
    if single:
        tables.append(markdown_table(("metric", "value"), [(name, _number(value)) for name, value in single.items()]))
    if groups:
        names = list(dict.fromkeys(name for group in groups.values() for name in group))
        rows = [(title, *(_number(group.get(name, "")) for name in names)) for title, group in groups.items()]
        tables.append(markdown_table(("", *names), rows))
    return "## Metrics\n\n" + "\n\n".join(tables)


def _pictures(facts: CardFacts) -> str:
    if not facts.pictures:
        return ""
    shown = [f"![{_plain(text)}]({path})\n\n{_plain(text)}" for text, path in facts.pictures.items()]
    return "## Pictures\n\n" + "\n\n".join(shown)


def _license_text(facts: CardFacts) -> str:
    if not facts.license:
        return "## License\n\nNot stated here; the license of the base weights applies."
    name = facts.license.get("license_name", facts.license["license"])
    link = facts.license.get("license_link")
    return "## License\n\n" + (f"[{name}]({link})" if link else name) + ", following the base weights."


def _code(lines: Sequence[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _plain(text: str) -> str:
    return " ".join(str(text).split())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _compact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_compact(entry)}" for name, entry in value.items())
    return value if isinstance(value, str) else json.dumps(value, default=str)


def copy_pictures(pictures: Pictures | None, folder: Path) -> dict[str, str]:
    """Copy pictures into `folder/pictures` and return caption to relative path.

    Args:
        pictures: caption to picture, or a list of paths (the file's name is the caption). A picture is a
            path, or a `PIL.Image` that is written as PNG.
        folder: where the card stands.

    Raises:
        FileNotFoundError: if a path is no file.
    """
    if not pictures:
        return {}
    if not isinstance(pictures, Mapping):
        pictures = {Path(picture).stem.replace("_", " "): picture for picture in pictures}
    copied: dict[str, str] = {}
    (folder / "pictures").mkdir()
    for number, (caption, picture) in enumerate(pictures.items(), start=1):
        if hasattr(picture, "save"):
            target = folder / "pictures" / f"{number:02d}.png"
            picture.save(target)
        else:
            source = Path(picture)
            if not source.is_file():
                raise FileNotFoundError(f"pictures: {source} is no file")
            stem = re.sub(r"[^A-Za-z0-9_-]+", "_", source.stem)
            target = folder / "pictures" / f"{number:02d}_{stem}{source.suffix.lower()}"
            shutil.copyfile(source, target)
        copied[caption] = f"pictures/{target.name}"
    return copied
