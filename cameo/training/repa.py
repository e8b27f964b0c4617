"""REPA, for comparison: hidden tokens are aligned with frozen image features, in place of attention with matches.

Source: REPA (Yu et al. 2024, arXiv 2410.06940): cosine similarity of projected hidden tokens and patch features of the
clean image; the projector has three linear layers with SiLU between them and is dropped after the training.

Axes: B samples, V views, C channels, h w token grid, N = h*w tokens per view; B' K V N' D as in `TokenLayout`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cameo.attention.capture import AttentionLayer
from cameo.attention.folding import fold_tokens
from cameo.attention.layout import TokenLayout
from cameo.backbone import unwrap_peft
from cameo.correspondence.matching import resample_features
from cameo.data.batches import layer_grids
from cameo.data.matches import TokenGrids
from cameo.errors import CaptureError, NoLossError
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline
from cameo.probing.mode import evaluation_mode, native_precision

__all__ = ["FeatureAlignment", "align_features", "feature_tokens", "projector"]

# Width of the projector, as in the released code of REPA.
PROJECTOR_WIDTH = 2048
NO_LOSS = "no alignment loss: call the model with features= before reading alignment_loss"


class FeatureAlignment(nn.Module):
    """A wrapped model in which the outputs of the supervised layers are aligned with image features.

    Called like the model, with `features`, `grids` and `kept` it sets `alignment_loss`: minus the mean cosine
    similarity of the projected hidden tokens and the features at their place, in [-1, 1], mean over the layers.

    Args:
        model: its supervised layers are taken.
        modules: path of the module whose output is aligned, one per layer.
        channels: of these outputs.
        dim: channels of the features.
        seed: of the projectors.

    Attributes:
        projectors: one per supervised layer; they are trained with the model and are not part of it.
        num_supervised: number of tokens behind the latest alignment loss.
    """

    def __init__(
        self, model: CameoModel, modules: Sequence[str], channels: Sequence[int], dim: int, *, seed: int
    ) -> None:
        super().__init__()
        self.model, self.modules_aligned = model, list(modules)
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPU's as well
            self.projectors = nn.ModuleList(projector(width, dim) for width in channels).to(device)
        self.num_supervised = 0
        self._alignment_loss: Tensor | None = None

    @property
    def alignment_loss(self) -> Tensor:
        """The loss of the latest forward with features, unweighted.

        Raises:
            NoLossError: if the latest forward had none.
        """
        if self._alignment_loss is None:
            raise NoLossError(NO_LOSS)
        return self._alignment_loss

    def __getattr__(self, name: str) -> Any:
        if name == "alignment_loss":  # Python asks here once the property has raised an AttributeError
            raise NoLossError(NO_LOSS)
        return super().__getattr__(name)

    def grids(self, batch: Mapping[str, Any]) -> list[TokenGrids]:
        """Return the token grids of the views of a batch, for each supervised layer."""
        return [layer_grids(layer, batch) for layer in self.model.supervised_layers]

    def forward(
        self,
        *args: Any,
        features: Tensor | None = None,
        grids: Sequence[TokenGrids] = (),
        kept: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return exactly what the model returns; with `features`, set `alignment_loss` too.

        Args:
            features: `[B, V, C, h, w]` of the clean images.
            grids: token grid of each view, for each supervised layer.
            kept: samples that count, bool `[B]`; None takes all. If there are none, the loss is 0.

        Raises:
            CaptureError: if a layer did not run exactly once, its output carries no gradient in training, or its output
                does not hold the tokens of the views.
        """
        self._alignment_loss, self.num_supervised = None, 0
        if features is None:
            return self.model(*args, **kwargs)
        with outputs_of(unwrap_peft(self.model.base_model), self.modules_aligned) as seen:
            output = self.model(*args, **kwargs)
        losses = []
        layers = zip(self.model.supervised_layers, self.modules_aligned, grids, self.projectors, strict=True)
        for layer, path, token_grids, project in layers:
            hidden, present, layout = hidden_tokens(layer, path, seen[path], features.shape[0], token_grids)
            if self.training and torch.is_grad_enabled() and not hidden.requires_grad:
                raise CaptureError(
                    f"the output of {path!r} carries no gradient, so features could train nothing but the projector. "
                    "Likely causes: reentrant gradient checkpointing (use use_reentrant=False), or every parameter "
                    "before it is frozen (add LoRA or unfreeze before the forward)"
                )
            target = feature_tokens(layout, features, token_grids, views=hidden.shape[1])
            if kept is not None:
                present = present & kept.to(present.device).repeat_interleave(len(present) // len(kept))[:, None, None]
            cosine = F.cosine_similarity(project(hidden).float(), target.to(hidden.device), dim=-1)
            count = present.sum()
            losses.append(-(cosine * present).sum() / count.clamp(min=1))
            self.num_supervised += int(count)
        self._alignment_loss = torch.stack(losses).mean()
        return output


def projector(channels: int, dim: int) -> nn.Sequential:
    """Build the multi-layer perceptron of REPA, from hidden tokens to features.

    Example:
        >>> [tuple(layer.weight.shape) for layer in projector(32, 384) if isinstance(layer, nn.Linear)]
        [(2048, 32), (2048, 2048), (384, 2048)]
    """
    return nn.Sequential(
        nn.Linear(channels, PROJECTOR_WIDTH),
        nn.SiLU(),
        nn.Linear(PROJECTOR_WIDTH, PROJECTOR_WIDTH),
        nn.SiLU(),
        nn.Linear(PROJECTOR_WIDTH, dim),
    )


def align_features(
    model: CameoModel, pipeline: MultiViewPipeline, sample: Mapping[str, Any], dim: int, *, seed: int = 0
) -> FeatureAlignment:
    """Find the hidden tokens of the supervised layers with one forward, and put a projector on each.

    They are the output of the block that holds the attention layer, or of the attention layer where that block's
    output holds no tokens of the views.

    Args:
        model: wraps `pipeline.denoiser`.
        pipeline: makes the denoiser's inputs.
        sample: a collated batch of one.
        dim: channels of the features.
        seed: of the projectors' weights.

    Raises:
        CaptureError: if neither output holds the tokens of the views; the message holds the shapes.
    """
    core, layers = unwrap_peft(model.base_model), model.supervised_layers
    candidates = {layer.path: [layer.path.rpartition(".")[0], layer.path] for layer in layers}
    paths = list(dict.fromkeys(path for pair in candidates.values() for path in pair if path))
    with evaluation_mode(model), native_precision(model), outputs_of(core, paths) as seen:
        # A generator of its own leaves the random numbers of the run unchanged.
        generator = torch.Generator().manual_seed(seed)
        steps = torch.zeros(len(sample["images"]), dtype=torch.long)
        inputs = pipeline.training_inputs(sample, generator=generator, timesteps=steps)
        model.base_model(*inputs.args, **inputs.kwargs)
    modules, channels = [], []
    for layer in layers:
        path, width = _first_that_fits(layer, candidates[layer.path], seen, sample)
        modules.append(path)
        channels.append(width)
    return FeatureAlignment(model, modules, channels, dim, seed=seed)


def _first_that_fits(
    layer: AttentionLayer, paths: Sequence[str], seen: Mapping[str, list[Tensor]], sample: Mapping[str, Any]
) -> tuple[str, int]:
    """Path of the module whose output holds the tokens of the views, and its channels."""
    refusals = []
    for path in paths:
        if path in seen:
            try:
                hidden, _, _ = hidden_tokens(layer, path, seen[path], len(sample["images"]), layer_grids(layer, sample))
            except CaptureError as error:
                refusals.append(str(error))
            else:
                return path, hidden.shape[-1]
    raise CaptureError("; ".join(refusals))


@contextlib.contextmanager
def outputs_of(core: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the output of each call of some modules inside the block; of a tuple, its first tensor."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}

    def collect(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, Tensor):
                seen[path].append(first)

        return hook

    handles = [core.get_submodule(path).register_forward_hook(collect(path)) for path in seen]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def hidden_tokens(
    layer: AttentionLayer, path: str, outputs: Sequence[Tensor], batch: int, token_grids: TokenGrids
) -> tuple[Tensor, Tensor, TokenLayout]:
    """Bring the output of a module to `[B', V, N', C]`; also return which of these tokens exist, bool `[B', V, N']`.

    An output has either the shape that the layer's queries have (all views in one sequence, or a row of tokens), or
    the tokens of one view in each row of its batch.

    Returns:
        The tokens, which of them exist, and the layout in which the output holds them.

    Raises:
        CaptureError: unless exactly one of the outputs has such a shape, or where both shapes are the same.
    """
    layouts: dict[tuple[int, ...], TokenLayout] = {}
    if layer.layout.own_view_shows is None:  # else the views are apart, and that of the reference is one of them
        layouts[layer.layout.shape("query", batch=batch, token_grids=token_grids)] = layer.layout
    if len(set(token_grids)) == 1:
        hidden_views = {name: getattr(layer.layout, name) for name in ("unsupervised_views", "references_last")}
        per_view = TokenLayout("(b v) (h w)", key="(b u) (v h w)", **hidden_views)
        shape = per_view.shape("query", batch=batch, token_grids=token_grids)
        if shape in layouts and layer.layout.reach != "all":
            raise CaptureError(
                f"layer {layer.path!r}: an output [{shape[0]}, {shape[1]}, C] could hold the tokens of a view in each "
                f"row, or be ordered as the queries ({layer.layout!r}). Cure: another number of views or resolution"
            )
        layouts.setdefault(shape, per_view)
    fitting = [output for output in outputs if output.shape[:-1] in layouts]
    if len(fitting) != 1:
        wanted = " or ".join(f"[{rows}, {tokens}, C]" for rows, tokens in layouts)
        raise CaptureError(
            f"layer {layer.path!r}: to align its hidden tokens with features the output of {path!r} should once be "
            f"{wanted} for {batch} samples with token grids {tuple(token_grids)}, got "
            f"{', '.join(str(list(output.shape)) for output in outputs) or 'no tensor'}. Cure: another layer="
        )
    layout, output = layouts[fitting[0].shape[:-1]], fitting[0][:, None]
    present = layout.split_query(output.new_ones(*output.shape[:-1], 1), batch=batch, token_grids=token_grids)
    return layout.split_query(output, batch=batch, token_grids=token_grids)[:, 0], present[:, 0, ..., 0] > 0, layout


def feature_tokens(layout: TokenLayout, features: Tensor, token_grids: TokenGrids, *, views: int) -> Tensor:
    """Bring features `[B, V, C, h, w]` to the tokens of an output, `[B', views, N', C]`, of the last `views` views.

    Example:
        >>> feature_tokens(TokenLayout("b (v h w)"), torch.zeros(2, 3, 8, 16, 16), ((4, 4),) * 3, views=3).shape
        torch.Size([2, 3, 16, 8])
    """
    longest = max(height * width for height, width in token_grids)
    tokens = []
    for view, size in enumerate(token_grids):
        view_tokens = rearrange(resample_features(features[:, view], size), "b c h w -> b (h w) c")
        tokens.append(F.pad(view_tokens, (0, 0, 0, longest - view_tokens.shape[1])))
    stacked = torch.stack(tokens[len(tokens) - views :], dim=1)
    return fold_tokens(stacked, layout.reach, token_grids[0])
