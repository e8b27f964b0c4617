"""Evaluate a multi-view diffusion model, or set evaluated models side by side.

    python recipes/evaluate.py backbone=cat3d                                       # a base as it is
    python recipes/evaluate.py checkpoint=outputs/lora-cat3d-tiny/adapter output=results/with
    python recipes/evaluate.py checkpoint=outputs/lora-cat3d-tiny/checkpoint-200 num_sampled=32 attention_layers=all
    python recipes/evaluate.py checkpoint=you/rooms-lora train_data_dir=path/to/rgbd
    python recipes/evaluate.py --compare results/without results/with output=results/difference

A checkpoint is a saved adapter or pipeline, a `checkpoint-N` of a run, or the id of a Hub repository
(`checkpoint_revision=`). Its data is the validation set of its run (`config.yaml` beside it), else that of the
backbone's settings file; every setting of `cameo.training.config.TrainingConfig` can be given as key=value and wins.
What is measured, on how many samples and with how many sampling steps are the settings of
`cameo.evaluation.settings.EvaluationSettings`, given the same way.
Without GPU and with the default settings a small model takes minutes; num_sampled=0 leaves out what needs sampling.

Written to `output` (default `outputs/evaluation`): result.json, table.md, denoising.png, attention.png, scenes.png,
samples.png; with --compare table.md and comparison.png (default `outputs/comparison`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from cameo.config import write_atomically
from cameo.evaluation.compare import comparison_figure, comparison_table, name_results
from cameo.evaluation.pictures import save_figure
from cameo.evaluation.protocol import evaluate, sample_targets
from cameo.evaluation.report import result_table, write_result
from cameo.evaluation.runs import data_settings, evaluation_settings, load_evaluated, split_settings
from cameo.training.data import build_dataset
from cameo.training.launch import Launch

CONFIGS = Path(__file__).parent / "configs"
OPTIONS = ("checkpoint", "checkpoint_revision", "output")


def main(arguments: list[str]) -> None:
    """Evaluate or compare; prints the table."""
    Launch.from_environment().refuse_several_processes("recipes/evaluate.py")
    options, others = {}, []
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if name in OPTIONS and equals:
            options[name] = value
        else:
            others.append(argument)
    if "--compare" in others:
        others.remove("--compare")
        compare(others, Path(options.get("output", "outputs/comparison")))
        return
    evaluation, others = split_settings(others)
    run = load_evaluated(
        others, CONFIGS, checkpoint=options.get("checkpoint"), revision=options.get("checkpoint_revision")
    )
    settings = evaluation_settings(evaluation, run.config)
    data = build_dataset(run.config, "validation")
    sampled = None
    if settings.num_sampled and run.config.num_reference_views:
        sampled = sample_targets(run.model, run.pipeline, data, settings)
    result = evaluate(run.model, run.pipeline, data, settings, sampled=sampled, trained_head=run.trained_head)
    result["data"] |= data_settings(run.config)
    result["run"] = run.facts
    output = Path(options.get("output", "outputs/evaluation"))
    name = options.get("checkpoint", run.config.backbone)
    files = write_result(result, output, sampled=sampled, name=name)
    print(f"\n{result_table(result, name=name)}\n")
    print(f"{', '.join(file.name for file in files)} in {output}")


def compare(paths: list[str], output: Path) -> None:
    """Set result files side by side; the first one is what the others are compared with."""
    results = name_results(paths)
    table = comparison_table(results)
    print(f"\n{table}\n")
    write_atomically(output / "table.md", table + "\n")
    figure = save_figure(comparison_figure(results), output / "comparison.png")
    print(f"table.md, {figure.name} in {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
