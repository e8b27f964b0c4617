"""What a probe of a model's layers found: how precisely each layer's attention finds the true match, and their ranking.

Axes: T time steps (levels), S samples, A angle bins, W distances, R readouts of one kind.
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

__all__ = ["NEAR", "ProbeResult", "RankedLayer", "known_within"]

NEAR = "2cm"
FORMAT = 1
RULE = (
    "highest skill within 1 token of the mean over heads, averaged over the time steps; "
    "skill = (precision - chance) / (1 - chance)"
)
KINDS = ("precision", "chance", "skill")

Interval = tuple[float, float]


@dataclass(frozen=True)
class RankedLayer:
    """One place in a ranking.

    Attributes:
        index, path: of the attention layer.
        skill: by which the layers are ranked, averaged over the time steps.
        interval: 95 % interval of the skill, from resampling the scenes; None with one scene.
        behind: 95 % interval of how far the skill is behind that of the first, over the same resampled scenes; one
            that holds 0 is no difference the probe can tell. None for the first, or with one scene.
        supervisable: whether `cameo.wrap` takes the layer.
    """

    index: int
    path: str
    skill: float
    interval: Interval | None
    behind: Interval | None
    supervisable: bool


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Counts of all probed layers, the figures made of them, and the ranking; `cameo.LayerProbe` also shows them.

    The attributes are described there.
    """

    layers: tuple[ProbedLayer, ...]
    timesteps: tuple[float, ...]
    angle_bins: tuple[tuple[float, float], ...]
    within: tuple[int | str, ...]
    scenes: tuple[str, ...]
    samples: tuple[str, ...]
    backbone: str | None = None
    inflate: bool = False
    seed: int = 0

    def precision(self, layer: int | str, **selection: Any) -> float | None:
        """Share of visible pairs whose most-attended token lies near the true match; None where there is no pair.

        Args:
            layer: index or path.
            **selection: `within` (one of `self.within`, default 1), `readout` ("mean" of the heads, "best_head" or
                "through_head", default "mean"), `timestep` (one of `self.timesteps`; None is the mean over all),
                `angle_bin` (one of `self.angle_bins` or its number; None is all pairs).

        Raises:
            ValueError: for a layer, distance, readout, time step or bin that was not probed.
        """
        return self._figure("precision", layer, **selection)

    def chance(self, layer: int | str, **selection: Any) -> float | None:
        """Precision that uniform attention would have on the same pairs; arguments as of `precision`."""
        return self._figure("chance", layer, **selection)

    def skill(self, layer: int | str, **selection: Any) -> float | None:
        """`(precision - chance) / (1 - chance)`: 0 is chance, 1 perfect; arguments as of `precision`."""
        return self._figure("skill", layer, **selection)

    def per_scene(self, layer: int | str, *, kind: str = "precision", **selection: Any) -> dict[str, float]:
        """Precision, chance or skill of each scene that has a pair; other arguments as of `precision`."""
        sums = self._sums(self._counted(layer), **selection)
        values = {scene: _share(kind, *(part[at] for part in sums)) for at, scene in enumerate(self.scene_names)}
        return {scene: value for scene, value in values.items() if value is not None}

    def pairs(self, layer: int | str, *, angle_bin: int | tuple[float, float] | None = None) -> int:
        """Number of visible pairs behind the figures of a layer at each time step."""
        counted = self._counted(layer)
        assert counted.pairs is not None
        return int(counted.pairs[:, self._bins(angle_bin)].sum())

    def ceiling(self, layer: int | str) -> float | None:
        """Share of visible pairs whose true token has its centre within 2 cm: what precision "2cm" can reach at most.

        None where there is no pair, or "2cm" was not measured.
        """
        counted = self._counted(layer)
        assert counted.pairs is not None
        return None if counted.ceiling is None else _share("precision", counted.ceiling.sum(), 0, counted.pairs.sum())

    @cached_property
    def scene_names(self) -> tuple[str, ...]:
        """The different scenes, in the order in which they came."""
        return tuple(dict.fromkeys(self.scenes))

    @cached_property
    def ranking(self) -> tuple[RankedLayer, ...]:
        """The probed layers that have a figure, best first.

        By skill within 1 token of the mean over heads, averaged over the time steps. Skill and not precision, since
        uniform attention already is within 1 token of the match 9 times in 16 on a grid of 4 x 4 tokens, and 9 times
        in 1024 on one of 32 x 32. Layers of reach "cell" are ranked by the skill of finding a view.
        """
        found = [(layer, self.skill(layer.path)) for layer in self.layers if layer.reason is None]
        ranked = [(layer, skill) for layer, skill in found if skill is not None]
        ranked.sort(key=lambda entry: -entry[1])  # stable: of equals the first in execution order
        intervals = self._intervals([layer for layer, _ in ranked])
        return tuple(
            RankedLayer(layer.index, layer.path, skill, interval, behind, layer.unsupervised is None)
            for (layer, skill), (interval, behind) in zip(ranked, intervals, strict=True)
        )

    def _intervals(self, ranked: Sequence[ProbedLayer]) -> list[tuple[Interval | None, Interval | None]]:
        """Of each layer the interval of its skill, and of how far it is behind the first."""
        if not ranked or len(self.scene_names) < 2:
            return [(None, None)] * len(ranked)

        def skills(*drawn: np.ndarray, axis: int) -> np.ndarray:
            skill = _skill(*(part.sum(axis) for part in drawn))  # [layers, resamples]
            return np.concatenate([skill, skill[:1] - skill])

        sums = (np.stack(parts) for parts in zip(*map(self._sums, ranked), strict=True))  # [layers, scenes]
        low, high = bootstrap_interval(skills, *sums)
        found = [(float(start), float(end)) for start, end in zip(low, high, strict=True)]
        return list(zip(found[: len(ranked)], [None, *found[len(ranked) + 1 :]], strict=True))

    @property
    def best(self) -> str:
        """Path of the first layer of the ranking that can be supervised.

        Raises:
            ValueError: if there is none.
        """
        for place in self.ranking:
            if place.supervisable:
                return place.path
        reasons = "; ".join(f"{layer.path}: {layer.reason or layer.unsupervised or 'no pair'}" for layer in self.layers)
        raise ValueError(
            f"probe: no layer that can be supervised has a figure ({reasons}). Probe views that see each other's "
            "surface, or name the layer yourself"
        )

    def choice(self, *, top: int = 5) -> dict[str, Any]:
        """What `layer="auto"` writes into the config: the layer, the rule, and the ranking behind it.

        Of the ranking the first `top`, and the layer itself if layers that cannot be supervised are before it.
        """
        best = self.best
        shown = [place for number, place in enumerate(self.ranking) if number < top or place.path == best]
        return {
            "layer": best,
            "rule": RULE,
            "timesteps": list(self.timesteps),
            "scenes": len(self.scene_names),
            "samples": len(self.samples),
            "pairs": self.pairs(best),
            "inflate": self.inflate,
            "ranking": [
                {
                    "index": place.index,
                    "path": place.path,
                    "skill": place.skill,
                    "interval": place.interval and list(place.interval),
                    "behind": place.behind and list(place.behind),
                    "supervisable": place.supervisable,
                }
                for place in shown
            ],
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        bins = [list(limits) for limits in self.angle_bins]
        layers = [layer.to_dict() for layer in self.layers]
        return {"format": FORMAT, **values, **lists, "angle_bins": bins, "layers": layers}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Undo `to_dict`.

        Raises:
            ValueError: if these are not the values of a probe.
        """
        expected = {"format", *(entry.name for entry in fields(cls))}
        if values.keys() != expected or values["format"] != FORMAT:
            raise ValueError(
                f"expected the keys {sorted(expected)} with format {FORMAT}, got {sorted(values)} with format "
                f"{values.get('format')!r}; probe again with this version of cameo"
            )
        names = ("timesteps", "within", "scenes", "samples")
        tuples: dict[str, Any] = {name: tuple(values[name]) for name in names}
        tuples["angle_bins"] = tuple((low, high) for low, high in values["angle_bins"])
        tuples["layers"] = tuple(ProbedLayer.from_dict(layer) for layer in values["layers"])
        return cls(**tuples, **{name: values[name] for name in ("backbone", "inflate", "seed")})

    def save(self, path: str | Path) -> Path:
        """Write the probe as JSON (temporary name, then rename) and return the path."""
        write_atomically(path, json.dumps(self.to_dict()) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            DataError: if the file is missing or holds something else; names the path.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file; expected what LayerProbe.save wrote")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not a saved probe ({error})") from error

    def layer(self, layer: int | str) -> ProbedLayer:
        """Return what was counted of the layer with an index or path.

        Raises:
            ValueError: if it is none of `layers`.
        """
        for one in self.layers:
            if layer == (one.path if isinstance(layer, str) else one.index):
                return one
        raise unknown_name("layer", str(layer), [str(one.index) for one in self.layers] + [x.path for x in self.layers])

    def _figure(self, kind: str, layer: int | str, **selection: Any) -> float | None:
        return _share(kind, *(part.sum() for part in self._sums(self._counted(layer), **selection)))

    def _counted(self, layer: int | str) -> ProbedLayer:
        found = self.layer(layer)
        if found.reason is not None:
            raise ValueError(f"layer {found.path!r} was not probed: {found.reason}")
        return found

    def _sums(
        self,
        layer: ProbedLayer,
        *,
        within: int | str = 1,
        readout: str = "mean",
        timestep: float | None = None,
        angle_bin: int | tuple[float, float] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hits (mean over time steps), expected hits of chance, and pairs by scene."""
        assert layer.pairs is not None
        assert layer.chance is not None
        if within not in self.within:
            raise ValueError(f"within: expected one of {self.within}, got {within!r}")
        if readout not in layer.hits:
            raise unknown_name(f"readout of layer {layer.path!r}", readout, list(layer.hits))
        if timestep is not None and timestep not in self.timesteps:
            raise ValueError(f"timestep: expected one of {self.timesteps} or None, got {timestep!r}")
        column = 0 if layer.reach == "cell" else self.within.index(within)
        steps = slice(None) if timestep is None else [self.timesteps.index(timestep)]
        bins = self._bins(angle_bin)
        hits = layer.hits[readout][steps][..., bins, column].mean(0).sum(-1)
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


def _share(kind: str, hits: float, chance: float, pairs: float) -> float | None:
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    if kind == "skill":
        return float((hits - chance) / (pairs - chance)) if pairs > chance else None
    return float((hits if kind == "precision" else chance) / pairs) if pairs else None


def _skill(hits: np.ndarray, chance: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Skill of counts, NaN where uniform attention would hit every pair, or where there is none."""
    room = pairs - chance
    return np.divide(hits - chance, room, out=np.full(room.shape, np.nan), where=room > 0)


def known_within(within: Sequence[int]) -> tuple[int, ...]:
    """Check the distances in tokens; 1 must be among them, since layers are ranked by it."""
    known = tuple(within)
    if not all(type(limit) is int and limit >= 0 for limit in known) or len(set(known)) != len(known) or 1 not in known:
        raise ValueError(f"within: expected different numbers of tokens >= 0, 1 among them, got {known}")
    return known
