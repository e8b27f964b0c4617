"""Small models of the kinds that have no adapter, and the proofs that any attached model must pass.

Axes: B samples, V views, h w token grid, C channels, K heads. A place is (view, row, column).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cameo import CameoModel, Correspondence

__all__ = [
    "GRID",
    "SAMPLES",
    "VIEWS",
    "Attention",
    "JointModel",
    "Place",
    "RowModel",
    "add_lora",
    "check_bit_identical",
    "check_layout",
    "check_overfits",
    "frames",
    "next_view",
]

Place = tuple[int, int, int]
SAMPLES, VIEWS, GRID = 2, 3, (3, 4)  # all different, so that no two axes can be taken for each other
CHANNELS, HEADS = 16, 2


class Attention(nn.Module):
    """Attention with the projections of Stable Diffusion, in SEVA's way: one fixed backend of SDPA."""

    def __init__(self, channels: int = CHANNELS, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (split_heads(linear(x), self.heads) for linear in (self.to_q, self.to_k, self.to_v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            output = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(rearrange(output, "a k l d -> a l (k d)"))


class JointModel(nn.Module):
    """SEVA's kind: attention over all tokens of all frames, then over the frames of each cell."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, CHANNELS, 1), nn.Conv2d(CHANNELS, 4, 1)
        self.joint, self.temporal = Attention(), Attention()

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        x = self.conv_in(x)
        height, width = x.shape[-2:]
        axes = {"v": num_frames, "h": height, "w": width}
        tokens = rearrange(x, "(b v) c h w -> b (v h w) c", **axes)
        tokens = tokens + self.joint(tokens)
        tokens = rearrange(tokens, "b (v h w) c -> (b h w) v c", **axes)
        tokens = tokens + self.temporal(tokens)
        return self.conv_out(rearrange(tokens, "(b h w) v c -> (b v) c h w", **axes))


class RowAttention(nn.Module):
    """MV-Adapter's kind: three calls of the kernel, of which only the second mixes views, row by row."""

    heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        names = [f"to_{part}{kind}" for kind in ("", "_mv", "_ref") for part in "qkv"]
        self.projections = nn.ModuleDict({name: nn.Linear(CHANNELS, CHANNELS, bias=False) for name in names})

    def forward(self, x: Tensor, reference: Tensor, num_views: int, grid: tuple[int, int]) -> Tensor:
        axes = {"v": num_views, "h": grid[0], "w": grid[1]}
        output = self.attend("", x, x)
        query = rearrange(x, "(b v) (h w) c -> (b v h) w c", **axes)
        row = rearrange(x, "(b v) (h w) c -> b h (v w) c", **axes)
        rows = row.repeat_interleave(num_views, dim=0).flatten(0, 1)
        mixed = self.attend("_mv", query, rows)
        output = output + rearrange(mixed, "(b v h) w c -> (b v) (h w) c", **axes)
        return output + self.attend("_ref", x, reference)

    def attend(self, kind: str, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = (
            split_heads(self.projections[f"to_{part}{kind}"](source), HEADS)
            for part, source in (("q", x), ("k", context), ("v", context))
        )
        return rearrange(F.scaled_dot_product_attention(query, key, value), "a k l d -> a l (k d)")


class RowModel(nn.Module):
    """Row-wise attention in MV-Adapter's form (`rows`) and in Era3D's (`whole_rows`)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, CHANNELS, 1), nn.Conv2d(CHANNELS, 4, 1)
        self.rows, self.whole_rows = RowAttention(), Attention()

    def forward(self, x: Tensor, num_views: int) -> Tensor:
        x = self.conv_in(x)
        height, width = x.shape[-2:]
        axes = {"v": num_views, "h": height, "w": width}
        tokens = rearrange(x, "b c h w -> b (h w) c")
        tokens = tokens + self.rows(tokens, tokens.flip(1), num_views, (height, width))
        tokens = rearrange(tokens, "(b v) (h w) c -> (b h) (v w) c", **axes)
        tokens = tokens + self.whole_rows(tokens)
        return self.conv_out(rearrange(tokens, "(b h) (v w) c -> (b v) c h w", **axes))


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    return rearrange(tensor, "a l (k d) -> a k l d", k=heads)


def frames(*, views: int = VIEWS, grid: tuple[int, int] = GRID, channels: int = 4, shift: int = 1) -> Tensor:
    """Views `[(B V), C, h, w]` of a camera that pans: each shows what the one before does, `shift` columns further on.

    The first channel tells the views apart, as camera rays would.
    """
    picture = torch.randn(SAMPLES, channels, *grid, generator=torch.Generator().manual_seed(0))
    images = torch.stack([picture.roll(view * shift, dims=-1) for view in range(views)], dim=1)
    images[:, :, 0] = torch.arange(views).reshape(views, 1, 1)
    return images.flatten(0, 1)


def next_view(*, shift: int = 1, views: int = VIEWS, grid: tuple[int, int] = GRID) -> Correspondence:
    """What `frames` show: every token matches one token of the next view, of the last view one of the first."""
    height, width = grid
    row, column = (part.flatten() for part in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    index = torch.full((SAMPLES, views, views, height * width), -1)
    for view in range(views):
        following = (view + 1) % views
        index[:, view, following] = row * width + (column + (following - view) * shift) % width
    return Correspondence(index, (grid,) * views)


def check_bit_identical(
    build: Callable[[], nn.Module],
    wrap: Callable[[nn.Module], CameoModel],
    run: Callable[..., Any],
    match: Correspondence,
) -> None:
    """Plain, wrapped without and with a correspondence, and unwrapped: the same output bit for bit."""
    model = build()
    before = run(model)
    wrapped = wrap(model)
    assert torch.equal(run(wrapped), before)
    assert torch.equal(run(wrapped, correspondence=match), before)
    assert wrapped.num_supervised > 0
    assert wrapped.unwrap() is model
    assert torch.equal(run(model), before)


def check_layout(
    model: CameoModel,
    run: Callable[..., Any],
    to_images: Callable[[Tensor], Tensor],
    *,
    query: Place,
    key: Place,
    reached: Sequence[Place],
    project: Callable[[Tensor], tuple[Tensor, Tensor]],
    views: int = VIEWS,
    matched_views: int | None = None,
    grid: tuple[int, int] = GRID,
) -> None:
    """One match, query place -> key place in the last sample: whom does the loss pull, and what is its value?

    The hidden states that enter the supervised layer are brought to images `[B, V, h, w, C]` by `to_images`, which
    knows the model and nothing of `cameo`. The gradient of the loss must be non-zero at the query's token and at the
    reached tokens, and exactly zero elsewhere. The loss must be the cross-entropy of the matched token among the
    reached ones, computed here from `project(images)`: queries and keys `[B, V, h, w, K, D]`.

    `model` has to be wrapped with `head="mean"`. `matched_views`: how many of the views the layer joins.
    """
    (layer,) = model.supervised_layers
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():  # not in a clean pass over the reference
            args[0].retain_grad()
            seen.append(args[0])

    sample, width = SAMPLES - 1, grid[1]
    joined = matched_views or views
    index = torch.full((SAMPLES, joined, joined, grid[0] * width), -1)
    index[sample, query[0], key[0], query[1] * width + query[2]] = key[1] * width + key[2]
    hook = model.base_model.get_submodule(layer.path).register_forward_pre_hook(keep)
    run(model, correspondence=Correspondence(index, (grid,) * joined))
    hook.remove()
    assert model.num_supervised == 1

    images = to_images(seen[0].detach())
    assert images.shape[:4] == (SAMPLES, views, *grid)
    queries, keys = project(images)
    logits = (
        torch.stack([(queries[(sample, *query)] * keys[(sample, *place)]).sum(-1).mean() for place in reached])
        * queries.shape[-1] ** -0.5
    )
    expected_loss = logits.logsumexp(0) - logits[list(reached).index(key)]
    torch.testing.assert_close(model.alignment_loss.detach(), expected_loss)

    model.alignment_loss.backward()
    assert seen[0].grad is not None
    pulled = to_images(seen[0].grad).abs().sum(-1) > 0
    expected = torch.zeros(SAMPLES, views, *grid, dtype=torch.bool)
    for place in (query, *reached):
        expected[(sample, *place)] = True
    assert torch.equal(pulled, expected), (pulled != expected).nonzero().tolist()


def add_lora(model: nn.Module, *targets: str) -> nn.Module:
    """LoRA on the named projections, everything else frozen."""
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=8, target_modules=list(targets)), model)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    return model


def check_overfits(
    model: CameoModel, run: Callable[..., Any], match: Correspondence, *, steps: int = 100, rate: float = 0.02
) -> None:
    """Training on one batch takes the alignment loss below half of its start."""
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        run(model, correspondence=match)
        assert model.num_supervised == int(match.matched.sum())
        losses.append(model.alignment_loss.item())
        if losses[-1] < losses[0] / 2:
            return
        optimizer.zero_grad()
        model.alignment_loss.backward()
        optimizer.step()
    raise AssertionError(f"after {steps} steps the alignment loss fell from {losses[0]:.3f} to {losses[-1]:.3f} only")
