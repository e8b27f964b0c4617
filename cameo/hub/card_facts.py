"""What a model card says about one saved model, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cameo.config import CameoConfig
from cameo.hub.places import is_named_elsewhere
from cameo.hub.results import Metrics

__all__ = ["HERE", "KINDS", "UNNAMED", "CardFacts"]

KINDS = {
    "diffusers_lora": "LoRA adapter",
    "peft": "PEFT adapter",
    "pipeline": "full model with its pipeline",
    "diffusers": "full model",
    "module": "full model (weights only)",
}
# How a card that knows no repository spells the place of the weights: the code runs in their folder.
HERE = "."
# How its title begins.
UNNAMED = "CAMEO: "


@dataclass
class CardFacts:
    """What a card says about one saved model.

    Attributes:
        repo_id: repository, with its owner where that is known; None where no repository is known.
        weight_format: format of the weights, see `cameo.hub.weights`.
        config: the settings saved beside the weights.
        class_name: class of the base module.
        package: package of that class, `diffusers` for what diffusers exports.
        component: name of the denoiser in its pipeline, the prefix of a LoRA file's keys.
        license: front-matter entries, see `cameo.hub.license.find_license`; may be empty.
        plain_base: whether diffusers alone builds the base of an adapter from its repository.
        backbone_package: package of the backbone's adapter, empty without a backbone.
        has_head: whether the alignment head is in the folder.
        pipeline_tag: task on the Hub.
        adapter: facts about the adapter's size.
        metrics: see `cameo.hub.save_pretrained`.
        pictures: caption to path relative to the card.
    """

    repo_id: str | None
    weight_format: str
    config: CameoConfig
    class_name: str
    package: str
    component: str = "unet"
    license: dict[str, str] = field(default_factory=dict)
    plain_base: bool = False
    backbone_package: str = ""
    has_head: bool = False
    pipeline_tag: str = "image-to-3d"
    adapter: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics | None = None
    pictures: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The repository's name, or what the model is; never the name of a folder on this machine."""
        if self.repo_id:
            return self.repo_id.rpartition("/")[2]
        return f"{UNNAMED}{KINDS[self.weight_format]} for {self.config.backbone or self.class_name}"

    @property
    def place(self) -> str:
        """The place of the weights as the code on the card spells it."""
        return self.repo_id if self.repo_id and "/" in self.repo_id else HERE

    @property
    def variable(self) -> str:
        """The name of the denoiser in that code."""
        return self.component if self.component.isidentifier() else "denoiser"

    @property
    def in_diffusers(self) -> bool:
        """Whether diffusers exports the class of the base module."""
        return self.package == "diffusers"

    @property
    def is_named_elsewhere(self) -> bool:
        """Whether the name of the base means the same on other machines."""
        return self.config.base_model is not None and is_named_elsewhere(self.config.base_model)
