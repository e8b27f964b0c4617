"""Notice an alignment head that no optimizer trains."""

from __future__ import annotations

import warnings

from torch import nn

__all__ = ["HeadWatch"]

# Optimizer steps that change the model and leave the head as it was, before the warning.
STEPS = 3


class HeadWatch:
    """Warn once if the parameters of a model change from step to step and those of its alignment heads never do.

    That is so where the optimizer was built before `cameo.wrap`. Torch counts the in-place changes of each tensor
    (`Tensor._version`), so that nothing is copied and a GPU is not waited for. Steps of gradient accumulation change
    neither and do not count.

    Example:
        >>> import torch
        >>> base, heads, watch = nn.Linear(2, 2), nn.Linear(2, 1), HeadWatch()
        >>> optimizer = torch.optim.SGD(base.parameters(), lr=0.1)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     for _ in range(4):
        ...         watch.look(base, heads)
        ...         base(torch.ones(1, 2)).sum().backward()
        ...         optimizer.step()
        >>> len(caught)
        1
    """

    def __init__(self) -> None:
        self._done = False
        self._seen: tuple[int, int] | None = None
        self._steps = 0

    def look(self, base: nn.Module, heads: nn.Module) -> None:
        """Compare with the previous call; is called in each training forward that has a correspondence."""
        if self._done:
            return
        of_base = [parameter for parameter in base.parameters() if parameter.requires_grad]
        of_heads = [parameter for parameter in heads.parameters() if parameter.requires_grad]
        # Parameters that FSDP2 has sharded are other tensors during the forward, with counts of their own.
        if not of_base or not of_heads or any(hasattr(parameter, "full_tensor") for parameter in of_base):
            return
        before, self._seen = self._seen, (_changes(of_base), _changes(of_heads))
        if before is None or self._seen == before:
            return
        if self._seen[1] != before[1]:
            self._done = True
            return
        self._steps += 1
        if self._steps == STEPS:
            self._done = True
            warnings.warn(
                f"the alignment head has not changed in {STEPS} steps in which the model did, so it is not trained. "
                "Likely causes: the optimizer was built before cameo.wrap (build it afterwards, from "
                "model.parameters()), or model.alignment_loss is no part of the loss. To keep the head as it is on "
                "purpose, call model.alignment_heads.requires_grad_(False)",
                stacklevel=2,
            )


def _changes(parameters: list[nn.Parameter]) -> int:
    return sum(parameter._version for parameter in parameters)
