"""The model card: front matter the Hub understands, code that runs, and the facts of the training."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cameo.config import CameoConfig
from cameo.hub.card_facts import KINDS, CardFacts
from cameo.hub.license import hub_id
from cameo.hub.places import without_folder
from cameo.hub.results import eval_results, number, results_section
from cameo.hub.snippets import usage_section
from cameo.hub.weights import ADAPTER_FORMATS
from cameo.tables import markdown_table

__all__ = ["Pictures", "copy_pictures", "model_card"]

Pictures = Mapping[str, Any] | Sequence[Any]

PAPER = "2512.03045"
TAGS = ["cameo", "multi-view-diffusion", "novel-view-synthesis"]
CITATION = f"""@article{{kwon2025cameo,
  title   = {{CAMEO: Correspondence-Attention Alignment for Multi-View Diffusion Models}},
  author  = {{Kwon, Minkyung and Choi, Jinhyeok and Park, Jiho and Jeon, Seonghu and Jang, Jinhyuk and
             Seo, Junyoung and Kwak, Minseop and Kim, Jin-Hwa and Kim, Seungryong}},
  journal = {{arXiv preprint arXiv:{PAPER}}},
  year    = {{2025}}
}}"""


def model_card(facts: CardFacts) -> str:
    """Write the card of a saved model: front matter, how to load it, results, pictures, facts, license, citation.

    Example:
        >>> config = CameoConfig(backbone=None, layers=["mid.attn1"])
        >>> facts = CardFacts("me/rooms", "peft", config, "Net", "my_models", license={"license": "mit"})
        >>> "license: mit" in model_card(facts).splitlines()
        True

    Source: Hub documentation, "Model cards".
    """
    from huggingface_hub import ModelCard

    sections = [
        _introduction(facts),
        usage_section(facts),
        results_section(facts.metrics, facts.config),
        _pictures(facts),
        _details(facts),
        _license_text(facts),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
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
    if results := eval_results(facts.metrics, facts.config, facts.pipeline_tag):
        entries |= {"eval_results": results, "model_name": facts.title}
    tags = [*TAGS, *([facts.config.backbone] if facts.config.backbone else [])]
    if facts.adapter.get("type", "").lower() == "lora":
        tags.append("lora")
    library = {"peft": "peft", "module": "pytorch"}.get(facts.weight_format, "diffusers")
    if facts.package == "cameo":
        library = "cameo"
    data = ModelCardData(library_name=library, pipeline_tag=facts.pipeline_tag, tags=tags, **entries)
    return str(data.to_yaml())


def _introduction(facts: CardFacts) -> str:
    config = facts.config
    backbone = (
        f"the multi-view diffusion backbone `{config.backbone}`" if config.backbone else "a multi-view diffusion model"
    )
    name = f"[CAMEO](https://arxiv.org/abs/{PAPER})"
    trained = (
        f"trained with {name}: during training the attention between views is supervised with geometric correspondence."
    )
    if not config.weight:
        instead = f", but with {config.training['supervision']}" if "supervision" in config.training else ""
        trained = f"trained without the alignment loss of {name}{instead}, to compare with."
    return (
        f"# {facts.title}\n\n{KINDS[facts.weight_format]} for {backbone} (`{facts.class_name}`), {trained} "
        f"{_inference_text(config)}"
    )


def _inference_text(config: CameoConfig) -> str:
    if not config.inflate:
        return "Nothing of that is needed at inference: the model runs as the base model does."
    layers = ", ".join(f"`{path}`" for path in config.layers)
    return (
        f"**Inference differs from the base model:** {layers} saw one view at a time and now attends across all views "
        "of a sample, with the weights it had. `cameo.from_pretrained` sets this up; in your own code call "
        f'`cameo.backbone.get_backbone("{config.backbone}").inflate(denoiser, path)` before loading the weights.'
    )


def _details(facts: CardFacts) -> str:
    config = facts.config
    rows: dict[str, Any] = {
        "Backbone": config.backbone or f"{facts.class_name}, token layout {config.layout or config.layouts}",
        "Base weights": _base_text(facts),
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
    rows |= {name[:1].upper() + name[1:]: value for name, value in config.training.items()}
    if config.cameo_version:
        rows["Version of cameo"] = config.cameo_version
    return "## Training\n\n" + markdown_table(
        ("", ""), [(name, _compact(without_folder(value))) for name, value in rows.items()]
    )


def _choice_text(choice: Mapping[str, Any]) -> str:
    """Say how the layer was chosen, with the figures of the first of the ranking."""
    places = [
        f"{place['index']}: {number(place['skill'])}"
        + (" ({} to {})".format(*map(number, place["interval"])) if place["interval"] else "")
        for place in choice["ranking"]
    ]
    return (
        f"`cameo.probe_layers` on {choice['samples']} samples of {choice['scenes']} scenes: {choice['rule']}. "
        f"Skill by layer (95 % interval over scenes): {'; '.join(places)}"
    )


def _base_text(facts: CardFacts) -> str:
    config = facts.config
    if config.base_model is None:
        return "not recorded"
    if config.base_model.startswith("preset:"):
        return f"none: trained from scratch ({config.base_model})"
    if not facts.is_named_elsewhere:
        return "a folder of the author, not published"
    return config.base_model + (f" at {config.base_revision}" if config.base_revision else "")


def _pictures(facts: CardFacts) -> str:
    captions = {_plain(text): path for text, path in facts.pictures.items()}
    shown = [f"![{text.partition('. ')[0]}]({path})\n\n{text}" for text, path in captions.items()]
    return "## Pictures\n\n" + "\n\n".join(shown) if shown else ""


def _license_text(facts: CardFacts) -> str:
    if not facts.license:
        return "## License\n\nNot stated here; the license of the base weights applies."
    name = facts.license.get("license_name", facts.license["license"])
    link = facts.license.get("license_link")
    return "## License\n\n" + (f"[{name}]({link})" if link else name) + ", following the base weights."


def _plain(text: str) -> str:
    return " ".join(str(text).split())


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
    for count, (caption, picture) in enumerate(pictures.items(), start=1):
        if hasattr(picture, "save"):
            target = folder / "pictures" / f"{count:02d}.png"
            picture.save(target)
        else:
            source = Path(picture)
            if not source.is_file():
                raise FileNotFoundError(f"pictures: {source} is no file")
            stem = re.sub(r"[^A-Za-z0-9_-]+", "_", source.stem)
            target = folder / "pictures" / f"{count:02d}_{stem}{source.suffix.lower()}"
            shutil.copyfile(source, target)
        copied[caption] = f"pictures/{target.name}"
    return copied
