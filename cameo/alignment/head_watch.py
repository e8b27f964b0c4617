"""Warn of an alignment head that never trains, because the optimizer was built before `cameo.wrap` and lacks it.

The watch compares version counters, which every in-place change increments, so that no value is read and the host waits
for no GPU; the values are compared once, before the warning. The watch ends at the first change of the head, or after
the warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cameo.alignment.head import is_sharded

__all__ = ["HeadWatch"]

# Number of optimizer steps of the model without one of the head after which the warning comes. Gradient accumulation
# does not matter, since its micro-steps change no parameter. Two optimizers that step in turn stay below this number.
PATIENCE = 10
# Number of forwards after which the watch ends in any case: some optimizers change parameters without incrementing
# their counters, so that no step is ever seen.
MOST_FORWARDS = 1000
CURE = (
    f"the alignment head did not change in {PATIENCE} optimizer steps in which the model did, although the alignment "
    "loss gave it gradients. Likely cause: the optimizer was built before cameo.wrap, or from the parameters of the "
    "model alone. Cure: build it from wrapped.parameters() after cameo.wrap, or call "
    'optimizer.add_param_group({"params": wrapped.alignment_heads.parameters()}); a head that should not train: '
    "wrapped.alignment_heads.requires_grad_(False)"
)


class HeadWatch:
    """Compares, at every training forward with a correspondence, what the optimizer has changed since the last one.

    Example:
        >>> model, head = nn.Linear(2, 2), nn.Linear(2, 1)
        >>> optimizer, watch = torch.optim.SGD(model.parameters(), lr=0.1), HeadWatch()
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     for _ in range(PATIENCE + 1):
        ...         watch.look(head, model)
        ...         loss = head(model(torch.ones(2))).sum()
        ...         watch.follow(loss)
        ...         loss.backward()
        ...         optimizer.step()
        >>> [str(warning.message)[:34] for warning in caught]
        ['the alignment head did not change ']
    """

    def __init__(self) -> None:
        self.ended = False
        self._head: list[Tensor] = []
        self._start: list[Tensor] = []
        self._versions = (0, 0)
        self._gradient_came = False
        self._steps = 0
        self._forwards = 0

    def look(self, head: nn.Module, model: nn.Module) -> None:
        """Count a step of the model without one of the head, and warn at the `PATIENCE`-th."""
        if self.ended:
            return
        trained: list[Tensor] = [parameter for parameter in head.parameters() if parameter.requires_grad]
        if not trained:
            return
        rest: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._forwards += 1
        if self._forwards > MOST_FORWARDS or any(map(is_sharded, (*trained, *rest))):
            self.end()  # FSDP gathers and frees parameters, so their counters say nothing about steps
            return
        versions = _versions(trained), _versions(rest)
        if list(map(id, trained)) != list(map(id, self._head)):
            self._head, self._start = trained, [parameter.detach().clone() for parameter in trained]
            self._steps = 0
        elif versions[0] != self._versions[0]:
            self.end()
            return
        elif versions[1] != self._versions[1] and self._gradient_came:
            self._steps += 1
        self._versions, self._gradient_came = versions, False
        if self._steps >= PATIENCE:
            if all(map(torch.equal, self._start, trained)):
                warnings.warn(CURE, stacklevel=2)
            self.end()

    def follow(self, loss: Tensor) -> None:
        """Note when a gradient reaches the alignment loss: without one, no optimizer could train the head."""
        if not self.ended and self._head and loss.requires_grad:
            loss.register_hook(self._note_gradient)

    def end(self) -> None:
        """Stop watching, and release all tensors."""
        self.ended, self._head, self._start = True, [], []

    def _note_gradient(self, gradient: Tensor) -> None:
        self._gradient_came = True

    def __getstate__(self) -> dict[str, object]:
        return {"ended": self.ended}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]
        self.ended = bool(state["ended"])


def _versions(parameters: Iterable[Tensor]) -> int:
    return sum(parameter._version for parameter in parameters)
