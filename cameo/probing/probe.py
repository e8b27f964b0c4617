"""`cameo.probe_layers`: which layers of a model look at the same surface point in the other views.

Axes: B samples, V views, H W image pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import rearrange
from torch import nn

from cameo.alignment import AlignmentHead
from cameo.attention.capture import AttentionCapture, AttentionLayer, CapturedAttention
from cameo.backbone import backbones, get_backbone, unwrap_peft
from cameo.correspondence import Correspondence
from cameo.data.batches import to_device
from cameo.errors import CaptureError, ShapeError, unknown_name
from cameo.model import CameoModel, wrapper_of
from cameo.pipeline import MultiViewPipeline
from cameo.probing.bootstrap import scene_of
from cameo.probing.denoising import check_noise_levels, fixed_inputs
from cameo.probing.layer_probe import LayerProbe
from cameo.probing.mode import evaluation_mode, native_precision
from cameo.probing.result import NEAR, check_within
from cameo.probing.tally import BatchMatches, LayerHitCounter
from cameo.probing.truth import ANGLE_BINS
from cameo.renamed import old_keywords

__all__ = ["LayerProbe", "probe_layers"]

NEAR_METERS = 0.02

Arguments = tuple[Sequence[Any], Mapping[str, Any]]  # positional ones and keywords of a forward
Prepare = Callable[[Mapping[str, Any], float], Arguments]


@old_keywords
def probe_layers(
    model: nn.Module | MultiViewPipeline,
    batches: Iterable[Mapping[str, Any]],
    noise_levels: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
    *,
    backbone: str | None = None,
    prepare: Prepare | MultiViewPipeline | None = None,
    inflate: bool = False,
    layers: Sequence[int | str] | None = None,
    within: Sequence[int] = (0, 1, 2),
    metric: bool = False,
    seed: int = 1234,
    own_view: bool = False,
) -> LayerProbe:
    """Measure how often each layer's attention finds the true match, by noise level and angle between the views.

    The model is not changed: it runs in eval mode without gradients, and each module gets its own mode back; hooks are
    registered during a forward pass only; the random state is restored. One forward pass per batch and noise level
    serves all layers.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> _ = torch.manual_seed(0)
        >>> pipeline = get_backbone("cat3d").build("tiny")
        >>> extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
        >>> extrinsics[0, 1, 0, 3] = -0.5  # the second camera stands to the right, before the same wall
        >>> batch = {
        ...     "images": torch.rand(1, 2, 3, 32, 32),
        ...     "depth": torch.full((1, 2, 1, 32, 32), 2.0),
        ...     "intrinsics": torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]).expand(1, 2, 3, 3),
        ...     "extrinsics": extrinsics,
        ...     "num_reference_views": 1,
        ... }
        >>> probe = probe_layers(pipeline, [batch], noise_levels=(0.5,), layers=[0, 1])
        >>> [layer.index for layer in probe.layers]
        [0, 1]
        >>> 0 <= probe.precision(0, within=1) <= 1
        True

    Args:
        model: a pipeline of an adapter (`get_backbone(name).build(...)` or `.load(...)`); or a `CameoModel` or plain
            denoiser together with `prepare`. The attention of a model that a `CameoModel` wraps is also read through
            the trained alignment heads of its supervised layers.
        batches: collated batches with `images` `[B, V, 3, H, W]`, `depth`, `intrinsics` and `extrinsics`, see
            `cameo.data.collate`. `key` names the samples and their scenes, `scene/views`.
        noise_levels: shares of the last timestep in [0, 1], all different.
        backbone: name of the adapter that knows the layers. None takes the name from the `CameoModel` or the pipeline,
            or else the one adapter that recognizes the model.
        prepare: turns a batch into the arguments of the denoiser's forward,
            `prepare(batch, noise_level) -> (args, kwargs)`; or a pipeline that does so.
        inflate: probe the layers that attend within one view and can be inflated, as if they were: queries and keys
            come from each view's own call, and are compared across the views.
        layers: indices or paths; None for all.
        within: distances from the match that are counted, in tokens of the key view: the larger of the row and the
            column difference.
        metric: also count tokens within 2 cm of the match in the world; for depth and cameras in meters.
        seed: seed of the noise, which also depends on a sample's number, and not on the batch size.
        own_view: probe the layers that `cameo.wrap(own_view=True)` supervises within each view: whether a query finds,
            among the tokens of its own view, the one that stands where the reference view shows its surface point.

    Raises:
        DataError: if a batch has no depth.
        ValueError: for an unknown backbone, layer, noise level or distance, without batches, or if no layer can be
            probed.
    """
    levels = tuple(map(float, noise_levels))
    check_noise_levels("noise_levels", levels)
    probed = _ProbedModel.of(model, backbone, prepare, inflate, own_view, seed)
    counters = [LayerHitCounter(layer, probed.refusal(layer)) for layer in _chosen_layers(probed.layers, layers)]
    distances, near = check_within(within), NEAR_METERS if metric else None
    names = _SampleNames()
    with evaluation_mode(probed.denoiser), _same_random_state(probed.device):
        for number, batch in enumerate(batches):
            matches = BatchMatches(to_device(batch, probed.device), metric)
            first = names.add(batch)
            _seed_random_state(probed.device, seed + number)
            for level in levels:
                make = functools.partial(probed.prepare, matches.batch, level, first)
                for counter, captured in probed.forward(counters, make):
                    try:
                        call = _inflated_call(counter.layer, captured, matches.match(counter.layer))
                        counter.count(call, matches, distances, near, probed.head(counter.layer))
                    except ShapeError as error:
                        counter.reason = str(error)
            for counter in counters:
                counter.close_batch()
    if not names.samples:
        raise ValueError("batches: expected at least one batch, got none; an iterator can be used only once")
    results = tuple(counter.result(matches.batch["images"].shape[1]) for counter in counters)
    if all(layer.reason for layer in results):
        reasons = "; ".join(f"{layer.path}: {layer.reason}" for layer in results)
        raise ValueError(f"no layer can be probed: {reasons}")
    return LayerProbe(
        layers=results,
        noise_levels=levels,
        angle_bins=ANGLE_BINS,
        within=(*distances, NEAR) if metric else distances,
        scenes=tuple(names.scenes),
        samples=tuple(names.samples),
        backbone=probed.backbone,
        inflate=probed.inflate,
        seed=seed,
        own_view=probed.own_view,
    )


@dataclass
class _ProbedModel:
    """The denoiser that is probed, its layers, and how it gets its inputs."""

    denoiser: nn.Module
    wrapped: CameoModel | None
    backbone: str | None
    layers: list[AttentionLayer]
    make_inputs: Prepare | MultiViewPipeline
    inflate: bool
    own_view: bool
    seed: int

    @classmethod
    def of(
        cls, model: Any, backbone: str | None, prepare: Any, inflate: bool, own_view: bool, seed: int
    ) -> _ProbedModel:
        """Find out what was given to `probe_layers`; the arguments are its own."""
        pipeline = None if isinstance(model, nn.Module) else model
        denoiser = model if pipeline is None else getattr(pipeline, "denoiser", None)
        if not isinstance(denoiser, nn.Module):
            raise TypeError(
                f"model: expected a pipeline of an adapter, a CameoModel or a denoiser, got {type(model).__name__}"
            )
        prepare = prepare if prepare is not None else pipeline
        if prepare is None:
            raise ValueError(
                "prepare: a model without its pipeline needs prepare=, a function (batch, noise_level) -> "
                "(args, kwargs) of its forward, or the pipeline"
            )
        wrapped = denoiser if isinstance(denoiser, CameoModel) else wrapper_of(denoiser)
        denoiser = wrapped.base_model if wrapped is not None else denoiser
        core = unwrap_peft(denoiser)
        if wrapped is not None and wrapped.cameo_config.backbone is None and backbone is None:
            return cls(denoiser, wrapped, None, wrapped.attention_layers, prepare, inflate, own_view, seed)
        config = wrapped.cameo_config if wrapped is not None else None
        name = backbone or (config.backbone if config else None) or getattr(pipeline, "backbone", None)
        name = name or _recognized_backbone(core)
        adapter = get_backbone(name)
        if not adapter.recognizes(core):
            raise ValueError(f"backbone {name!r} does not fit: {adapter.explain_mismatch(core)}")
        if inflate and own_view:
            raise ValueError("inflate, own_view: two ways to look at a layer that sees one view each; give one of them")
        if config is not None and not (inflate or own_view):
            inflate, own_view = config.inflate, config.own_view
        layers = adapter.layers_for(core, inflate=inflate, own_view=own_view)
        if not layers:
            kind = "own-view" if own_view else "inflatable" if inflate else "cross-view attention"
            raise ValueError(f"backbone {name!r} lists no {kind} layer")
        return cls(denoiser, wrapped, name, layers, prepare, inflate, own_view, seed)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @staticmethod
    def refusal(layer: AttentionLayer) -> str | None:
        """Why a layer cannot be probed, as far as this is known before a forward pass."""
        if layer.unsupported:
            return layer.unsupported
        return "its token grid is not known: the layer has no stride" if layer.stride is None else None

    def head(self, layer: AttentionLayer) -> AlignmentHead | None:
        """The trained alignment head of a layer, or None if the layer is not supervised."""
        if self.wrapped is None:
            return None
        for supervised, head in zip(self.wrapped.supervised_layers, self.wrapped.alignment_heads, strict=True):
            if supervised.path == layer.path:
                assert isinstance(head, AlignmentHead)
                return head
        return None

    def prepare(self, batch: Mapping[str, Any], level: float, first: int) -> Arguments:
        """Arguments of the forward; `first` is the number of the batch's first sample."""
        if callable(self.make_inputs) and not hasattr(self.make_inputs, "training_inputs"):
            return self.make_inputs(batch, level)
        pipeline = cast("MultiViewPipeline", self.make_inputs)
        inputs = fixed_inputs(pipeline, dict(batch), range(first, first + len(batch["images"])), level, self.seed)
        return inputs.args, inputs.kwargs

    def forward(
        self, counters: Sequence[LayerHitCounter], make: Callable[[], Arguments]
    ) -> Iterator[tuple[LayerHitCounter, CapturedAttention]]:
        """Run the denoiser once, and yield the captured call of each layer that can be probed.

        If the capture fails, the layers are captured one by one, and those that fail are left out from then on.
        """
        wanted = [counter for counter in counters if counter.reason is None]
        try:
            captured = self._run([counter.layer for counter in wanted], make)
        except CaptureError:
            for counter in wanted:
                try:
                    self._run([counter.layer], make)
                except CaptureError as error:
                    counter.reason = str(error)
            wanted = [counter for counter in wanted if counter.reason is None]
            captured = self._run([counter.layer for counter in wanted], make)
        for counter in wanted:
            yield counter, captured.take(counter.layer.path)

    def _run(self, layers: Sequence[AttentionLayer], make: Callable[[], Arguments]) -> AttentionCapture:
        with _same_random_state(self.device), native_precision(self.denoiser):
            args, kwargs = make()  # for each run, since a forward may write into its inputs
            with AttentionCapture(unwrap_peft(self.denoiser), layers) as captured:
                self.denoiser(*args, **kwargs)
        return captured


class _SampleNames:
    """Keys and scenes of the samples so far."""

    def __init__(self) -> None:
        self.samples: list[str] = []
        self.scenes: list[str] = []

    def add(self, batch: Mapping[str, Any]) -> int:
        """Add the names of a batch, and return the number of its first sample."""
        first, count = len(self.samples), len(batch["images"])
        keys = batch.get("key") or [f"sample {number}" for number in range(first, first + count)]
        self.samples += map(str, keys)
        self.scenes += [scene_of(str(key)) for key in keys]
        return first


def _inflated_call(layer: AttentionLayer, captured: CapturedAttention, match: Correspondence) -> CapturedAttention:
    """Turn a call within single views into that of the inflated layer; any other call stays as it is."""
    batch, tokens = layer.layout.shape("query", batch=match.batch_size, token_grids=match.token_grids)
    views = match.num_views
    if (captured.query.shape[0], captured.query.shape[2] * views) != (batch * views, tokens):
        return captured
    query, key = (rearrange(part, "(b v) k n d -> b k (v n) d", v=views) for part in (captured.query, captured.key))
    return CapturedAttention(query, key, captured.scale)


def _recognized_backbone(core: nn.Module) -> str:
    """Name of the one adapter that recognizes a denoiser."""
    names = []
    for name in backbones():
        try:
            if get_backbone(name).recognizes(core):
                names.append(name)
        except NotImplementedError:  # the adapter does not implement the check
            continue
    if len(names) != 1:
        raise ValueError(
            f"backbone: {type(core).__name__} is recognized by {' and '.join(names) or 'none'} of {backbones()}; "
            "pass backbone="
        )
    return names[0]


def _chosen_layers(all_layers: Sequence[AttentionLayer], chosen: Sequence[int | str] | None) -> list[AttentionLayer]:
    """Return the layers with these indices or paths, each once and in execution order."""
    if chosen is None:
        return list(all_layers)
    by_name: dict[int | str, AttentionLayer] = {layer.path: layer for layer in all_layers}
    by_name |= {layer.index: layer for layer in all_layers}
    for name in chosen:
        if name not in by_name:
            raise unknown_name("layers", str(name), map(str, by_name))
    return sorted({by_name[name].index: by_name[name] for name in chosen}.values(), key=lambda layer: layer.index)


def _seed_random_state(device: torch.device, seed: int) -> None:
    """Seed the generators that `_same_random_state` restores; `torch.manual_seed` would seed those of every GPU."""
    torch.random.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random state of the CPU and of the model's device on leaving the block."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
