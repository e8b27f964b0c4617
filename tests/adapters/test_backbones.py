"""The checks that every registered backbone and preset has to pass."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cameo
from cameo.backbone import get_backbone
from cameo.config import CameoConfig
from cameo.data.batches import match_layers
from cameo.hub.license import find_license
from cameo.pipeline import MultiViewPipeline
from tests.helpers import backbone_checks as checks
from tests.helpers.backbone_rows import ROWS, Row, every_row, every_tiny


def test_every_backbone_and_preset_has_a_row() -> None:
    names = {point.name for point in entry_points(group="cameo.backbones") if point.module.startswith("cameo.")}
    registered = {(name, preset) for name in names for preset in get_backbone(name).presets}
    assert registered == {(row.backbone, row.preset) for row in ROWS}


@every_row
def test_recognizes_its_own_and_refuses_others(row: Row) -> None:
    adapter, denoiser = get_backbone(row.backbone), row.pipeline().denoiser
    assert adapter.recognizes(denoiser)
    assert not adapter.recognizes(nn.Linear(2, 2))
    assert "Linear" in adapter.explain_mismatch(nn.Linear(2, 2))
    layers = adapter.attention_layers(denoiser)
    assert [layer.index for layer in layers] == list(range(len(layers)))
    assert 0 <= adapter.default_layer(denoiser) < len(layers)
    assert all(isinstance(denoiser.get_submodule(layer.path), nn.Module) for layer in layers)


@every_row
def test_layers_are_listed_in_the_order_in_which_they_run(row: Row) -> None:
    model = row.subject().wrapped()
    order: list[str] = []
    names = {layer.path: model.base_model.get_submodule(layer.path) for layer in model.attention_layers}
    for path, module in names.items():
        module.register_forward_pre_hook(lambda *_, path=path: order.append(path))
    inputs = row.inputs(model.base_model)
    model(*inputs.args, **inputs.kwargs)
    passes = len(order) // len(names)  # Zero123++ runs each layer twice
    assert order == list(names) * passes


@every_row
def test_grids_are_those_of_the_model(row: Row) -> None:
    model = row.subject().wrapped()
    assert model.token_grids(row.size, row.size, row.views) == row.grids


@every_row
def test_example_inputs_are_repeatable_and_run(row: Row) -> None:
    adapter, denoiser = get_backbone(row.backbone), row.pipeline().denoiser
    (args, kwargs), (again, _) = adapter.example_inputs(denoiser, seed=3), adapter.example_inputs(denoiser, seed=3)
    assert checks.same([args[0]], [again[0]])
    assert not checks.same([args[0]], [adapter.example_inputs(denoiser, seed=4)[0][0]])
    with torch.no_grad():
        assert checks.same(checks.run(denoiser, (args, kwargs)), checks.run(denoiser, (args, kwargs)))


@every_row
def test_the_output_is_untouched(row: Row) -> None:
    checks.check_output_is_untouched(row.subject())


@every_row
def test_the_gradient_reaches_what_it_should(row: Row) -> None:
    checks.check_gradient(row.subject())


@every_tiny
def test_a_deepcopy_stands_on_its_own(row: Row) -> None:
    checks.check_copies(row.subject())


@every_tiny
def test_one_batch_is_overfitted_with_lora_alone(row: Row) -> None:
    checks.check_lora_overfits(row.subject(), learning_rate=row.learning_rate)


@every_tiny
def test_lora_is_saved_and_loaded_bit_for_bit(row: Row, tmp_path: Path) -> None:
    checks.check_lora_round_trip(row.subject(), tmp_path / "lora")


@every_tiny
def test_gradient_checkpointing_changes_nothing(row: Row) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = row.subject().wrapped(head="mean").train()
        if checkpointing:
            model.base_model.enable_gradient_checkpointing()
        inputs = (found := row.inputs(model.base_model)).args, found.kwargs
        checks.run(model, inputs, correspondence=checks.matches_for(model, row.grids))
        model.alignment_loss.backward()
        gradients.append({n: p.grad for n, p in model.base_model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def losses(row: Row, pipeline: MultiViewPipeline, **options: Any) -> tuple[Tensor, Any]:
    model = cameo.wrap(pipeline.denoiser, row.backbone, **row.wrap)
    batch = row.batch(samples=2)
    inputs = pipeline.training_inputs(batch, generator=torch.Generator().manual_seed(1), **options)
    output = model(*inputs.args, **inputs.kwargs, correspondence=match_layers(model.supervised_layers, batch))
    return pipeline.denoising_loss(output, inputs) + model.weight * model.alignment_loss, (inputs, output)


@every_row
def test_a_training_step_of_all_weights(row: Row) -> None:
    pipeline = row.pipeline()
    loss, _ = losses(row, pipeline)
    assert loss.shape == (2,)
    loss.mean().backward()
    for name, parameter in pipeline.denoiser.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@every_tiny
def test_training_inputs_follow_the_protocol(row: Row) -> None:
    pipeline, batch = row.pipeline(), row.batch(samples=2)
    shape = pipeline.latent_shape(batch["images"].shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    last = pipeline.num_train_timesteps - 1
    inputs = pipeline.training_inputs(batch, noise=noise, timesteps=torch.tensor([3, last]))
    assert inputs.noisy.shape == inputs.target.shape == shape
    assert inputs.timesteps.tolist() == [3, last]
    assert inputs.loss_views.shape == (row.views,)
    assert inputs.loss_views[row.references :].all()
    assert inputs.aligned
    with torch.no_grad():
        output = pipeline.denoiser(*inputs.args, **inputs.kwargs)
    images = pipeline.predict_clean(output, inputs)
    assert images.shape == batch["images"].shape
    assert 0 <= images.min() <= images.max() <= 1


@every_tiny
def test_training_inputs_follow_the_generator(row: Row) -> None:
    pipeline, batch = row.pipeline(), row.batch(samples=2)
    first, again, other = (
        pipeline.training_inputs(batch, generator=torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)
    )
    assert torch.equal(first.noisy, again.noisy)
    assert torch.equal(first.timesteps, again.timesteps)
    assert all(map(torch.equal, first.args, again.args))
    assert not torch.equal(first.noisy, other.noisy)
    assert not torch.equal(first.args[0], other.args[0])


@every_tiny
def test_a_perfect_prediction_has_no_loss_and_gives_the_images_back(row: Row) -> None:
    pipeline, batch = row.pipeline(), row.batch()
    inputs = pipeline.training_inputs(batch, timesteps=torch.tensor([pipeline.num_train_timesteps // 3]))
    pipeline.prediction = lambda output, inputs: inputs.target
    assert float(pipeline.denoising_loss(None, inputs)) == 0
    images = pipeline.predict_clean(None, inputs)
    targets = images[:, row.references :], batch["images"][:, row.references :]
    torch.testing.assert_close(*targets, rtol=0, atol=2e-5)  # float32 through noising and back


@every_tiny
def test_two_samples_from_one_seed_are_identical(row: Row) -> None:
    pipeline, batch = row.pipeline(), row.batch()
    draw = [
        pipeline.sample(batch, num_inference_steps=2, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert draw[0].shape == (1, row.views - row.references, 3, row.size, row.size)
    assert torch.isfinite(draw[0]).all()
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


@every_tiny
def test_a_saved_pipeline_loads_again(row: Row, tmp_path: Path) -> None:
    pipeline, adapter = row.pipeline(), get_backbone(row.backbone)
    pipeline.save_pretrained(str(tmp_path))
    again = adapter.load(str(tmp_path))
    assert adapter.recognizes(again.denoiser)
    with torch.no_grad():
        inputs = (found := row.inputs(pipeline.denoiser)).args, found.kwargs
        assert checks.same(checks.run(again.denoiser, inputs), checks.run(pipeline.denoiser, inputs))
    batch = row.batch()
    drawn = [
        one.sample(batch, num_inference_steps=2, generator=torch.Generator().manual_seed(1))
        for one in (pipeline, again)
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("backbone", "licenses"),
    [
        ("cat3d", {"openrail++"}),
        ("zero123plus", {"openrail", "cc-by-nc-4.0"}),
        ("mvdream", {"openrail"}),
        ("sv3d", {"other"}),
    ],
    ids=["cat3d", "zero123plus", "mvdream", "sv3d"],
)
def test_licenses_of_the_releases(backbone: str, licenses: set[str]) -> None:
    adapter = get_backbone(backbone)
    names = list(adapter.released)
    found = [find_license(CameoConfig(backbone, [], base_model=name), None, backbone=adapter) for name in names]
    assert {one["license"] for one in found} == {"apache-2.0", *licenses}  # the first is that of the bundled base
    assert all(one.get("license_name") for one in found if one["license"] == "other")
    assert [adapter.revision(name) for name in names] == [release.revision for release in adapter.released.values()]
    assert adapter.license("preset:tiny") == "apache-2.0"
    assert adapter.license("somebody/else") is None
    assert adapter.revision("somebody/else") is None
