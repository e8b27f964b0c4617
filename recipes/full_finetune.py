"""Train all weights of a multi-view diffusion model, from a preset or from released weights, with or without CAMEO.

    cameo full                                                                 # small base model on embedded rooms
    cameo full loss_weight=0.1 train_data_dir=path/to/rgbd                     # an RGB-D sequence, or a mesh folder
    cameo full backbone=mvdream                                                # or zero123plus, sv3d
    cameo full --dry-run                                                       # will it fit? =cuda: on a GPU
    cameo full resume_from_checkpoint=latest                                   # go on with an interrupted run
    accelerate launch -m cameo.recipes.full_finetune config=my.yaml            # several GPUs
    torchrun --nproc_per_node 2 -m cameo.recipes.full_finetune config=my.yaml  # several processes on CPUs

Every setting of `cameo.training.settings.TrainingConfig` can be given as key=value; --help lists them with what they
mean, --print-config prints those that a run would use. In a clone `python recipes/full_finetune.py` is the same, and
launchers take that file too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cameo.files import write_atomically
from cameo.recipes import CONFIGS
from cameo.settings import run_recipe
from cameo.training.settings import TrainingConfig, load_config, settings_file


def read(arguments: list[str]) -> TrainingConfig:
    """Read the settings file of the backbone, and the settings of the command line over it."""
    return load_config(settings_file("full", CONFIGS, arguments), arguments)


def dry_run(arguments: list[str], device: str | None) -> None:
    """Print what a step takes, without weights and data."""
    config = read(arguments)
    from cameo.estimate import dry_run
    from cameo.training.runs import outlined_run

    dry_run(config, partial(outlined_run, full=True), device)


def main(arguments: list[str]) -> None:
    """Train, validate, write the pipeline in diffusers layout, and push it if asked."""
    config = read(arguments)
    from cameo.training.setup import begin_run

    with begin_run(config):
        train_and_report(config)


def train_and_report(config: TrainingConfig) -> None:
    """Train one model, and write its results."""
    from cameo.recipes.push_of_a_run import check_push, push_finished
    from cameo.training.data import build_dataset
    from cameo.training.report import (
        card_metrics,
        card_pictures,
        metrics_table,
        write_pictures,
        write_run_report,
    )
    from cameo.training.setup import (
        load_pipeline,
        run_name,
        to_run_device,
        validation_callback,
        wrap_denoiser,
    )
    from cameo.training.trainer import Trainer

    check_push(config)
    training_set, validation_set = build_dataset(config, "train"), build_dataset(config, "validation")
    pipeline = load_pipeline(config)
    pipeline.denoiser.requires_grad_(True)
    to_run_device(pipeline, config)
    model = wrap_denoiser(pipeline, config, training_set)
    on_validation = validation_callback(pipeline, validation_set, config)
    trainer = Trainer(model, pipeline, training_set, config, on_validation=on_validation)
    result, accelerator = trainer.train(), trainer.accelerator
    accelerator.end_training()
    if result.stopped_by:
        accelerator.print(f"stopped by {result.stopped_by} at step {result.step}; ", end="")
        accelerator.print("continue with resume_from_checkpoint=latest")
        return
    if not accelerator.is_main_process:
        return
    output = Path(config.output_dir)
    name = run_name(config)
    pictures = write_pictures({name: model}, pipeline, validation_set, config, output / "pictures")
    write_atomically(output / "validation.json", json.dumps({name: result.validations}, indent=2) + "\n")
    table = metrics_table({f"step {entry['step']}": entry for entry in result.validations[-3:]})
    print(f"\n{table}\n")
    write_atomically(output / "table.md", table + "\n")
    start, end = result.validations[0], result.validations[-1]
    facts = {
        "pipeline": pipeline,
        "metrics": card_metrics({"base" if start["step"] == 0 else f"step {start['step']}": start, name: end}),
        "pictures": card_pictures(pictures),
    }
    folder = model.save_pretrained(output / "model", license=config.hub_license, repo_id=config.hub_model_id, **facts)
    print(f"model in {folder}, pictures in {output / 'pictures'}, losses in {result.metrics}")
    report = write_run_report({name: result}, model, config, output / "report.html", pictures=pictures, start="start")
    print(f"what changed, with curves, pictures and settings: open {report} in a browser")
    push_finished(model, folder, config, **facts)


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe; `arguments` are those of the command line by default."""
    kinds, about = [TrainingConfig], __doc__ or ""
    run_recipe(main, lambda given: [read(given)], kinds, about=about, arguments=arguments, dry_run=dry_run)


if __name__ == "__main__":
    run()
