"""Train a LoRA with CAMEO on a multi-view diffusion model; without arguments two to three minutes on two CPU cores.

    cameo lora                                                                 # bundled base, embedded rooms
    cameo lora train_data_dir=path/to/rgbd num_views=4                         # an RGB-D sequence, or a mesh folder
    cameo lora backbone=zero123plus                                            # or mvdream, sv3d: settings in configs/
    cameo lora --dry-run                                                       # will it fit? =cuda: on a GPU
    cameo lora resume_from_checkpoint=latest                                   # go on with an interrupted run
    cameo lora push_to_hub=true hub_model_id=you/name                          # and publish the adapter
    accelerate launch -m cameo.recipes.lora_finetune config=my.yaml            # several GPUs
    torchrun --nproc_per_node 2 -m cameo.recipes.lora_finetune config=my.yaml  # several processes on CPUs

Every setting of `cameo.training.settings.TrainingConfig` can be given as key=value; --help lists them with what they
mean, --print-config prints those that a run would use. In a clone `python recipes/lora_finetune.py` is the same, and
launchers take that file too. Without arguments this is a demonstration, which can be
repeated: it replaces what it has left itself, and no run with settings of its own.
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
    return load_config(settings_file("lora", CONFIGS, arguments), arguments)


def dry_run(arguments: list[str], device: str | None) -> None:
    """Print what a step takes, without weights and data."""
    config = read(arguments)
    from cameo.estimate import dry_run
    from cameo.training.runs import outlined_run

    dry_run(config, partial(outlined_run, full=False), device)


def main(arguments: list[str]) -> None:
    """Train, print what changed, write pictures and the adapter, and push it if asked."""
    config = read(arguments)
    from cameo.training.setup import begin_run

    with begin_run(config, demonstration=not arguments):
        train_and_compare(config)


def train_and_compare(config: TrainingConfig) -> None:
    """Train each run of the recipe, one after the other, and write their results."""
    from cameo.recipes.push_of_a_run import check_push, push_finished
    from cameo.training.data import build_dataset
    from cameo.training.report import (
        card_metrics,
        card_pictures,
        metrics_table,
        write_attention_page,
        write_pictures,
        write_run_report,
    )
    from cameo.training.setup import LoraRun, planned_runs, train_lora

    check_push(config)
    planned = planned_runs(config)
    training_set, validation_set = build_dataset(config, "train"), build_dataset(config, "validation")
    runs: dict[str, LoraRun] = {}
    chosen = None  # by layer=auto: all runs start from the same base
    for name, settings in planned.items():
        run = runs[name] = train_lora(settings, training_set, validation_set, chosen=chosen)
        chosen = run.model.cameo_config
        if run.result.stopped_by:
            break
    accelerator = run.trainer.accelerator
    accelerator.end_training()
    if run.result.stopped_by:
        accelerator.print(f"stopped by {run.result.stopped_by} at step {run.result.step} of the run {name}; ", end="")
        accelerator.print("continue with resume_from_checkpoint=latest")
        return
    if not accelerator.is_main_process:
        return
    output = Path(config.output_dir)
    models = {name: run.model for name, run in runs.items()}
    pictures = write_pictures(models, run.pipeline, validation_set, config, output / "pictures", show_base=True)
    page = write_attention_page(models, run.pipeline, validation_set, config, output / "explore.html", show_base=True)
    validations = {name: run.validations for name, run in runs.items()}
    write_atomically(output / "validation.json", json.dumps(validations, indent=2) + "\n")
    columns = {f"step {run.validations[0]['step']}": run.validations[0]}
    columns |= {name: entries[-1] for name, entries in validations.items()}
    table = metrics_table(columns)
    print(f"\n{table}\n")
    write_atomically(output / "table.md", table + "\n")
    base = {"base": run.validations[0]}
    for name, other in [(name, one) for name, one in runs.items() if one is not run]:
        folder = Path(other.trainer.config.output_dir) / "adapter"
        metrics = card_metrics({**base, name: other.validations[-1]})
        other.model.save_pretrained(folder, license=config.hub_license, metrics=metrics)
    trained = {name: entries[-1] for name, entries in validations.items()}
    facts = {"metrics": card_metrics({**base, **trained}), "pictures": card_pictures(pictures)}
    adapter = run.model.save_pretrained(
        output / "adapter", license=config.hub_license, repo_id=config.hub_model_id, **facts
    )
    print(f"adapter in {adapter}, pictures in {output / 'pictures'}, losses in {run.result.metrics}")
    report = write_run_report(
        {name: run.result for name, run in runs.items()},
        run.model,
        config,
        output / "report.html",
        pictures=pictures,
        start="base",
        explore=page,
    )
    print(f"what changed, with curves, pictures and settings: open {report} in a browser")
    if page is not None:
        print(f"where the models look, token by token: open {page} in a browser")
    push_finished(run.model, adapter, config, **facts)


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe; `arguments` are those of the command line by default."""
    kinds, about = [TrainingConfig], __doc__ or ""
    run_recipe(main, lambda given: [read(given)], kinds, about=about, arguments=arguments, dry_run=dry_run)


if __name__ == "__main__":
    run()
