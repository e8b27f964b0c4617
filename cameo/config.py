"""The settings of a wrapped model, as they are written to `cameo_config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cameo.errors import DataError, unknown_name
from cameo.files import write_atomically

__all__ = ["CONFIG_NAME", "CameoConfig"]

CONFIG_NAME = "cameo_config.json"


@dataclass
class CameoConfig:
    """What `cameo.wrap` was told, plus where the base weights came from.

    Attributes:
        backbone: registered adapter, or None for a model described by `layout`.
        layers: dotted module paths of the supervised layers.
        head: keyword arguments of `AlignmentHead` but the number of heads.
        weight: factor of the alignment loss in the training loss.
        normalise, reduction, num_reference_views, softness: see `cameo.alignment_loss`.
        layout: keyword arguments of `TokenLayout`; only without a backbone.
        heads, stride, kernel_call: see `cameo.wrap`; only without a backbone.
        inflate: whether the supervised layers saw one view each before CAMEO joined the views in them; loading
            joins them again.
        base_model: Hub id or path of the base weights, `preset:NAME` for a fresh preset, None if unknown.
        base_revision: revision of the Hub id.
        layer_choice: the ranking of a probe that `layer="auto"` took the layer from, see `LayerProbe.choice`; None
            where the layer was named.
        training: free-form facts about the training run, shown in the model card.
    """

    backbone: str | None
    layers: list[str]
    head: dict[str, Any] = field(default_factory=lambda: {"kind": "mlp"})
    weight: float = 0.02
    normalise: str = "per_view"
    reduction: str = "mean"
    num_reference_views: int | None = None
    softness: float = 0.0
    layout: dict[str, Any] | None = None
    heads: int | None = None
    stride: int | None = None
    kernel_call: int | None = None
    inflate: bool = False
    base_model: str | None = None
    base_revision: str | None = None
    layer_choice: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    cameo_version: str = ""

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
        if not path.is_file():
            raise DataError(f"{path}: no such file; a folder saved by CameoModel.save_pretrained holds {CONFIG_NAME}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise DataError(f"{path}: expected a JSON object, got {type(values).__name__}")
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
            ValueError: for an unknown key, naming the nearest; for a missing one; for layers that are not a
                list.
        """
        known = [entry.name for entry in fields(cls)]
        for name in values:
            if name not in known:
                raise unknown_name(f"key in {CONFIG_NAME}", name, known)
        for name in ("backbone", "layers"):
            if name not in values:
                raise ValueError(f"key {name!r} is missing")
        layers = values["layers"]
        if not isinstance(layers, list) or not all(isinstance(path, str) for path in layers):
            raise ValueError(f"layers: expected a list of module paths, got {layers!r}")
        return cls(**values)
