"""The alignment head: joins the attention logits of the heads into the logits that are supervised.

Axes: K heads. The head exists in training only.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cameo.choices import HEAD_KINDS
from cameo.errors import ShapeError, as_integer, unknown_name

__all__ = ["AlignmentHead", "check_head_options", "is_sharded"]

DEEPEST, MOST_PARAMETERS = 64, 1 << 24


class AlignmentHead(nn.Module):
    """Joins the attention logits of K heads into the logits that are supervised; exists in training only.

    Example:
        >>> head = AlignmentHead(num_heads=8)
        >>> head(torch.randn(8, 10, 64)).shape          # 10 query tokens, 64 keys
        torch.Size([1, 10, 64])

    `kind="mlp"` is the head of the paper: Linear(K, expansion * K), exact GELU, Linear(expansion * K, 1) across the
    heads. `depth` counts the hidden layers; `depth=0` is one linear map. The last layer has no bias: it would
    shift all logits of a query alike, which the softmax ignores, so its gradient is always zero.
    `kind="mean"` averages the heads. `kind="none"` keeps every head and the loss is averaged over them.

    Args:
        num_heads: K, heads of the supervised layer.
        kind: "mlp", "mean" or "none".
        depth: number of hidden layers of the "mlp", 0 or more; the other kinds have none.
        expansion: width of the hidden layers in multiples of K, 1 or more.

    Raises:
        ValueError: the kind is unknown, a number is out of range, or the MLP is far larger than is of use: deeper than
            64 layers, or of more than 16,777,216 parameters (64 MiB), each of which is applied to every pair of
            tokens. A file that is loaded may state these numbers.

    Source: arXiv 2512.03045, section on the alignment loss.
    """

    def __init__(self, num_heads: int, kind: str = "mlp", depth: int = 1, expansion: int = 4) -> None:
        super().__init__()
        if kind not in HEAD_KINDS:
            raise unknown_name("head kind", kind, HEAD_KINDS)
        num_heads, depth = as_integer("num_heads", num_heads, least=1), as_integer("depth", depth, least=0)
        expansion = as_integer("expansion", expansion, least=1)
        if kind == "mlp":
            _check_size(num_heads, depth, expansion)
        self.num_heads, self.kind, self.depth, self.expansion = num_heads, kind, depth, expansion
        self.hidden = nn.ModuleList()
        self.output: nn.Linear | None = None
        if kind == "mlp":
            widths = [num_heads] + [expansion * num_heads] * depth
            self.hidden.extend(nn.Linear(*pair) for pair in itertools.pairwise(widths))
            self.output = nn.Linear(widths[-1], 1, bias=False)

    def forward(self, logits: Tensor) -> Tensor:
        """Map scaled logits [K, ...] to [1, ...], for `kind="none"` to [K, ...]; computes in their dtype."""
        if logits.ndim == 0 or logits.shape[0] != self.num_heads:
            raise ShapeError(
                "logits",
                expected=f"[{self.num_heads}, ...] with the heads leading",
                got=logits.shape,
                cure="Use AlignmentHead(num_heads=...) with the heads of the supervised layer",
            )
        if self.kind == "none":
            return logits
        if self.output is None:
            return logits.mean(dim=0, keepdim=True)
        # The heads stay the leading axis, so that the layers are plain matrix products without a permuted copy.
        features = logits.reshape(self.num_heads, -1)
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            weight, bias = layer.weight.to(logits.dtype), layer.bias.to(logits.dtype)
            features = F.gelu(torch.addmm(bias[:, None], weight, features))
        return (self.output.weight.to(logits.dtype) @ features).reshape(1, *logits.shape[1:])

    def weights(self) -> list[Tensor]:
        """Return its parameters: weight and bias of each hidden layer, then the last weight; none without an MLP."""
        layers = [] if self.output is None else [*self.hidden, self.output]
        parameters = [part for layer in layers for part in (layer.weight, layer.bias) if part is not None]
        # Sharded parameters (FSDP) are gathered by the module that holds them or, if that did not run, here.
        return [_gather(weight) if is_sharded(weight) else weight for weight in parameters]

    def extra_repr(self) -> str:
        """Show the settings in `print(model)`."""
        names = ("num_heads", "kind", "depth", "expansion")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _check_size(num_heads: int, depth: int, expansion: int) -> None:
    """Refuse an MLP that is too large, before it takes memory."""
    if depth > DEEPEST:
        raise ValueError(f"depth: expected at most {DEEPEST} hidden layers, got {depth}")
    width = expansion * num_heads
    parameters = (num_heads + 1) * width + max(depth - 1, 0) * (width + 1) * width + width if depth else num_heads
    if parameters > MOST_PARAMETERS:
        raise ValueError(
            f"expansion: expected a head of at most {MOST_PARAMETERS:,} parameters, got {parameters:,} with "
            f"num_heads={num_heads}, depth={depth} and expansion={expansion}; give smaller numbers"
        )


def check_head_options(options: Mapping[str, object]) -> None:
    """Raise `ValueError` for an option that `AlignmentHead` does not have, naming the nearest.

    Example:
        >>> check_head_options({"kind": "mlp", "depth": 2})
    """
    known = [name for name in inspect.signature(AlignmentHead).parameters if name != "num_heads"]
    for name in options:
        if name not in known:
            raise unknown_name("head option", name, known)


def is_sharded(weight: Tensor) -> bool:
    """Tell whether FSDP has sharded this parameter, one part on each process."""
    return hasattr(weight, "full_tensor")


def _gather(weight: Tensor) -> Tensor:
    """Return the whole tensor of a sharded parameter; its gradient is the mean over the processes, as FSDP's is."""
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(weight, DTensor)
    processes = weight.device_mesh.size()
    whole: Tensor = weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / processes)
    return whole
