"""`CameoModel`: the module that carries the alignment loss through training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cameo.alignment import AlignmentHead, check_head_options, check_options
from cameo.alignment.head_watch import HeadWatch
from cameo.attention.capture import AttentionCapture, AttentionLayer, CapturedAttention
from cameo.attention.compiled.regions import is_being_compiled, skipped_by_compiler
from cameo.attention.visibility import split_call
from cameo.backbone import get_backbone, resolve_layers, unwrap_peft
from cameo.checks.layer_losses import LayerLoss, plan_losses
from cameo.checks.observed_forward import ObservedForward, Observer
from cameo.checks.unseen_kernels import UnseenKernels
from cameo.config import CameoConfig, finite
from cameo.correspondence import Correspondence
from cameo.correspondence.correspondence import one_per_layer
from cameo.errors import CaptureError, NoLossError, as_integer
from cameo.geometry.grids import TokenGrids
from cameo.renamed import old_attributes, old_functions, old_keywords
from cameo.wrapped import check_plain, find_wrapper, forget, register

__all__ = ["CameoModel", "attach", "wrapper_of"]

if TYPE_CHECKING:
    from cameo.checks.layout_check import LayoutCheck
else:
    __getattr__ = old_functions(__name__)

NO_LOSS = "no alignment loss: call the model with correspondence= before reading alignment_loss"


@old_attributes
class CameoModel(nn.Module):
    """A wrapped model: calls like the model, and computes the alignment loss on the way.

    Example:
        >>> from cameo import wrap
        >>> from cameo.backbone import get_backbone
        >>> adapter = get_backbone("cat3d")
        >>> model = wrap(adapter.build("tiny").unet, backbone="cat3d")
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # after wrap: it holds the alignment head too
        >>> args, kwargs = adapter.example_inputs(model.base_model)
        >>> height, width = model.token_grid(32, 32)
        >>> index = torch.full((1, 2, 2, height * width), -1)
        >>> index[0, 0, 1] = torch.arange(height * width)  # token x of view 0 matches token x of view 1
        >>> match = Correspondence(index, token_grids=((height, width),) * 2)
        >>> out = model(*args, **kwargs, correspondence=match)
        >>> (out.sample.square().mean() + model.weight * model.alignment_loss).backward()
        >>> optimizer.step()

    Attributes:
        base_model: the module that was wrapped; unknown attributes of `CameoModel` are looked up there.
        alignment_heads: one `AlignmentHead` per supervised layer; trained with the model, dropped for
            inference.
        cameo_config: the settings, as saved to `cameo_config.json`.
        weight: factor for the caller's loss, `loss + model.weight * model.alignment_loss`; it is
            `cameo_config.weight`, and may be set.
        implementation, gelu, max_queries: how the loss is computed, see `cameo.alignment_loss`; `max_queries` in
            training alone, with the random numbers of `query_generator`. They may be set, and are not saved.
        check_unseen: whether the first training forwards look for attention that runs unseen beside the supervised
            call, see `cameo.checks.unseen_kernels`; it may be set, and is not saved.

    With `torch.compile` (of this module, or of the base or its blocks in place) a forward with a correspondence stays
    one compiled graph where the layers attend by SDPA, but for the first, see `cameo.checks.observed_forward`.
    Under `DistributedDataParallel` call the outer module, and read `weight`, `alignment_loss` and `token_grid` from
    this one: `accelerator.unwrap_model(outer)`, or `outer.module`. Keep `find_unused_parameters=False`, and give every
    step a correspondence (an empty one has loss 0 with a graph), since the heads get their gradient from the alignment
    loss alone.
    Under FSDP2 (`fully_shard`) call backward on the sum with the model's own loss: parameters are gathered, and
    gradients averaged, when a gradient enters at the model's output, and that of the alignment loss alone does not.
    """

    def __init__(
        self, base_model: nn.Module, config: CameoConfig, *, implementation: str = "auto", gelu: str = "exact",
        max_queries: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        config.check()
        check_head_options(config.head)
        for normalize in config.normalize_of_layers():
            check_options(normalize, config.reduction, config.softness, implementation, gelu)
        self.implementation, self.gelu = implementation, gelu
        self.max_queries = None if max_queries is None else as_integer("max_queries", max_queries, least=1)
        self.query_generator: torch.Generator | None = None
        self.base_model = base_model
        self.cameo_config = config
        self._supervised = resolve_layers(unwrap_peft(base_model), config)
        if config.backbone is not None:
            config.layouts = [layer.layout.to_dict() for layer in self._supervised]
        parameter = next(base_model.parameters(), None)
        device = parameter.device if parameter is not None else None
        self.alignment_heads = nn.ModuleList(
            AlignmentHead(layer.heads, **config.head).to(device) for layer in self._supervised
        )
        for layer, normalize in zip(self._supervised, config.normalize_of_layers(), strict=True):
            if reason := layer.layout.refusal(normalize, reduction=config.reduction):
                raise ValueError(f"layer {layer.path!r} cannot be supervised with normalize={normalize!r}: {reason}")
        if config.backbone is not None and config.inflate:  # last, so that a model that is refused stays as it was
            for layer in self._supervised:
                get_backbone(config.backbone).inflate(unwrap_peft(base_model), layer.path)
        self._alignment_loss: Tensor | None = None
        self._num_supervised: Tensor | None = None
        self._watch = HeadWatch()
        self._unseen = UnseenKernels()
        self._observer = Observer()
        self.check_unseen = True
        self._attached = True
        register(base_model, self)

    @skipped_by_compiler
    def forward(
        self, *args: Any, correspondence: Correspondence | Sequence[Correspondence] | None = None, **kwargs: Any
    ) -> Any:
        """Return exactly what the wrapped model returns; with `correspondence`, set `alignment_loss` too.

        Args:
            correspondence: matches at the token grid of the supervised layer, see `token_grid`. Several
                layers with different grids take a list, one per layer.

        Raises:
            CaptureError: if a supervised layer did not run, its queries and keys carry no gradient in training, or
                another attention runs unseen in it.
            ValueError: if the correspondence has fewer views than `num_reference_views`.
            ShapeError: if the correspondence has another token grid, batch size or number of views than the
                layer.
        """
        self._alignment_loss = self._num_supervised = None
        if correspondence is None:
            return self.base_model(*args, **kwargs)
        losses, observed = self._begin(correspondence, is_being_compiled())
        with observed:
            output = observed.run(*args, **kwargs)  # alone is compiled
        self._align(observed.captured, losses)
        return output

    @torch.compiler.disable
    def _begin(
        self, correspondence: Correspondence | Sequence[Correspondence], compiled: bool
    ) -> tuple[Sequence[LayerLoss], ObservedForward]:
        """Check what can be checked before a forward, plan its losses, and prepare to observe it."""
        matches = one_per_layer(correspondence, len(self._supervised))
        self._check_supported()
        trains = self._trains()
        if trains:
            self._watch.look(self.alignment_heads, self.base_model)
        unseen = self._unseen if trains and self.check_unseen else None
        sampled = {"max_queries": self.max_queries, "generator": self.query_generator} if trains else {}
        device = next((parameter.device for parameter in self.parameters()), matches[0].device)
        losses = plan_losses(self._supervised, self.alignment_heads, matches, self.cameo_config, device, **sampled)
        return losses, self._observer.observe(
            self.base_model, unwrap_peft(self.base_model), self._supervised, matches, unseen, compiled
        )

    @torch.compiler.disable
    def _align(self, captured: AttentionCapture, losses: Sequence[LayerLoss]) -> None:
        """Compute the alignment loss of an observed forward."""
        options: dict[str, Any] = {"implementation": self.implementation, "gelu": self.gelu}
        found = []
        for planned in losses:
            seen = captured.take(planned.layer.path)
            if self._trains():
                seen.check_graph(planned.layer.path)
            found.append(planned.compute(seen, softness=self.cameo_config.softness, **options))
        self._alignment_loss = torch.stack([loss for loss, _ in found]).mean()
        self._num_supervised = torch.stack([count for _, count in found]).sum()
        if self._trains():
            self._watch.follow(self._alignment_loss)

    @property
    def weight(self) -> float:
        """Factor of the alignment loss in the caller's loss: `cameo_config.weight`, the one that is saved.

        Raises:
            ValueError: on setting a value that is not a finite number of at least 0.
        """
        return self.cameo_config.weight

    @weight.setter
    def weight(self, value: float) -> None:
        self.cameo_config.weight = finite("weight", value, "factor")

    @property
    def alignment_loss(self) -> Tensor:
        """The alignment loss of the latest forward with a correspondence, mean over the layers, unweighted.

        Raises:
            NoLossError: if the latest forward had none; a RuntimeError, and an AttributeError for `hasattr`.
        """
        if self._alignment_loss is None:
            raise NoLossError(NO_LOSS)
        return self._alignment_loss

    @property
    def num_supervised(self) -> int:
        """Number of matches behind `alignment_loss`; with 0 of them the loss is exactly 0."""
        return 0 if self._num_supervised is None else int(self._num_supervised)

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        """All layers of the model, in execution order, among which the supervised ones were chosen."""
        if self.cameo_config.backbone is None:
            return list(self._supervised)
        adapter, config = get_backbone(self.cameo_config.backbone), self.cameo_config
        return adapter.layers_for(unwrap_peft(self.base_model), inflate=config.inflate, own_view=config.own_view)

    @property
    def supervised_layers(self) -> list[AttentionLayer]:
        """The layers that carry the alignment loss."""
        return list(self._supervised)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return `(h, w)`, the token grid of the supervised layer for images of `height` x `width` pixels.

        Raises:
            ValueError: if the stride is not known, several layers with different grids are supervised (then ask
                each of `supervised_layers`), or the views of a layer have different grids (then see `token_grids`).
        """
        if any(layer.reference_size is not None for layer in self._supervised):
            raise ValueError(
                "token_grid: the reference view has a token grid of its own; use "
                "token_grid=model.token_grids(height, width, num_views)"
            )
        return self.token_grids(height, width, 1)[0]

    def token_grids(self, height: int, width: int, num_views: int) -> TokenGrids:
        """Return the token grid `(h, w)` of each view in the supervised layer, in correspondence order.

        Where the reference view is encoded at a size of its own (Zero123++: 512 px), so is its grid; `height` and
        `width` are the pixels of the other views.

        Raises:
            ValueError: if the stride is not known, or several layers with different grids are supervised (then ask
                each of `supervised_layers`).
        """
        grids = {layer.token_grids(height, width, num_views) for layer in self._supervised}
        if len(grids) > 1:
            raise ValueError(
                "token_grid: the supervised layers have different grids, with "
                + ", ".join(f"{layer.path}: {layer.stride}" for layer in self._supervised)
                + " pixels per token; build one Correspondence per layer"
            )
        return grids.pop()

    def check_layout(
        self,
        inputs: Callable[[Tensor], tuple[Sequence[Any], Mapping[str, Any]]] | None = None,
        images: Tensor | None = None,
        *,
        token_grids: TokenGrids | None = None,
    ) -> LayoutCheck:
        """Check that the layouts describe the tokens of the supervised layers; takes about 14 forwards.

        An attention cannot know which tokens it is given: cells that are packed, text at the other end, views in
        another order or a transposed grid raise no error, and the loss supervises other tokens. Here one cell of one
        view is changed at a time, and the queries and keys that move most are compared with the layout.

        Example:
            >>> from cameo import wrap
            >>> class Joint(nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.attention, self.heads = nn.Identity(), 1
            ...     def forward(self, x):
            ...         return nn.functional.scaled_dot_product_attention(x, x, x)
            >>> model = wrap(nn.Sequential(Joint()), layer="0", layout="b (v h w)")
            >>> def inputs(latents):  # [B, V, C, h, w] -> [B, 1, v w h, C]: columns where rows should stand
            ...     return (latents.permute(0, 1, 4, 3, 2).reshape(len(latents), 1, -1, latents.shape[2]),), {}
            >>> check = model.check_layout(inputs, torch.randn(1, 2, 8, 3, 4))
            >>> check.fits, check.layers[0].mistake
            (False, 'transposed grid')

        Args:
            inputs: returns `(args, kwargs)` of a forward for `[B, V, C, H, W]`, pixels or latents, views in the order
                of the correspondence. What brings images into the model's form (packing, tiling, views in the batch)
                belongs into it, and it must return the same for the same images: make generators in it, with a fixed
                seed. None: the answer is "cannot tell".
            images: what it is given; noise will do where the model takes latents.
            token_grids: token grid `(h, w)` of each view, where the views have different ones and the stride is not
                known.

        Returns:
            `fits` (True, False, or None for "cannot tell"), per layer the mistake and per cell what was expected and
            found; to be printed, or drawn by its `draw(path)`.

        Raises:
            ShapeError: `images` has another shape, or no token grid makes the layout fit the calls.
        """
        from cameo.checks.moved_tokens import check_layouts

        core = unwrap_peft(self.base_model)
        return check_layouts(self.base_model, core, self._supervised, inputs, images, token_grids)

    @old_keywords
    def capture(self, layers: Sequence[AttentionLayer] | None = None) -> AttentionCapture:
        """Observe queries and keys of `layers` (default: the supervised ones) inside a `with` block."""
        return AttentionCapture(unwrap_peft(self.base_model), self._supervised if layers is None else layers)

    @staticmethod
    @old_keywords
    def split(
        layer: AttentionLayer, seen: CapturedAttention, match: Correspondence
    ) -> tuple[Tensor, Tensor, Correspondence]:
        """Split a captured call by sample and view: query and key `[B, K, V, N, D]`, and the matches there.

        Raises:
            CaptureError: a mask hides a part of a view from some queries, so that their softmax is over other tokens.
            ShapeError: the call has another shape than the layout and the matches.
        """
        query, key, local, visible = split_call(layer, seen, match, "per_view")
        if visible is not None:
            raise CaptureError(f"layer {layer.path!r} hides a part of a view from some queries, which cannot be probed")
        return query, key, local

    def unwrap(self) -> nn.Module:
        """Return the very module that was wrapped, as it was; the alignment heads stay with this object.

        A layer that `inflate=True` joined stays joined, since the trained weights need it.

        Raises:
            RuntimeError: if it was unwrapped already.
        """
        if not self._attached:
            raise RuntimeError("this model was unwrapped already; use the module that unwrap() returned")
        self._attached = False
        forget(self.base_model)
        self._alignment_loss = self._num_supervised = None
        return self.base_model

    @old_keywords
    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Write weights and `cameo_config.json` to a folder; see `cameo.hub.save_pretrained`."""
        from cameo.hub import save_pretrained

        return save_pretrained(self, folder, **options)

    @old_keywords
    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Check, then upload to the Hugging Face Hub; see `cameo.hub.push_to_hub`."""
        from cameo.hub import push_to_hub

        return push_to_hub(self, repo_id, **options)

    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _check_supported(self) -> None:
        if self.cameo_config.backbone is None or not self._trains():
            return
        if reason := get_backbone(self.cameo_config.backbone).unsupported(unwrap_peft(self.base_model)):
            raise CaptureError(reason)

    def __getattr__(self, name: str) -> Any:
        if name == "alignment_loss":  # Python asks here once the property has raised an AttributeError
            raise NoLossError(NO_LOSS)
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_model")
            if base is None or isinstance(getattr(type(self), name, None), property):
                raise
            return getattr(base, name)

    def __getstate__(self) -> dict[str, Any]:
        # A computed loss is part of a graph and cannot be copied; an average (EMA) copies the model during training.
        return {**self.__dict__, "_alignment_loss": None, "_num_supervised": None, "query_generator": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A model that was pickled by an earlier release has no watch, and a weight beside that of `cameo_config`.
        now = {"_watch": HeadWatch(), "_unseen": UnseenKernels(), "_observer": Observer(), "check_unseen": True}
        now |= {"max_queries": None, "query_generator": None}
        super().__setstate__({**now, **state})
        if "weight" in state:
            self.weight = vars(self).pop("weight")
        if self._attached:
            register(self.base_model, self)


def wrapper_of(module: nn.Module) -> CameoModel | None:
    """Return the `CameoModel` that wraps this base module, if one does."""
    wrapper = find_wrapper(module)
    assert wrapper is None or isinstance(wrapper, CameoModel)
    return wrapper


def attach(model: nn.Module, config: CameoConfig, **options: Any) -> CameoModel:
    """Wrap `model` with the settings of a saved `CameoConfig`; `wrap` and `from_pretrained` both end here."""
    check_plain(model, CameoModel)
    return CameoModel(model, config, **options)
