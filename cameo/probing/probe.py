"""`cameo.probe_layers`: which layers of a model look at the same surface point in the other views.

Axes: B samples, V views, N tokens per view, T time steps (levels), A angle bins, W distances, R readouts of one kind.
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
from cameo.probing.result import NEAR, known_within
from cameo.probing.tally import BatchMatches, LayerHitCounter
from cameo.probing.truth import ANGLE_BINS

__all__ = ["LayerProbe", "probe_layers"]

NEAR_METRES = 0.02

Prepare = Callable[[Mapping[str, Any], float], tuple[Sequence[Any], Mapping[str, Any]]]


def probe_layers(
    model: nn.Module | MultiViewPipeline,
    batches: Iterable[Mapping[str, Any]],
    timesteps: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
    *,
    backbone: str | None = None,
    prepare: Prepare | MultiViewPipeline | None = None,
    inflate: bool = False,
    layers: Sequence[int | str] | None = None,
    within: Sequence[int] = (0, 1, 2),
    metric: bool = False,
    seed: int = 1234,
) -> LayerProbe:
    """Measure how often each layer's attention finds the true match, by time step and angle between the views.

    The model is not changed: it runs in eval mode without gradients and gets its modes back; hooks stand on it during
    a forward only; the random state is put back. One forward per batch and time step serves all layers.

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
        >>> probe = probe_layers(pipeline, [batch], timesteps=(0.5,), layers=[0, 1])
        >>> [layer.index for layer in probe.layers]
        [0, 1]
        >>> 0 <= probe.precision(0, within=1) <= 1
        True

    Args:
        model: a pipeline of an adapter (`get_backbone(name).build(...)` or `.load(...)`); or a `CameoModel` or plain
            denoiser together with `prepare`. A model that is held by a `CameoModel` is also read through the trained
            alignment heads of its supervised layers.
        batches: collated batches with `images` `[B, V, 3, H, W]`, `depth`, `intrinsics` and `extrinsics`, see
            `cameo.data.collate`. `key` names the samples and their scenes, `scene/views`.
        timesteps: levels, fractions of the last diffusion time step in [0, 1].
        backbone: name of the adapter that knows the layers; None asks the `CameoModel`, then the pipeline, and then
            the adapters which one of them recognises the model.
        prepare: brings a batch to the arguments of the denoiser's forward, `prepare(batch, level) -> (args, kwargs)`;
            or a pipeline that shall do it.
        inflate: probe the layers that see one view each and could be joined, as if they were: queries and keys of
            each view's own call, compared across the views.
        layers: indices or paths; None for all.
        within: distances in tokens of the view looked at, the larger of the row and the column difference.
        metric: also count what lies within 2 cm in the world; for depth and cameras in metres.
        seed: of the noise, which depends on it and on the sample's place, not on the batch size.

    Raises:
        DataError: if a batch carries no depth.
        ValueError: for an unknown backbone, layer, level or distance, without batches, or if no layer can be probed.
    """
    levels = tuple(map(float, timesteps))
    check_noise_levels("timesteps", levels)
    subject = _ProbedModel.of(model, backbone, prepare, inflate, seed)
    tallies = [LayerHitCounter(chosen, subject.refusal(chosen)) for chosen in _chosen(subject.layers, layers)]
    columns, near = known_within(within), NEAR_METRES if metric else None
    names = _SampleNames()
    with evaluation_mode(subject.denoiser), _same_random_state(subject.device):
        for number, batch in enumerate(batches):
            truths = BatchMatches(to_device(batch, subject.device), metric)
            first = names.add(batch)
            _seed_random_state(subject.device, seed + number)
            for level in levels:
                make = functools.partial(subject.prepare, truths.batch, level, first)
                for tally, seen in subject.forward(tallies, make):
                    try:
                        call = _joined(tally.layer, seen, truths.match(tally.layer))
                        tally.count(call, truths, columns, near, subject.head(tally.layer))
                    except ShapeError as error:
                        tally.reason = str(error)
            for tally in tallies:
                tally.close_batch()
    if not names.samples:
        raise ValueError("batches: expected at least one batch, got none; an iterator can be used only once")
    found = tuple(tally.result(truths.batch["images"].shape[1]) for tally in tallies)
    if all(layer.reason for layer in found):
        reasons = "; ".join(f"{layer.path}: {layer.reason}" for layer in found)
        raise ValueError(f"no layer can be probed: {reasons}")
    return LayerProbe(
        layers=found,
        timesteps=levels,
        angle_bins=ANGLE_BINS,
        within=(*columns, NEAR) if metric else columns,
        scenes=tuple(names.scenes),
        samples=tuple(names.samples),
        backbone=subject.backbone,
        inflate=subject.inflate,
        seed=seed,
    )


@dataclass
class _ProbedModel:
    """The denoiser that is probed, its layers, and how it gets its inputs."""

    denoiser: nn.Module
    wrapped: CameoModel | None
    backbone: str | None
    layers: list[AttentionLayer]
    given: Prepare | MultiViewPipeline
    inflate: bool
    seed: int

    @classmethod
    def of(cls, model: Any, backbone: str | None, prepare: Any, inflate: bool, seed: int) -> _ProbedModel:
        pipeline = None if isinstance(model, nn.Module) else model
        denoiser = model if pipeline is None else getattr(pipeline, "denoiser", None)
        if not isinstance(denoiser, nn.Module):
            raise TypeError(
                f"model: expected a pipeline of an adapter, a CameoModel or a denoiser, got {type(model).__name__}"
            )
        prepare = prepare if prepare is not None else pipeline
        if prepare is None:
            raise ValueError(
                "prepare: a model without its pipeline needs prepare=, a function (batch, level) -> (args, kwargs) "
                "of its forward, or the pipeline"
            )
        wrapped = denoiser if isinstance(denoiser, CameoModel) else wrapper_of(denoiser)
        denoiser = wrapped.base_model if wrapped is not None else denoiser
        core = unwrap_peft(denoiser)
        if wrapped is not None and wrapped.cameo_config.backbone is None and backbone is None:
            return cls(denoiser, wrapped, None, wrapped.attention_layers, prepare, inflate, seed)
        config = wrapped.cameo_config if wrapped is not None else None
        name = backbone or (config.backbone if config else None) or getattr(pipeline, "backbone", None)
        name = name or _recognised(core)
        adapter = get_backbone(name)
        if not adapter.recognizes(core):
            raise ValueError(f"backbone {name!r} does not fit: {adapter.explain_mismatch(core)}")
        inflate = inflate or bool(config and config.inflate)
        layers = adapter.inflatable_layers(core) if inflate else adapter.attention_layers(core)
        if not layers:
            raise ValueError(
                f"backbone {name!r} lists no {'inflatable_layers' if inflate else 'cross-view attention'} layer"
            )
        return cls(denoiser, wrapped, name, layers, prepare, inflate, seed)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @staticmethod
    def refusal(layer: AttentionLayer) -> str | None:
        """Why a layer cannot be probed, as far as that is known before a forward."""
        if layer.unsupported:
            return layer.unsupported
        return "its token grid is not known: the layer has no stride" if layer.stride is None else None

    def head(self, layer: AttentionLayer) -> AlignmentHead | None:
        """The trained head of a supervised layer."""
        if self.wrapped is None:
            return None
        for one, head in zip(self.wrapped.supervised_layers, self.wrapped.alignment_heads, strict=True):
            if one.path == layer.path:
                assert isinstance(head, AlignmentHead)
                return head
        return None

    def prepare(self, batch: Mapping[str, Any], level: float, first: int) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Arguments of the forward; `first` is the number of the batch's first sample."""
        if callable(self.given) and not hasattr(self.given, "training_inputs"):
            return self.given(batch, level)
        pipeline = cast("MultiViewPipeline", self.given)
        inputs = fixed_inputs(pipeline, dict(batch), range(first, first + len(batch["images"])), level, self.seed)
        return inputs.args, inputs.kwargs

    def forward(
        self, tallies: Sequence[LayerHitCounter], make: Callable[[], tuple[Sequence[Any], Mapping[str, Any]]]
    ) -> Iterator[tuple[LayerHitCounter, CapturedAttention]]:
        """Run once, and hand over the call of each layer that can be probed.

        A layer that cannot be captured is found by looking at one layer after the other, and left out from there on.
        """
        wanted = [tally for tally in tallies if tally.reason is None]
        try:
            captured = self._run([tally.layer for tally in wanted], make)
        except CaptureError:
            for tally in wanted:
                try:
                    self._run([tally.layer], make)
                except CaptureError as error:
                    tally.reason = str(error)
            wanted = [tally for tally in wanted if tally.reason is None]
            captured = self._run([tally.layer for tally in wanted], make)
        for tally in wanted:
            yield tally, captured.take(tally.layer.path)

    def _run(
        self, layers: Sequence[AttentionLayer], make: Callable[[], tuple[Sequence[Any], Mapping[str, Any]]]
    ) -> AttentionCapture:
        with _same_random_state(self.device), native_precision(self.denoiser):
            args, kwargs = make()  # again for each run: a forward may write into its inputs
            with AttentionCapture(unwrap_peft(self.denoiser), layers) as captured:
                self.denoiser(*args, **kwargs)
        return captured


class _SampleNames:
    """Keys and scenes of the samples so far."""

    def __init__(self) -> None:
        self.samples: list[str] = []
        self.scenes: list[str] = []

    def add(self, batch: Mapping[str, Any]) -> int:
        """Take the names of a batch, and return the number of its first sample."""
        first, count = len(self.samples), len(batch["images"])
        keys = batch.get("key") or [f"sample {number}" for number in range(first, first + count)]
        self.samples += map(str, keys)
        self.scenes += [scene_of(str(key)) for key in keys]
        return first


def _joined(layer: AttentionLayer, seen: CapturedAttention, match: Correspondence) -> CapturedAttention:
    """Calls of each view by itself as the call that they would be if the views were joined; others as they are."""
    batch, tokens = layer.layout.shape("query", batch=match.batch_size, token_grids=match.token_grids)
    views = match.num_views
    if (seen.query.shape[0], seen.query.shape[2] * views) != (batch * views, tokens):
        return seen
    query, key = (rearrange(part, "(b v) k n d -> b k (v n) d", v=views) for part in (seen.query, seen.key))
    return CapturedAttention(query, key, seen.scale)


def _recognised(core: nn.Module) -> str:
    """Name of the one adapter that recognises a denoiser."""
    found = []
    for name in backbones():
        try:
            if get_backbone(name).recognizes(core):
                found.append(name)
        except NotImplementedError:  # an adapter that does not say
            continue
    if len(found) != 1:
        raise ValueError(
            f"backbone: {type(core).__name__} is recognised by {' and '.join(found) or 'none'} of {backbones()}; "
            "pass backbone="
        )
    return found[0]


def _chosen(attention_layers: Sequence[AttentionLayer], layers: Sequence[int | str] | None) -> list[AttentionLayer]:
    if layers is None:
        return list(attention_layers)
    known: dict[int | str, AttentionLayer] = {
        attention_layer.path: attention_layer for attention_layer in attention_layers
    }
    known |= {attention_layer.index: attention_layer for attention_layer in attention_layers}
    for layer in layers:
        if layer not in known:
            raise unknown_name("layers", str(layer), map(str, known))
    return sorted(
        {known[layer].index: known[layer] for layer in layers}.values(),
        key=lambda attention_layer: attention_layer.index,
    )


def _seed_random_state(device: torch.device, seed: int) -> None:
    """Seed what `_same_random_state` puts back; `torch.manual_seed` would reach every GPU."""
    torch.random.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    """Put the random state of the CPU and of the model's device back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
