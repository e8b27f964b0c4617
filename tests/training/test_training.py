"""The training loop: what it computes, what it leaves alone, and how it fails."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cameo.data import collate
from cameo.data.batches import match_batch, match_layers
from cameo.errors import DataError
from cameo.processes.accelerator import make_accelerator
from cameo.training.checkpoints.folder import list_checkpoints
from cameo.training.checkpoints.tensors import read_tensors
from cameo.training.data import StepSampler, build_dataset, noisy_inputs
from cameo.training.report import write_pictures
from cameo.training.setup import add_lora, load_pipeline, train_lora, wrap_denoiser
from cameo.training.trainer import Trainer
from tests.helpers.batches import make_batch
from tests.helpers.training_runs import make_config, make_trainer

pytestmark = pytest.mark.usefixtures("alone_on_shared_scenes")


class Changed(Dataset):
    """The first two samples of a data set over and over, with a change."""

    def __init__(self, base: Dataset, change: Any = lambda index, sample: sample) -> None:
        self.base, self.change = base, change

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.change(index, dict(self.base[index % 2]))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.train().history()]


def trained_values(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.trained]


def test_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "max_train_steps": 3, "max_grad_norm": 0.5, "loss_weight": 0.3}
    trainer = make_trainer(tmp_path, **settings, lr_scheduler="linear")
    history = trainer.train().history()

    config = make_config(tmp_path, **settings)
    pipeline = load_pipeline(config)
    add_lora(pipeline.denoiser, config)
    model = wrap_denoiser(pipeline, config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.adam_weight_decay)
    dataset = build_dataset(config, "train")
    for step in range(3):
        denoising = alignment = 0.0
        micro_steps = range(2 * step, 2 * step + 2)
        batches = [collate([dataset[2 * micro_step], dataset[2 * micro_step + 1]]) for micro_step in micro_steps]
        matches = [match_batch(batch, model.token_grid(32, 32)) for batch in batches]
        totals = (model.match_totals(matches[0]) + model.match_totals(matches[1])) / 2  # the mean is over all matches
        for micro_step, batch, match in zip(micro_steps, batches, matches, strict=True):
            inputs = noisy_inputs(pipeline, batch, config, micro_step)
            output = model(*inputs.args, **inputs.kwargs, correspondence=match, match_totals=totals)
            plain = pipeline.denoising_loss(output, inputs).mean()
            ((plain + 0.3 * model.alignment_loss) / 2).backward()
            denoising, alignment = denoising + plain.item() / 2, alignment + model.alignment_loss.item() / 2
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.param_groups[0]["lr"] = config.learning_rate * (3 - step) / 3
        optimizer.step()
        optimizer.zero_grad()
        assert history[step]["loss"] == pytest.approx(denoising, rel=1e-6)
        assert history[step]["alignment_loss"] == pytest.approx(alignment, rel=1e-6)
        assert history[step]["learning_rate"] == pytest.approx(config.learning_rate * (3 - step) / 3)
    for ours, reference in zip(trained_values(trainer), parameters, strict=True):
        assert torch.equal(ours, reference.detach())


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step gets the noise of the first, so that one batch can be learnt by heart."""
    monkeypatch.setattr(
        "cameo.training.trainer.noisy_inputs",
        lambda pipeline, batch, config, micro_step, process: noisy_inputs(pipeline, batch, config, 0, process),
    )


@pytest.mark.usefixtures("same_noise")
def test_alignment_loss_falls_below_half_when_overfitting_with_lora_only(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_train_steps=30, loss_weight=1.0, rank=16, num_views=3, condition_dropout=0.0)
    frozen = {n: p.detach().clone() for n, p in trainer.model.base_model.named_parameters() if not p.requires_grad}
    trainer.dataset = Changed(trainer.dataset)
    history = trainer.train().history()
    assert history[-1]["alignment_loss"] < history[0]["alignment_loss"] / 2
    assert all(math.isfinite(entry["loss"]) for entry in history)
    for name, value in frozen.items():
        assert torch.equal(trainer.model.base_model.get_parameter(name), value), name


def test_weight_zero_needs_no_geometry_and_leaves_the_heads(tmp_path: Path) -> None:
    def without_depth(index: int, sample: dict[str, Any]) -> dict[str, Any]:
        del sample["depth"]
        return sample

    trainer = make_trainer(tmp_path, loss_weight=0.0, max_train_steps=2)
    trainer.dataset = Changed(trainer.dataset, without_depth)
    heads = [parameter.detach().clone() for parameter in trainer.model.alignment_heads.parameters()]
    history = trainer.train().history()
    assert [entry["alignment_loss"] for entry in history] == [0.0, 0.0]
    assert [entry["supervised"] for entry in history] == [0.0, 0.0]
    for before, after in zip(heads, trainer.model.alignment_heads.parameters(), strict=True):
        assert not after.requires_grad
        assert torch.equal(before, after)


def test_cameo_changes_the_loss_that_trains_but_not_the_noise(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain", loss_weight=0.0, max_train_steps=3).train().history()
    aligned = make_trainer(tmp_path / "aligned", loss_weight=0.5, max_train_steps=3).train().history()
    assert plain[0]["loss"] == aligned[0]["loss"]
    assert plain[2]["loss"] != aligned[2]["loss"]


@pytest.mark.usefixtures("same_noise")
def test_bf16_trains_validates_and_keeps_lora_in_float32(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, mixed_precision="bf16", max_train_steps=20, loss_weight=1.0, rank=16, learning_rate=2e-2
    )
    train, held_out = Changed(build_dataset(config, "train")), build_dataset(config, "validation")
    run = train_lora(config, train, held_out)
    history = run.result.history()
    assert all(math.isfinite(entry["loss"]) for entry in history)
    assert history[-1]["alignment_loss"] < history[0]["alignment_loss"] / 2
    kinds = {p.dtype for p in run.model.base_model.parameters() if not p.requires_grad}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in run.trainer.trained} == {torch.float32}
    assert [entry["step"] for entry in run.validations] == [0, 20]
    files = write_pictures({"bf16": run.model}, run.pipeline, held_out, config, tmp_path / "pictures")
    assert [path.name for path in files] == ["views.png", "attention.png"]


def test_an_earlier_run_is_replaced_only_when_told(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_train_steps=2).train()
    with pytest.raises(DataError, match="or replace it with overwrite_output_dir=true"):
        make_trainer(tmp_path, max_train_steps=1).train()
    trainer = make_trainer(tmp_path, max_train_steps=1, overwrite_output_dir=True)
    history = trainer.train().history()
    assert [path.name for path in list_checkpoints(trainer.output_dir)] == ["checkpoint-1"]
    assert [entry["step"] for entry in history] == [1]


def test_gradient_checkpointing_gives_the_same_losses(tmp_path: Path) -> None:
    plain = losses(make_trainer(tmp_path / "plain", max_train_steps=3))
    recomputed = make_trainer(tmp_path / "recomputed", max_train_steps=3, gradient_checkpointing=True)
    assert any(getattr(m, "gradient_checkpointing", False) for m in recomputed.model.modules())
    assert losses(recomputed) == plain


def test_fp16_is_refused_on_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mixed_precision=fp16 needs a GPU; on the CPU use mixed_precision=bf16"):
        make_trainer(tmp_path, mixed_precision="fp16")


def test_xformers_falls_back_on_the_cpu(tmp_path: Path) -> None:
    plain = losses(make_trainer(tmp_path / "plain", max_train_steps=2))
    assert (
        losses(make_trainer(tmp_path / "x", max_train_steps=2, enable_xformers_memory_efficient_attention=True))
        == plain
    )


def test_non_finite_loss_names_step_and_samples_and_saves_nothing(tmp_path: Path) -> None:
    def broken(index: int, sample: dict[str, Any]) -> dict[str, Any]:
        if index >= 6:
            sample["images"] = torch.full_like(sample["images"], torch.nan)
            sample["key"] = f"broken-{index}"
        return sample

    trainer = make_trainer(tmp_path, max_train_steps=6, checkpointing_steps=1)
    trainer.dataset = Changed(trainer.dataset, broken)
    with pytest.raises(FloatingPointError, match=r"step 4: .*denoising nan.*'broken-6', 'broken-7'.*nothing is saved"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert all(torch.isfinite(value).all() for value in trained_values(trainer))


def test_non_finite_gradient_of_a_finite_loss_does_not_reach_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, max_train_steps=3, checkpointing_steps=1)
    plain, steps = trainer.pipeline.denoising_loss, []

    def loss(output: Any, inputs: Any) -> Tensor:
        steps.append(1)
        value = plain(output, inputs)
        # The root of zero is zero and its derivative infinite.
        return value + (0 * output.sample).sum().abs().sqrt() if len(steps) == 2 else value

    monkeypatch.setattr(trainer.pipeline, "denoising_loss", loss)
    with pytest.raises(FloatingPointError, match=r"step 2: .*norm of the gradient nan"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert all(torch.isfinite(value).all() for value in trained_values(trainer))


def test_validation_sees_averaged_weights_and_shifts_nothing(tmp_path: Path) -> None:
    settings = {"max_train_steps": 4, "lora_dropout": 0.3, "use_ema": True, "ema_decay": 0.5}
    plain = make_trainer(tmp_path / "plain", **settings)
    expected = losses(plain)
    seen: list[list[Tensor]] = []

    def look(model: Any, step: int) -> dict[str, Any]:
        torch.rand(7)
        model.eval()
        seen.append(trained_values(trainer))
        return {"loss": float(step)}

    trainer = make_trainer(tmp_path / "looked", **settings, validation_steps=2, on_validation=look)
    averages = [value.clone() for value in trained_values(trainer)]
    step, averaged_at = trainer.optimizer.step, {}

    def stepping() -> None:
        step()
        number = trainer.step + 1
        decay = 0.0 if number == 1 else min(0.5, 1 - number ** (-2 / 3))
        for average, value in zip(averages, trainer.trained, strict=True):
            average.mul_(decay).add_(value.detach(), alpha=1 - decay)
        averaged_at[number] = [value.clone() for value in averages]

    trainer.optimizer.step = stepping
    result = trainer.train()
    assert [entry["loss"] for entry in result.history()] == expected
    assert result.validations == [{"step": n, "loss": float(n)} for n in (0, 2, 4)]
    for values, at in zip(seen[1:], (2, 4), strict=True):
        for value, average in zip(values, averaged_at[at], strict=True):
            torch.testing.assert_close(value, average, rtol=1e-5, atol=1e-7)
    for value, average in zip(trained_values(trainer), averaged_at[4], strict=True):
        torch.testing.assert_close(value, average, rtol=1e-5, atol=1e-7)


def test_two_trainings_in_one_process_do_not_touch_each_other(tmp_path: Path) -> None:
    first = make_trainer(tmp_path / "first", max_train_steps=3, report_to="tensorboard")
    second = make_trainer(tmp_path / "second", max_train_steps=3, report_to="tensorboard", loss_weight=0.0)
    first_losses, second_losses = losses(first), losses(second)
    assert losses(make_trainer(tmp_path / "again", max_train_steps=3)) == first_losses
    assert losses(make_trainer(tmp_path / "once more", max_train_steps=3, loss_weight=0.0)) == second_losses
    for name in ("first", "second"):
        assert list((tmp_path / name / "logs").rglob("events.out.tfevents.*"))


def test_workers_load_the_same_samples_and_tell_what_is_wrong(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())

    def broken(index: int, sample: dict[str, Any]) -> dict[str, Any]:
        raise DataError("room/frame-000007.color.png: cannot decode the color image")

    plain = losses(make_trainer(tmp_path / "plain", max_train_steps=2))
    assert losses(make_trainer(tmp_path / "workers", max_train_steps=2, dataloader_num_workers=2)) == plain
    trainer = make_trainer(tmp_path / "broken", dataloader_num_workers=1)
    trainer.dataset = Changed(trainer.dataset, broken)
    with pytest.raises(DataError, match=r"frame-000007.color.png: cannot decode"):
        trainer.train()
    # Though the traceback above still holds the loader; a helper of other tests may have a process of its own.
    assert set(multiprocessing.active_children()) == before


def test_several_layers_with_different_grids(tmp_path: Path) -> None:
    options = {"image_size": 32, "block_out_channels": [32, 32], "heads": 2, "norm_num_groups": 8}
    trainer = make_trainer(
        tmp_path, max_train_steps=1, layer=[0, 2], preset_options={**options, "attention_levels": [True, True]}
    )
    token_grids = [match.token_grids[0] for match in match_layers(trainer.model.supervised_layers, make_batch(size=32))]
    assert token_grids == [(8, 8), (4, 4)]
    assert trainer.train().history()[0]["supervised"] > 0


def test_processes_draw_different_samples_of_one_order() -> None:
    first, second = (list(StepSampler(start=0, stop=3, batch_size=2, process=n, num_processes=2)) for n in range(2))
    together = [number for pair in zip(first, second, strict=True) for batch in pair for number in batch]
    assert together == list(range(12))
    resumed = StepSampler(start=2, stop=3, batch_size=2, process=1, num_processes=2)
    assert list(resumed) == second[2:]
    assert len(resumed) == 1


def test_noise_depends_on_seed_step_and_process_only(tmp_path: Path) -> None:
    config = make_config(tmp_path, condition_dropout=0.5)
    pipeline, batch = load_pipeline(config), make_batch(size=32)
    noisy = noisy_inputs(pipeline, batch, config, 5).noisy
    torch.rand(3)
    assert torch.equal(noisy_inputs(pipeline, batch, config, 5).noisy, noisy)
    assert not torch.equal(noisy_inputs(pipeline, batch, config, 6).noisy, noisy)
    assert not torch.equal(noisy_inputs(pipeline, batch, config, 5, process=1).noisy, noisy)
    config.seed = 1
    assert not torch.equal(noisy_inputs(pipeline, batch, config, 5).noisy, noisy)


def test_high_noise_sampling_follows_its_formula(tmp_path: Path) -> None:
    config = make_config(tmp_path, timestep_sampling="high_noise")
    pipeline = load_pipeline(config)
    batch = make_batch(samples=4000, views=2, size=8)
    batch["images"] = batch["images"].repeat(1, 1, 1, 1, 1)
    steps = noisy_inputs(pipeline, batch, config, 0).timesteps
    # P(t/T < x) of t = 1 - u^2 is 1 - sqrt(1 - x); 4000 draws have a standard error below 0.008.
    for x in (0.25, 0.5, 0.9):
        share = (steps < x * pipeline.num_train_timesteps).double().mean().item()
        assert share == pytest.approx(1 - math.sqrt(1 - x), abs=0.03)
    assert int(steps.max()) < pipeline.num_train_timesteps


def test_gradient_scaler_skips_an_overflow_without_ending_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fp16 does on a GPU, with the scaler that torch has for the CPU."""

    def scaling(config: Any) -> Any:
        accelerator = make_accelerator(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return accelerator

    monkeypatch.setattr("cameo.training.trainer.make_accelerator", scaling)
    trainer = make_trainer(
        tmp_path, max_train_steps=3, use_ema=True, lr_scheduler="linear", learning_rate=1e-3, checkpointing_steps=3
    )
    accelerator = trainer.accelerator
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    plain, seen = trainer.pipeline.denoising_loss, []

    def loss(output: Any, inputs: Any) -> Tensor:
        seen.append([value.clone() for value in trained_values(trainer)])
        value = plain(output, inputs)
        return value + (0 * output.sample).sum().abs().sqrt() if len(seen) == 2 else value

    trainer.pipeline.denoising_loss = loss
    history = trainer.train().history()
    assert [entry["learning_rate"] for entry in history] == pytest.approx([1e-3, 2e-3 / 3, 2e-3 / 3])
    assert all(torch.equal(before, after) for before, after in zip(seen[1], seen[2], strict=True))
    assert not all(torch.equal(before, after) for before, after in zip(seen[0], seen[1], strict=True))
    assert accelerator.scaler.get_scale() == 512.0
    assert trainer.ema.optimization_step == 2
    assert read_tensors(list_checkpoints(tmp_path)[-1] / "scaler.safetensors")["scale"] == 512.0
