"""A page of a small model on three views, and what the library itself says of it."""

from __future__ import annotations

import pytest

from cameo.data import collate
from cameo.explore.write import ShownModel, write_page
from cameo.training.data import build_dataset
from cameo.training.setup import add_lora, load_pipeline, wrap_denoiser
from tests.helpers.explored import LEVELS, Page
from tests.helpers.training_runs import make_config


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("explore")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMEO_CACHE", str(folder / "cache"))
        config = make_config(folder, num_views=3)
        pipeline = load_pipeline(config)
        model = wrap_denoiser(pipeline, config)
        add_lora(model, config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # so that the model is not its base
                weight.data.fill_(0.1)
        data = build_dataset(config, "validation")
        batch = collate([data[0], data[1]])
    shown = {"base": ShownModel(model, False, base=True), "with <CAMEO> & co": ShownModel(model, True)}
    about = ["Made for a test."]
    path = write_page(
        folder / "explore.html", shown, pipeline, batch, title="A <page>", noise_levels=LEVELS, about=about
    )
    return Page(path, model, pipeline, batch)
