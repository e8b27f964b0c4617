"""A denoiser whose attention has planted matches, in the arrangement of tokens of several layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cameo import wrap
from cameo.attention.layout import TokenLayout
from cameo.correspondence import Correspondence
from cameo.pipeline import TrainingInputs
from cameo.wrap import CameoModel

ZERO123 = TokenLayout("b (r h c w)", key="b (r h c w + h' w')", r=3, c=2, references_last=1)


class Kernel(nn.Module):
    """An attention layer that passes its arguments to the kernel."""

    heads = 2

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, key)


class PlantedAttention(nn.Module):
    """Denoiser and pipeline in one, whose attention looks at the true matches; views in the order of the layout.

    `arrange` brings queries and keys `[B, V, N, D]`, in correspondence order, to the `[AB, L, D]` of the kernel;
    `shift` moves what is looked at by some tokens.
    """

    num_train_timesteps = 1000

    def __init__(self, layout: TokenLayout, arrange: Any, *, shift: int = 0, sign: float = 1.0) -> None:
        super().__init__()
        self.attn, self.weight = Kernel(), nn.Parameter(torch.zeros(1))
        self.layout, self.arrange, self.shift, self.sign = layout, arrange, shift, sign

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return self.attn(query, key)

    def wrapped(self, **options: Any) -> CameoModel:
        model = wrap(self, layer="attn", layout=self.layout, stride=12, **options)
        self.layer = model.supervised_layers[0]
        return model

    def latent_shape(self, image_shape: Any) -> tuple[int, ...]:
        return tuple(image_shape)

    def training_inputs(self, batch: Any, **options: Any) -> TrainingInputs:
        samples, views, _, height, width = batch["images"].shape
        token_grids = self.layer.token_grids(height, width, views)
        cameras = batch["depth"], batch["intrinsics"], batch["extrinsics"]
        match = Correspondence.from_depth(*cameras, token_grid=token_grids)
        tokens = match.index.shape[-1]
        counts = torch.tensor([h * w for h, w in token_grids])[None, None, :, None]
        looked_at = (match.index + self.shift) % counts
        codes = nn.functional.one_hot(looked_at, tokens) * match.matched[..., None]  # [B, i, j, N, N]
        query = codes.permute(0, 1, 3, 2, 4).flatten(3).float() * 99 * self.sign
        # Each token attends most to itself, which must not count.
        query += 999 * torch.eye(views * tokens).view(views, tokens, -1)
        key = torch.eye(views * tokens).view(1, views, tokens, -1).expand(samples, -1, -1, -1)
        query, key = (part[:, None].expand(-1, 2, -1, -1) for part in self.arrange(query, key, token_grids))
        none = torch.zeros(views, dtype=torch.bool)
        return TrainingInputs((query, key), {}, batch["images"], batch["images"], none, options["timesteps"])

    def denoising_loss(self, output: Any, inputs: TrainingInputs) -> Tensor:
        return torch.full((len(inputs.noisy),), 0.25)

    def predict_clean(self, output: Any, inputs: TrainingInputs) -> Tensor:
        """Off by 0.1 in views from 1 on, by 0.5 in view 0."""
        off = torch.full((inputs.noisy.shape[1], 1, 1, 1), 0.1)
        off[0] = 0.5
        return inputs.noisy + off


def joined(query: Tensor, key: Tensor, token_grids: Any) -> tuple[Tensor, Tensor]:
    return query.flatten(1, 2), key.flatten(1, 2)


def prompt_last(query: Tensor, key: Tensor, token_grids: Any) -> tuple[Tensor, Tensor]:
    order = [*range(1, query.shape[1]), 0]
    return query[:, order].flatten(1, 2), key[:, order].flatten(1, 2)


def tiled(query: Tensor, key: Tensor, token_grids: Any) -> tuple[Tensor, Tensor]:
    """Views 1 to 6 as 3 x 2 tiles of one image; in the keys, the tokens of the reference follow those of the tiles."""
    height, width = token_grids[1]
    rows = [
        (1 + 2 * tile_row + tile_column, row * width + column)
        for tile_row in range(3)
        for row in range(height)
        for tile_column in range(2)
        for column in range(width)
    ]
    views, tokens = torch.tensor(rows).T
    reference = key[:, 0, : token_grids[0][0] * token_grids[0][1]]
    return query[:, views, tokens], torch.cat([key[:, views, tokens], reference], dim=1)


def per_cell(query: Tensor, key: Tensor, token_grids: Any) -> tuple[Tensor, Tensor]:
    """One call per cell, in which a query attends to the tokens of all views in this cell."""
    order = [*range(1, query.shape[1]), 0]
    return query[:, order].transpose(1, 2).flatten(0, 1), key[:, order].transpose(1, 2).flatten(0, 1)


def within_views(query: Tensor, key: Tensor, token_grids: Any) -> tuple[Tensor, Tensor]:
    """One call per view, reference last, in which each token attends to the one where the reference shows its point."""
    views, tokens = query.shape[1:3]
    towards = query.unflatten(3, (views, tokens))[:, :, :, 0]
    keys = torch.eye(tokens).expand(*query.shape[:2], -1, -1)
    order = [*range(1, views), 0]
    return towards[:, order].flatten(0, 1), keys[:, order].flatten(0, 1)


class Painter(PlantedAttention):
    """Attends to the true matches; predicts and generates the true images plus `off`, or the views in reverse."""

    off, reverse = 0.0, False

    def painted(self, images: Tensor) -> Tensor:
        return (images.flip(1) if self.reverse else images + self.off).clamp(0, 1)

    def predict_clean(self, output: Any, inputs: Any) -> Tensor:
        return self.painted(inputs.noisy)

    def sample(self, batch: Any, **options: Any) -> Tensor:
        return self.painted(batch["images"][:, int(batch["num_reference_views"]) :])

    @property
    def denoiser(self) -> Any:
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "denoiser":  # a module that contains itself would recurse without end
            super().__setattr__(name, value)
