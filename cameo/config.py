"""The settings of a wrapped model, as they are written to `cameo_config.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any

from cameo.errors import DataError, as_integer, unknown_name
from cameo.files import open_plain, parse_object, write_atomically
from cameo.renamed import CONFIG_KEYS, KEYWORDS, old_attributes, old_fields, rename_keys

__all__ = ["CONFIG_NAME", "CameoConfig"]

CONFIG_NAME = "cameo_config.json"
# Each supervised layer gets a head of its own; no model has more attentions than this.
MOST_LAYERS = 1024


@old_attributes
@old_fields(KEYWORDS["CameoConfig"])
@dataclass
class CameoConfig:
    """What `cameo.wrap` was told, plus where the base weights came from.

    Attributes:
        backbone: registered adapter, or None for a model described by `layout`.
        layers: dotted module paths of the supervised layers.
        head: keyword arguments of `AlignmentHead` but the number of heads.
        weight: factor of the alignment loss in the training loss.
        normalize: see `cameo.alignment_loss`; a list has one for each of `layers`.
        reduction, num_reference_views, softness: see `cameo.alignment_loss`.
        layout: keyword arguments of `TokenLayout`, of all layers; only without a backbone.
        layouts: the same for each of `layers`. With a backbone, as its adapter gave them when the model was wrapped; a
            model that is loaded keeps them, None: those of releases that did not record them. Without a backbone, where
            the layers have different ones; `layout` is then None.
        heads, stride, kernel_call: see `cameo.wrap`; only without a backbone.
        kernel_inputs: keyword arguments of `cameo.attention.KernelInputs`, see `cameo.wrap`; only without a backbone.
        inflate: whether the supervised layers saw one view each before CAMEO joined the views in them; loading
            joins them again.
        position: map of positions that the adapter adds to the first features of the denoiser, "none" or a name that
            the adapter knows; loading adds it again, or takes it off.
        own_view: whether the supervised layers attend within each view, whose own tokens show the reference view too.
        base_model: Hub id or path of the base weights, `preset:NAME` for a fresh preset, None if unknown.
        base_revision: revision of the Hub id.
        layer_choice: the ranking of a probe that `layer="auto"` took the layer from, see `LayerProbe.choice`; None
            where the layer was named.
        training: any facts about the training run, shown in the model card.
    """

    backbone: str | None
    layers: list[str]
    head: dict[str, Any] = field(default_factory=lambda: {"kind": "mlp"})
    weight: float = 0.02
    normalize: str | list[str] = "per_view"
    reduction: str = "mean"
    num_reference_views: int | None = None
    softness: float = 0.0
    layout: dict[str, Any] | None = None
    layouts: list[dict[str, Any]] | None = None
    heads: int | None = None
    stride: int | None = None
    kernel_call: int | None = None
    kernel_inputs: dict[str, Any] | None = None
    inflate: bool = False
    position: str = "none"
    own_view: bool = False
    base_model: str | None = None
    base_revision: str | None = None
    layer_choice: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    cameo_version: str = ""

    def check(self) -> None:
        """Check types and ranges, and convert numbers of other libraries to Python's, which JSON can hold.

        Example:
            >>> CameoConfig("cat3d", ["mid_block.attentions.0"], weight=-1.0).check()
            Traceback (most recent call last):
            ...
            ValueError: weight: expected a finite factor >= 0, got -1.0

        Raises:
            ValueError: names the setting, what was expected and what was given.
        """
        self.weight = finite("weight", self.weight, "factor")
        self.softness = finite("softness", self.softness, "number of tokens")
        for name, least in (("heads", 1), ("stride", 1), ("kernel_call", 0), ("num_reference_views", 0)):
            if getattr(self, name) is not None:
                setattr(self, name, as_integer(name, getattr(self, name), least=least))
        for name, (type_, optional) in TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, type_) and not (optional and value is None):
                raise ValueError(f"{name}: expected {NAMES_OF_TYPES[type_]}, got {value!r}")
        if self.reduction == "released" and self.num_reference_views is None:
            raise ValueError('num_reference_views: reduction="released" needs the number of clean views, got None')
        if self.inflate and self.own_view:
            raise ValueError(
                "own_view: supervises layers as they attend, within each view, and inflate=True joins the views; got "
                "both. Leave one of them out"
            )
        if not all(isinstance(path, str) for path in self.layers):
            raise ValueError(f"layers: expected a list of module paths, got {self.layers!r}")
        if len(self.layers) > MOST_LAYERS:
            raise ValueError(f"layers: expected at most {MOST_LAYERS} module paths, got {len(self.layers)}")
        if isinstance(self.normalize, list) and len(self.normalize) != len(self.layers):
            raise ValueError(f"normalize: expected one for each of the layers {self.layers}, got {self.normalize}")
        if self.layouts is not None:
            fits = isinstance(self.layouts, list) and all(isinstance(layout, dict) for layout in self.layouts)
            if not fits or len(self.layouts) != len(self.layers):
                raise ValueError(
                    f"layouts: expected None, or a mapping for each of the layers {self.layers}, got {self.layouts!r}"
                )
        if self.backbone is None and (self.layout is None) == (self.layouts is None):
            raise ValueError(
                "layout: without a backbone expected either layout, of all layers, or layouts, one of each, got "
                f"{'neither' if self.layout is None else 'both'}"
            )
        if self.backbone is not None:
            for name in ("layout", "heads", "stride", "kernel_call", "kernel_inputs"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: describes a model without an adapter, but backbone {self.backbone!r} knows it; got "
                        f"{getattr(self, name)!r}. Leave one of them out"
                    )

    def normalize_of_layers(self) -> list[str]:
        """Return `normalize` of each layer.

        Example:
            >>> CameoConfig("cat3d", ["mid_block.attentions.0", "up_blocks.1.attentions.0"]).normalize_of_layers()
            ['per_view', 'per_view']
        """
        return [self.normalize] * len(self.layers) if isinstance(self.normalize, str) else list(self.normalize)

    def references_among(self, num_views: int) -> int | None:
        """Return `num_reference_views` for a correspondence of so many views.

        Raises:
            ValueError: it has fewer.
        """
        if self.num_reference_views is not None and self.num_reference_views > num_views:
            raise ValueError(
                f"num_reference_views: expected at most {num_views}, the views of the correspondence, got "
                f"{self.num_reference_views}"
            )
        return self.num_reference_views

    def save(self, folder: str | Path) -> Path:
        """Write `cameo_config.json` into `folder` (temporary name, then rename) and return its path."""
        path = Path(folder) / CONFIG_NAME
        write_atomically(path, json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> CameoConfig:
        """Read a `cameo_config.json` or the folder that holds it.

        Raises:
            DataError: if the file is missing, is not JSON, or has unknown or missing keys; names the path.
        """
        path = Path(path)
        path = path / CONFIG_NAME if path.is_dir() else path
        if not path.exists():
            raise DataError(f"{path}: no such file; a folder saved by CameoModel.save_pretrained holds {CONFIG_NAME}")
        try:
            with open_plain(path) as file:
                values = parse_object(file.read())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: damaged or not valid JSON ({error}). Save, copy or download it again") from error
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CameoConfig:
        """Build from a mapping.

        Example:
            >>> CameoConfig.from_dict({"backbone": "cat3d", "layers": ["mid_block.attentions.0"]}).weight
            0.02

        Raises:
            ValueError: for an unknown key, naming the nearest; for a missing one; for a value that `check` refuses.
        """
        values = rename_keys(values, CONFIG_KEYS, CONFIG_NAME)
        known = [entry.name for entry in fields(cls)]
        for name in values:
            if name not in known:
                raise unknown_name(f"key in {CONFIG_NAME}", name, known)
        for name in ("backbone", "layers"):
            if name not in values:
                raise ValueError(f"key {name!r} is missing")
        config = cls(**values)
        config.check()
        return config


# Type of each setting that is not a number, and whether it may be None.
TYPES: dict[str, tuple[type | UnionType, bool]] = {
    "backbone": (str, True),
    "layers": (list, False),
    "head": (dict, False),
    "normalize": (str | list, False),
    "reduction": (str, False),
    "layout": (dict, True),
    "kernel_inputs": (dict, True),
    "inflate": (bool, False),
    "position": (str, False),
    "own_view": (bool, False),
    "base_model": (str, True),
    "base_revision": (str, True),
    "layer_choice": (dict, True),
    "training": (dict, False),
    "cameo_version": (str, False),
}
NAMES_OF_TYPES: dict[type | UnionType, str] = {
    str: "text",
    str | list: "text, or a list with one for each layer",
    list: "a list of module paths",
    dict: "a mapping of names to values",
    bool: "True or False",
}


def finite(name: str, value: object, what: str) -> float:
    """Read a finite number of at least 0 of any numeric type; a text and a bool are refused.

    Example:
        >>> finite("weight", 1, "factor")
        1.0
    """
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}: expected a finite {what} >= 0, got {value!r}")
    return number
