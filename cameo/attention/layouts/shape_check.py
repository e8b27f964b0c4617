"""Compare the shape of a kernel's tensor with the one that a layout and a correspondence lead to expect.

Axes: as in `cameo.attention.layout`.
"""

from __future__ import annotations

from torch import Tensor

from cameo.errors import ShapeError
from cameo.geometry.grids import TokenGrids

__all__ = ["check_shape"]


def check_shape(
    of: str, tensor: Tensor, expected: tuple[int, int], pattern: str, *, batch: int, token_grids: TokenGrids
) -> None:
    """Raise a ShapeError with the likely cure unless a tensor is `[AB, K, L, D]` with the expected `(AB, L)`.

    Args:
        of: "query" or "key", for the message.
        tensor: what the kernel received.
        expected: `(AB, L)`.
        pattern: text of the pattern that led to it.
        batch: samples of the correspondence.
        token_grids: token grid of each of its views.
    """
    if tensor.ndim != 4:
        raise ShapeError(of, expected=f'[AB, K, L, D] for "{pattern}"', got=tensor.shape)
    attention_batch, _, tokens, _ = tensor.shape
    if (attention_batch, tokens) != expected:
        raise ShapeError(
            of,
            expected=f'AB = {expected[0]} and L = {expected[1]} in [AB, K, L, D] for "{pattern}" with {batch} '
            f"samples and token grids {tuple(token_grids)}",
            got=tensor.shape,
            cure=_cure((attention_batch, tokens), expected, batch, len(token_grids)),
        )


def _cure(got: tuple[int, int], expected: tuple[int, int], batch: int, views: int) -> str:
    (attention_batch, tokens), (expected_batch, expected_tokens) = got, expected
    if views > 1 and (attention_batch, tokens * views) == (expected_batch * views, expected_tokens):
        return (
            f"Each of the {views} views was attended alone: the layer did not join them. Likely cause: num_views was "
            "forgotten, which tells a forward how many views a sample has; for a U-Net of backbone 'cat3d' or "
            f"'mvdream' it is cross_attention_kwargs={{\"num_views\": {views}}}"
        )
    if views > 1 and (attention_batch * views, tokens) == (expected_batch, expected_tokens * views):
        return (
            f"The {views} views were joined in this layer, and the layout is that of a layer that attends within each "
            'view; a joined layer has the pattern "b (v h w)"'
        )
    if tokens != expected_tokens:
        return (
            "The correspondence has another token grid or number of views than this layer; "
            "use token_grid=model.token_grid(height, width). Or the layout describes other tokens, which "
            "model.check_layout finds out"
        )
    if attention_batch > expected_batch and attention_batch % expected_batch == 0:
        return (
            f"That is {attention_batch // expected_batch} times the batch of the correspondence. "
            "Classifier-free guidance doubles it: repeat the correspondence or train without guidance"
        )
    return f"The correspondence has {batch} samples; give the model the same number"
