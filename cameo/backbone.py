"""What a backbone adapter provides, and the registry that finds adapters by name.

An adapter is one class and one registration: the entry-point group `cameo.backbones` of an installed package, or
`register_backbone` in a script. The core never imports adapters by itself.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from cameo.attention.capture import AttentionLayer
from cameo.attention.kernel_inputs import KernelInputs
from cameo.attention.layout import TokenLayout
from cameo.config import CameoConfig
from cameo.errors import as_integer, unknown_name
from cameo.renamed import METHODS, old_attributes, old_functions, warn_renamed

__all__ = [
    "Backbone",
    "Release",
    "backbones",
    "find_layer",
    "get_backbone",
    "register_backbone",
    "resolve_layers",
    "unwrap_peft",
]

ENTRY_POINT_GROUP = "cameo.backbones"
_registry: dict[str, type[Backbone]] = {}
if not TYPE_CHECKING:
    __getattr__ = old_functions(__name__)


@old_attributes
@dataclass(frozen=True)
class Release:
    """Published weights, as a backbone's `released` lists them by Hub id.

    Example:
        >>> Release("openrail++", revision="bb2154823665391b4fb29b0b9cf82a198964ee05").license
        'openrail++'

    Attributes:
        license: identifier of the Hub, or the front-matter entries `license`, `license_name` and `license_link` for a
            license that has no identifier.
        revision: commit that is loaded where the caller names none; None is the newest.
        holds: what the repository holds, for people who read the table.
    """

    license: str | Mapping[str, str]
    revision: str | None = None
    holds: str = ""


class Backbone:
    """Base class of the adapters, which have two separate tasks.

    Example:
        >>> from cameo import TokenLayout
        >>> class Joint(Backbone):
        ...     def recognizes(self, model):
        ...         return hasattr(model, "joint_attention")
        ...     def attention_layers(self, model):
        ...         return [AttentionLayer(0, "joint_attention", heads=8, layout=TokenLayout("b (v h w)"))]
        ...     def default_layer(self, model):
        ...         return 0

    *Attach*: recognize a model by its structure, list its cross-view attention layers, give their token
    layout. *Train and sample*: build the backbone's pipeline from a preset or a released checkpoint. An
    adapter that only attaches leaves the second part out; its methods then raise `NotImplementedError` with
    the backbone's name.

    Attributes:
        name: what users write as `backbone=`; set by the registration.
        presets: values of `build` for models with fresh weights, by the preset's name.
        preset_license: license of a model that was trained from a preset; None leaves it to the user.
        released: published weights that `load` reads, by Hub id. `license` and `revision` answer from this table.
        pipeline_tag: task on the Hub, for the model card.
    """

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    preset_license: ClassVar[str | None] = None
    released: ClassVar[Mapping[str, Release]] = {}
    pipeline_tag: ClassVar[str] = "image-to-3d"

    def __init_subclass__(cls, **options: Any) -> None:
        """Let a method that overrides an old name override the new one, and keep the old names callable."""
        super().__init_subclass__(**options)
        for old, new in METHODS.items():
            overriding = vars(next(kind for kind in cls.__mro__ if {old, new} & vars(kind).keys()))
            if new not in overriding:
                warn_renamed(f"{cls.__qualname__}.{old}", new, stacklevel=2)
                setattr(cls, new, overriding[old])
            elif old not in overriding:
                setattr(cls, old, _under_old_name(old, overriding[new]))

    def recognizes(self, model: nn.Module) -> bool:
        """Tell whether `model` has the structure this adapter knows."""
        raise NotImplementedError(f"backbone {self.name!r} does not say which models it recognizes")

    def explain_mismatch(self, model: nn.Module) -> str:
        """Say what is missing in a model that is not recognized, and the cure."""
        return f"{type(model).__name__} does not have the structure of backbone {self.name!r}"

    def attention_layers(self, model: nn.Module) -> list[AttentionLayer]:
        """List the cross-view attention layers of `model` in execution order."""
        raise NotImplementedError(f"backbone {self.name!r} does not list its layers")

    def default_layer(self, model: nn.Module) -> int:
        """Return the index of the layer supervised when the caller names none."""
        raise NotImplementedError(f"backbone {self.name!r} has no default layer; pass layer=")

    def inflatable_layers(self, model: nn.Module) -> list[AttentionLayer]:
        """List self-attention layers that see one view each and that `inflate` can join, in execution order.

        Their layouts are those of the joined layers. `default_layer` counts in this list as well.
        """
        return []

    def own_view_layers(self, model: nn.Module) -> list[AttentionLayer]:
        """List self-attention layers that can be supervised within each view, since it carries the reference view.

        For models that concatenate the reference with the input channels of every view: their layouts have
        `own_view_shows`, and nothing in the model changes. `default_layer` counts in this list as well.
        """
        return []

    def layers_for(self, model: nn.Module, *, inflate: bool = False, own_view: bool = False) -> list[AttentionLayer]:
        """List the layers of one of the three ways to supervise; the options are those of `cameo.wrap`."""
        if own_view:
            return self.own_view_layers(model)
        return self.inflatable_layers(model) if inflate else self.attention_layers(model)

    def inflate(self, model: nn.Module, path: str) -> None:
        """Let the layer at `path`, one of `inflatable_layers`, attend across views, in place; its weights stay.

        A second call for the same layer changes nothing.
        """
        raise NotImplementedError(f"backbone {self.name!r} has no layers to inflate")

    def position(self, model: nn.Module) -> str:
        """Name the map of positions that is added to the features of `model` beside its weights; "none" by default.

        A fixed map is no weight, so `cameo.save_pretrained` keeps its name, and `cameo.from_pretrained` hands the name
        to `set_position`.
        """
        return "none"

    def set_position(self, model: nn.Module, position: str) -> None:
        """Let `model` add the map of positions with this name, or none, in place; its weights stay.

        Raises:
            ValueError: for a name that the backbone does not know.
        """
        if position != "none":
            raise ValueError(
                f"position: backbone {self.name!r} has no maps of positions; expected 'none', got {position!r}"
            )

    def former_layout(self, layer: AttentionLayer) -> TokenLayout:
        """Return the layout with which a layer was supervised by releases that did not record it in what they saved."""
        return layer.layout

    def unsupported(self, model: nn.Module) -> str | None:
        """Say why `model`, as it is, cannot be trained with an alignment loss, and the cure; None if it can.

        Asked before every training forward with a correspondence.
        """
        return None

    def example_inputs(self, model: nn.Module, *, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return small random `(args, kwargs)` of one forward of `model`, the same for the same seed."""
        raise NotImplementedError(f"backbone {self.name!r} has no example inputs")

    def build(self, preset: str, **options: Any) -> Any:
        """Build the backbone's pipeline with fresh weights from a named preset."""
        raise NotImplementedError(f"backbone {self.name!r} only attaches; it has no presets to build")

    def load(self, name_or_path: str, *, revision: str | None = None, **options: Any) -> Any:
        """Load the backbone's pipeline from a Hub id or a local folder.

        `cameo.from_pretrained` passes `cache_dir` and `local_files_only` on where its caller gave them; they mean what
        they mean to diffusers' `from_pretrained`.
        """
        raise NotImplementedError(f"backbone {self.name!r} only attaches; load the model yourself")

    def outline(self, name_or_path: str, *, revision: str | None = None, **options: Any) -> Any:
        """Build the pipeline that `load` would return without its weights: every parameter is on the meta device.

        Nothing is downloaded: what is built comes from the configs of a local folder, or from what the adapter knows
        of a release.
        """
        raise NotImplementedError(f"backbone {self.name!r} does not say how to build a pipeline without its weights")

    def license(self, name_or_path: str | None) -> str | Mapping[str, str] | None:
        """Return the license of a preset, of bundled weights or of those in `released`, None for others.

        An identifier of the Hub, or front-matter entries `license`, `license_name`, `license_link`.
        """
        name = name_or_path or ""
        if name.startswith(("preset:", "bundled:")):  # what is bundled was trained from a preset
            return self.preset_license
        return self.released[name].license if name in self.released else None

    def revision(self, name_or_path: str | None) -> str | None:
        """Return the commit at which `load` reads weights in `released` when the caller names none."""
        name = name_or_path or ""
        return self.released[name].revision if name in self.released else None


def _under_old_name(old: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return `method` under its old name, with a warning at each call."""

    @functools.wraps(method)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        warn_renamed(f"Backbone.{old}", method.__name__, stacklevel=2)
        return method(*args, **kwargs)

    return renamed


for _old, _new in METHODS.items():
    setattr(Backbone, _old, _under_old_name(_old, vars(Backbone)[_new]))


def register_backbone(name: str) -> Callable[[type[Backbone]], type[Backbone]]:
    """Class decorator that registers an adapter under `name`, for scripts without an entry point.

    Example:
        >>> @register_backbone("my_model")
        ... class MyModel(Backbone):
        ...     pass
        >>> "my_model" in backbones()
        True

    Raises:
        ValueError: if another class, or an installed package, already has the name.
        TypeError: if the class is not a `Backbone`.
    """

    def register(adapter: type[Backbone]) -> type[Backbone]:
        if not (isinstance(adapter, type) and issubclass(adapter, Backbone)):
            raise TypeError(f"backbone {name!r}: expected a subclass of cameo.backbone.Backbone, got {adapter!r}")
        known = _registry.get(name)
        others = (
            [f"{known.__module__}:{known.__qualname__}"]
            if known is not None
            else [point.value for point in entry_points(group=ENTRY_POINT_GROUP, name=name)]
        )
        # Running the same definition again, as in a notebook, is fine.
        if others and not any(_names(other, adapter) for other in others):
            raise ValueError(f"backbone {name!r} is already registered by {others[0]}; choose another name")
        adapter.name = name
        _registry[name] = adapter
        return adapter

    return register


def _names(entry_point: str, adapter: type[Backbone]) -> bool:
    """Tell whether `module:Class` names this class, in its own module or in a package around it that exports it."""
    module, _, name = entry_point.partition(":")
    return name == adapter.__qualname__ and f"{adapter.__module__}.".startswith(f"{module}.")


def backbones() -> list[str]:
    """List the names of all backbones that are registered or installed.

    Example:
        >>> "cat3d" in backbones()
        True
    """
    return sorted({*_registry, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def get_backbone(name: str) -> Backbone:
    """Return the adapter registered under `name`.

    Example:
        >>> get_backbone("cat3d").name
        'cat3d'

    Raises:
        ValueError: for an unknown name; lists the known ones and the nearest.
        ImportError: if the package that provides it is broken.
    """
    if name not in _registry:
        points = entry_points(group=ENTRY_POINT_GROUP, name=name)
        if not points:
            raise unknown_name("backbone", name, backbones())
        if len(points) > 1:
            warnings.warn(f"several packages provide the backbone {name!r}: {points}; using the first", stacklevel=2)
        point = next(iter(points))
        try:
            adapter = point.load()
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"backbone {name!r}: its entry point {point.value!r} cannot be loaded: {error}"
            ) from error
        register_backbone(name)(adapter)
    return _registry[name]()


def unwrap_peft(model: nn.Module) -> nn.Module:
    """Return the model inside PEFT's `PeftModel`; any other module is returned as it is."""
    get_base_model = getattr(model, "get_base_model", None)
    unwrapped = get_base_model() if callable(get_base_model) else model
    return unwrapped if isinstance(unwrapped, nn.Module) else model


def find_layer(layers: Sequence[AttentionLayer], wanted: int | str) -> AttentionLayer:
    """Return the layer with an index, counted in execution order, or with a dotted module path.

    Raises:
        ValueError: if there is none, or the layer cannot be supervised; says why.
    """
    by_path = {layer.path: layer for layer in layers}
    index: int | None = None
    with contextlib.suppress(ValueError):
        index = as_integer("layer", wanted)
    if index is not None:
        if not 0 <= index < len(layers):
            raise ValueError(
                f"layer {index} does not exist: this model has {len(layers)} cross-view attention layers, "
                f"0 to {len(layers) - 1} in execution order: "
                + ", ".join(f"{layer.index} {layer.path}" for layer in layers)
            )
        found = layers[index]
    elif isinstance(wanted, str) and wanted in by_path:
        found = by_path[wanted]
    else:
        raise unknown_name("layer", wanted, by_path)
    if found.unsupported:
        raise ValueError(f"layer {wanted!r} ({found.path}) cannot be supervised: {found.unsupported}")
    return found


def resolve_layers(core: nn.Module, config: CameoConfig) -> list[AttentionLayer]:
    """Find the layers of a model that a configuration names.

    Raises:
        ValueError: if a layer does not exist or cannot be supervised, or its number of heads is not known.
    """
    if config.backbone is not None:
        adapter = get_backbone(config.backbone)
        all_layers = adapter.layers_for(core, inflate=config.inflate, own_view=config.own_view)
        layers = [find_layer(all_layers, path) for path in config.layers]
        if config.layouts is None:
            return [replace(layer, layout=adapter.former_layout(layer)) for layer in layers]
        recorded = zip(layers, config.layouts, strict=True)
        return [replace(layer, layout=_token_layout(layout)) for layer, layout in recorded]
    kernel_inputs = None if config.kernel_inputs is None else KernelInputs.from_mapping(config.kernel_inputs)
    layers = []
    for index, (path, layout) in enumerate(zip(config.layers, _described_layouts(config), strict=True)):
        module = core.get_submodule(path)
        counts = [getattr(module, name, None) for name in ("heads", "num_heads")]
        of_module = next((count for count in counts if isinstance(count, int)), None)
        heads = of_module if config.heads is None else config.heads
        if heads is None:
            raise ValueError(f"layer {path!r}: the number of attention heads is not known; pass heads= to cameo.wrap")
        if of_module is not None and heads != of_module:
            raise ValueError(f"heads: layer {path!r} has {of_module} attention heads, got {heads}; leave heads= out")
        if kernel_inputs is not None:
            kernel_inputs.check(path, module)
        layers.append(
            AttentionLayer(
                index,
                path,
                heads,
                layout,
                stride=config.stride,
                kernel_call=config.kernel_call,
                kernel_inputs=kernel_inputs,
            )
        )
    return layers


def _described_layouts(config: CameoConfig) -> list[TokenLayout]:
    """The layout of each layer of a model without an adapter."""
    given = config.layouts if config.layout is None else [config.layout] * len(config.layers)
    assert given is not None  # which `CameoConfig.check` made sure of
    return [_token_layout(layout) for layout in given]


def _token_layout(saved: Mapping[str, Any]) -> TokenLayout:
    try:
        return TokenLayout(**saved)
    except TypeError as error:
        raise ValueError(f"layouts: expected the keyword arguments of TokenLayout ({error}), got {saved}") from error
