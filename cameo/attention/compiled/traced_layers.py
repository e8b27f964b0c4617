"""See the kernel calls of chosen layers in code that `torch.compile` compiles: as further outputs of its graphs.

During a `with` block each layer has a class derived from its own, whose `forward` notes the arguments of
`F.scaled_dot_product_attention`. Compiled code is chosen by the class, among others, so the graph with these outputs is
used within the block and the one without them elsewhere. Neither a hook nor an attribute remains after the block, and
no `forward` is assigned, which a copy would call with the weights of the original.

Axes: A rows of the attention batch, K heads, L query tokens, M key tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cameo.errors import CaptureError

__all__ = ["FusedArguments", "TracedLayers", "explain_no_tracing"]

FusedArguments = tuple[Tensor, Tensor, Tensor | None, bool, float | None]
Done = Callable[[str, list[FusedArguments]], None]

# Lets the graph of a checkpointed block hand out the noted tensors; they are not noted again when it is recomputed.
CHECKPOINT_OPTION = "skip_fwd_side_effects_in_bwd_under_checkpoint"


class TracedLayers:
    """Note the calls of `F.scaled_dot_product_attention` in some layers, in compiled code too.

    Example:
        >>> import torch
        >>> class Attention(nn.Module):
        ...     def forward(self, x):
        ...         return F.scaled_dot_product_attention(x, x, x)
        >>> model = torch.compile(nn.Sequential(Attention()), backend="eager", fullgraph=True)
        >>> with TracedLayers(model._orig_mod, ["0"], lambda path, calls: print(path, calls[0][0].shape)):
        ...     _ = model(torch.zeros(1, 2, 12, 4))
        0 torch.Size([1, 2, 12, 4])

    Args:
        model: the module in which the paths are looked up.
        paths: dotted module paths of the layers.
        done: receives, at the end of the block, the calls of the latest run of each layer, `done(path, calls)`, each
            with its query, key, mask, `is_causal` and `scale`, the arguments of `fused_call` in
            `cameo.attention.kernels.known`.

    Raises:
        CaptureError: a layer is in two such blocks at a time, as in two threads.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], done: Done) -> None:
        self._layers: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
        self._done = done
        self._cleanup = ExitStack()
        self._ran: set[str] = set()

    def __enter__(self) -> TracedLayers:
        import torch._dynamo.config

        self._ran.clear()
        with ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch({CHECKPOINT_OPTION: True}))
            for path, layer in self._layers.items():
                if isinstance(layer, _Traced):
                    raise CaptureError(
                        f"layer {path!r} is observed by another forward of the same model at this moment; run one "
                        "forward with a correspondence after the other"
                    )
                plain: Any = type(layer)
                stack.callback(_as_before, layer, plain)
                layer._noted = _Noted()
                layer.__class__ = _traced(plain)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        noted = {path: layer._noted for path, layer in self._layers.items()}
        self._cleanup.close()
        if kind is not None:
            return
        for path, found in noted.items():
            assert isinstance(found, _Noted)
            if found.calls is not None:
                self._ran.add(path)
                self._done(path, list(found.calls))

    def explain_no_call(self, path: str) -> str:
        """Say why no kernel call of a layer was seen."""
        cause = "called F.scaled_dot_product_attention no more" if path in self._ran else "did not run any more"
        return (
            f"layer {path!r} {cause}, in compiled code; in the first forward with a correspondence, which was eager, "
            "it did. Likely cause: another attention processor or backend was set since. Cure: set it before the first "
            'forward, or go back, in diffusers by model.set_attention_backend("native")'
        )


def explain_no_tracing(layer: nn.Module) -> str:
    """Say why a layer cannot be seen in compiled code, whatever it calls; "" if it can."""
    import torch._dynamo.config

    if not hasattr(torch._dynamo.config, CHECKPOINT_OPTION):
        return f"torch {torch.__version__} cannot hand its queries and keys out of a compiled graph; 2.14 can"
    if "forward" in vars(layer):
        return "the forward of its module was replaced by another function"
    return ""


class _Noted:
    """What a layer hands out: the arguments of its calls in its latest run, None before the first."""

    calls: tuple[FusedArguments, ...] | None = None


class _Note(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[FusedArguments] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._keep(*args, **kwargs)
        return func(*args, **kwargs)

    def _keep(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> None:
        self.calls.append((query, key, attn_mask, is_causal, scale))


class _Traced(nn.Module):
    """Base of the classes that layers have within the block, before their own."""

    _noted: _Noted

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        note = _Note()
        with note:  # the tracer does not know what `as` would return
            output = super().forward(*args, **kwargs)
        self._noted.calls = tuple(note.calls)
        return output


@cache
def _traced(plain: Any) -> type[nn.Module]:
    return type(plain.__name__, (_Traced, plain), {"__module__": plain.__module__, "__qualname__": plain.__qualname__})


def _as_before(layer: Any, plain: type[nn.Module]) -> None:
    layer.__class__ = plain
    del layer._noted
