"""The result of a probe: how precisely each layer's attention finds the true match, and a ranking of the layers.

Axes: T noise levels, S samples, A angle bins, W distances.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from cameo.errors import DataError, unknown_name
from cameo.files import write_atomically
from cameo.probing.bootstrap import bootstrap_interval
from cameo.probing.probed_layer import ProbedLayer
from cameo.renamed import old_keywords

__all__ = ["NEAR", "ProbeResult", "RankedLayer", "check_within"]

NEAR = "2cm"
FORMAT = 1
NOISE_LEVELS_KEY = "timesteps"  # of files of this format, and of the layer's choice in cameo_config.json
RULE = (
    "highest skill within 1 token of the mean over heads, averaged over the noise levels; "
    "skill = (precision - chance) / (1 - chance)"
)
KINDS = ("precision", "chance", "skill")

Interval = tuple[float, float]


@dataclass(frozen=True)
class RankedLayer:
    """A layer in a ranking.

    Attributes:
        index, path: index and path of the attention layer.
        skill: skill by which the layers are ranked, mean over the noise levels.
        interval: 95 % interval of the skill over resampled scenes; None with one scene.
        behind: 95 % interval of the difference between the skill of the first layer and this one, over the same
            resampled scenes. If it contains 0, the probe cannot tell the two layers apart. None for the first layer, or
            with one scene.
        supervisable: whether `cameo.wrap` can supervise the layer.
    """

    index: int
    path: str
    skill: float
    interval: Interval | None
    behind: Interval | None
    supervisable: bool


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Counts of all probed layers, the figures computed from them, and the ranking.

    `cameo.LayerProbe` describes the attributes, and adds a table and a picture.
    """

    layers: tuple[ProbedLayer, ...]
    noise_levels: tuple[float, ...]
    angle_bins: tuple[tuple[float, float], ...]
    within: tuple[int | str, ...]
    scenes: tuple[str, ...]
    samples: tuple[str, ...]
    backbone: str | None = None
    inflate: bool = False
    seed: int = 0
    own_view: bool = False

    @old_keywords
    def precision(self, layer: int | str, **selection: Any) -> float | None:
        """Share of matches whose most-attended token lies near the matched one; None where there is no match.

        Args:
            layer: index or path.
            **selection: `within` (one of `self.within`, default 1), `readout` ("mean" of the heads, "best_head" or
                "through_head", default "mean"), `noise_level` (one of `self.noise_levels`; None is the mean over all),
                `angle_bin` (one of `self.angle_bins` or its number; None is all pairs of views).

        Raises:
            ValueError: for a layer, distance, readout, noise level or bin that was not probed.
        """
        return self._figure("precision", layer, **selection)

    @old_keywords
    def chance(self, layer: int | str, **selection: Any) -> float | None:
        """Precision that uniform attention would have on the same matches; arguments as of `precision`."""
        return self._figure("chance", layer, **selection)

    @old_keywords
    def skill(self, layer: int | str, **selection: Any) -> float | None:
        """`(precision - chance) / (1 - chance)`: 0 is chance, 1 perfect; arguments as of `precision`."""
        return self._figure("skill", layer, **selection)

    @old_keywords
    def per_scene(self, layer: int | str, *, kind: str = "precision", **selection: Any) -> dict[str, float]:
        """Precision, chance or skill of each scene that has a match; other arguments as of `precision`."""
        sums = self._sums(self._counted(layer), **selection)
        values = {scene: _share(kind, *counts) for scene, *counts in zip(self.scene_names, *sums, strict=True)}
        return {scene: value for scene, value in values.items() if value is not None}

    def pairs(self, layer: int | str, *, angle_bin: int | tuple[float, float] | None = None) -> int:
        """Number of matches behind the figures of a layer at each noise level."""
        counted = self._counted(layer)
        assert counted.pairs is not None
        return int(counted.pairs[:, self._bins(angle_bin)].sum())

    def ceiling(self, layer: int | str) -> float | None:
        """Share of matches whose matched token has its own center within 2 cm: the highest precision "2cm" can have.

        None where there is no match, or "2cm" was not measured.
        """
        counted = self._counted(layer)
        assert counted.pairs is not None
        return None if counted.ceiling is None else _share("precision", counted.ceiling.sum(), 0, counted.pairs.sum())

    @cached_property
    def scene_names(self) -> tuple[str, ...]:
        """The different scenes, in order of their first sample."""
        return tuple(dict.fromkeys(self.scenes))

    @cached_property
    def ranking(self) -> tuple[RankedLayer, ...]:
        """The probed layers that have a skill, best first.

        Layers are ranked by the skill within 1 token of the mean over heads, averaged over the noise levels. Precision
        would favor small grids: uniform attention lies within 1 token of the match 9 times in 16 on a grid of 4 x 4
        tokens, and 9 times in 1024 on one of 32 x 32. Layers of reach "cell" are ranked by their skill of finding a
        view.
        """
        skills = [(layer, self.skill(layer.path)) for layer in self.layers if layer.reason is None]
        ranked = [(layer, skill) for layer, skill in skills if skill is not None]
        ranked.sort(key=lambda entry: -entry[1])  # stable: layers of equal skill stay in execution order
        intervals = self._intervals([layer for layer, _ in ranked])
        return tuple(
            RankedLayer(layer.index, layer.path, skill, interval, behind, layer.unsupervised is None)
            for (layer, skill), (interval, behind) in zip(ranked, intervals, strict=True)
        )

    def _intervals(self, ranked: Sequence[ProbedLayer]) -> list[tuple[Interval | None, Interval | None]]:
        """For each layer, the interval of its skill and that of its difference from the first layer."""
        if not ranked or len(self.scene_names) < 2:
            return [(None, None)] * len(ranked)

        def skills(*drawn: np.ndarray, axis: int) -> np.ndarray:
            skill = _skill(*(part.sum(axis) for part in drawn))  # [layers, resamples]
            return np.concatenate([skill, skill[:1] - skill])

        sums = (np.stack(parts) for parts in zip(*map(self._sums, ranked), strict=True))  # [layers, scenes]
        low, high = bootstrap_interval(skills, *sums)
        intervals = [(float(start), float(end)) for start, end in zip(low, high, strict=True)]
        return list(zip(intervals[: len(ranked)], [None, *intervals[len(ranked) + 1 :]], strict=True))

    @property
    def best(self) -> str:
        """Path of the first layer of the ranking that can be supervised.

        Raises:
            ValueError: if there is none.
        """
        for ranked in self.ranking:
            if ranked.supervisable:
                return ranked.path
        reasons = "; ".join(
            f"{layer.path}: {layer.reason or layer.unsupervised or 'no match'}" for layer in self.layers
        )
        raise ValueError(
            f"probe: no layer that can be supervised has a skill ({reasons}). Probe views that see the same "
            "surface, or name the layer yourself"
        )

    def choice(self, *, top: int = 5) -> dict[str, Any]:
        """What `layer="auto"` writes into the config: the layer, the rule, and the ranking behind it.

        The ranking is cut to its first `top` layers, and to the chosen one if `top` others come before it.
        """
        best = self.best
        shown = [ranked for number, ranked in enumerate(self.ranking) if number < top or ranked.path == best]
        return {
            "layer": best,
            "rule": RULE,
            NOISE_LEVELS_KEY: list(self.noise_levels),
            "scenes": len(self.scene_names),
            "samples": len(self.samples),
            "pairs": self.pairs(best),
            "inflate": self.inflate,
            "own_view": self.own_view,
            "ranking": [
                {
                    "index": ranked.index,
                    "path": ranked.path,
                    "skill": ranked.skill,
                    "interval": ranked.interval and list(ranked.interval),
                    "behind": ranked.behind and list(ranked.behind),
                    "supervisable": ranked.supervisable,
                }
                for ranked in shown
            ],
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {_key(entry.name): getattr(self, entry.name) for entry in fields(self)}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        bins = [list(limits) for limits in self.angle_bins]
        layers = [layer.to_dict() for layer in self.layers]
        if not self.own_view:  # so that earlier releases can read the others
            del values["own_view"]
        return {"format": FORMAT, **values, **lists, "angle_bins": bins, "layers": layers}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Undo `to_dict`.

        Raises:
            ValueError: if these are not the values of a probe.
        """
        values = {"own_view": False, **values}  # probes of earlier releases do not hold it
        expected = {"format", *(_key(entry.name) for entry in fields(cls))}
        if values.keys() != expected or values["format"] != FORMAT:
            raise ValueError(
                f"expected the keys {sorted(expected)} with format {FORMAT}, got {sorted(values)} with format "
                f"{values.get('format')!r}; probe again with this version of cameo"
            )
        names = ("noise_levels", "within", "scenes", "samples")
        tuples: dict[str, Any] = {name: tuple(values[_key(name)]) for name in names}
        tuples["angle_bins"] = tuple((low, high) for low, high in values["angle_bins"])
        tuples["layers"] = tuple(ProbedLayer.from_dict(layer) for layer in values["layers"])
        return cls(**tuples, **{name: values[name] for name in ("backbone", "inflate", "seed", "own_view")})

    def save(self, path: str | Path) -> Path:
        """Write the probe as JSON, whole or not at all, and return the path."""
        write_atomically(path, json.dumps(self.to_dict()) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            DataError: if the file is missing or is no saved probe; names the path.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file; expected what LayerProbe.save wrote")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not a saved probe ({error})") from error

    def layer(self, layer: int | str) -> ProbedLayer:
        """Return the counts of the layer with an index or path.

        Raises:
            ValueError: if it is none of `layers`.
        """
        for probed in self.layers:
            if layer == (probed.path if isinstance(layer, str) else probed.index):
                return probed
        names = [str(probed.index) for probed in self.layers] + [probed.path for probed in self.layers]
        raise unknown_name("layer", str(layer), names)

    def _figure(self, kind: str, layer: int | str, **selection: Any) -> float | None:
        return _share(kind, *(part.sum() for part in self._sums(self._counted(layer), **selection)))

    def _counted(self, layer: int | str) -> ProbedLayer:
        probed = self.layer(layer)
        if probed.reason is not None:
            raise ValueError(f"layer {probed.path!r} was not probed: {probed.reason}")
        return probed

    def _sums(
        self,
        layer: ProbedLayer,
        *,
        within: int | str = 1,
        readout: str = "mean",
        noise_level: float | None = None,
        angle_bin: int | tuple[float, float] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hits (mean over noise levels), expected hits of uniform attention, and matches, each by scene."""
        assert layer.pairs is not None
        assert layer.chance is not None
        if within not in self.within:
            raise ValueError(f"within: expected one of {self.within}, got {within!r}")
        if readout not in layer.hits:
            raise unknown_name(f"readout of layer {layer.path!r}", readout, list(layer.hits))
        if noise_level is not None and noise_level not in self.noise_levels:
            raise ValueError(f"noise_level: expected one of {self.noise_levels} or None, got {noise_level!r}")
        column = 0 if layer.reach == "cell" else self.within.index(within)
        levels = slice(None) if noise_level is None else [self.noise_levels.index(noise_level)]
        bins = self._bins(angle_bin)
        hits = layer.hits[readout][levels][..., bins, column].mean(0).sum(-1)
        chance = layer.chance[:, bins, column].sum(-1)
        return self._by_scene(hits), self._by_scene(chance), self._by_scene(layer.pairs[:, bins].sum(-1))

    def _bins(self, angle_bin: int | tuple[float, float] | None) -> list[int]:
        numbers = list(range(len(self.angle_bins)))
        if angle_bin is None:
            return numbers
        if isinstance(angle_bin, int) and angle_bin in numbers:
            return [angle_bin]
        if not isinstance(angle_bin, int) and tuple(angle_bin) in self.angle_bins:
            return [self.angle_bins.index(tuple(angle_bin))]
        raise ValueError(f"angle_bin: expected one of {self.angle_bins}, its number, or None, got {angle_bin!r}")

    def _by_scene(self, values: np.ndarray) -> np.ndarray:
        numbers = [self.scene_names.index(scene) for scene in self.scenes]
        return np.bincount(numbers, weights=values, minlength=len(self.scene_names))


def _key(field: str) -> str:
    """Key of a field in a saved probe."""
    return NOISE_LEVELS_KEY if field == "noise_levels" else field


def _share(kind: str, hits: float, chance: float, pairs: float) -> float | None:
    """Precision, chance or skill of counts; None where it is not defined."""
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    if kind == "skill":
        return float((hits - chance) / (pairs - chance)) if pairs > chance else None
    return float((hits if kind == "precision" else chance) / pairs) if pairs else None


def _skill(hits: np.ndarray, chance: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Skill of counts; NaN where there is no match, or where uniform attention would find every match."""
    missed = pairs - chance
    return np.divide(hits - chance, missed, out=np.full(missed.shape, np.nan), where=missed > 0)


def check_within(within: Sequence[int]) -> tuple[int, ...]:
    """Return the distances in tokens, checked; 1 must be among them, since layers are ranked by it.

    Example:
        >>> check_within([0, 1])
        (0, 1)

    Raises:
        ValueError: for a distance that is no whole number of tokens or is given twice, or without 1.
    """
    distances = tuple(within)
    are_counts = all(type(distance) is int and distance >= 0 for distance in distances)
    if not are_counts or len(set(distances)) < len(distances) or 1 not in distances:
        raise ValueError(f"within: expected different numbers of tokens >= 0, 1 among them, got {distances}")
    return distances
