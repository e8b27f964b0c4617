"""What cases of bad input work with: a batch, and the small model and run around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import cameo
from cameo.data import MultiViewDataset, Views
from cameo.training.setup import load_pipeline, wrap_denoiser
from tests.helpers.batches import make_batch
from tests.helpers.sequences import write_sequence
from tests.helpers.training_runs import make_config, make_trainer


class Bench:
    """What the cases work with: a folder, a batch, and the small model around them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batch = make_batch(samples=1, views=3, size=32)

    def match(self, **changes: Any) -> cameo.Correspondence:
        batch = {**self.batch, **changes}
        return cameo.Correspondence.from_depth(batch["depth"], batch["intrinsics"], batch["extrinsics"], token_grid=4)

    def wrapped(self, **changes: Any) -> tuple[Any, cameo.CameoModel]:
        config = make_config(self.folder, **changes)
        pipeline = load_pipeline(config)
        return pipeline, wrap_denoiser(pipeline, config)

    def forward(self, match: cameo.Correspondence, **changes: Any) -> cameo.CameoModel:
        pipeline, model = self.wrapped()
        inputs = pipeline.training_inputs({**self.batch, **changes}, timesteps=torch.tensor([500]))
        model(*inputs.args, correspondence=match, **inputs.kwargs)
        return model

    def train_on(self, source: Any) -> None:
        trainer = make_trainer(self.folder / "run", max_train_steps=1)
        trainer.dataset = MultiViewDataset(source, num_views=2, length=100)
        trainer.train()

    def views(self, **changes: torch.Tensor) -> Views:
        fields = {name: self.batch[name][0] for name in ("images", "depth", "intrinsics", "extrinsics")}
        return Views(**{**fields, **changes}, key="kitchen")

    def sequence(self) -> Path:
        return write_sequence(self.folder / "office", frames=6)


class OneScene:
    def __init__(self, views: Views) -> None:
        self.one = views

    def __len__(self) -> int:
        return 1

    def views(self, scene: int) -> Views:
        return self.one


def changed(tensor: torch.Tensor, place: Any, value: Any) -> torch.Tensor:
    copy = tensor.clone()
    copy[place] = torch.as_tensor(value, dtype=copy.dtype)
    return copy
