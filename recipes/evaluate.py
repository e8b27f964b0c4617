"""Evaluate a multi-view diffusion model, or compare models that were evaluated.

    cameo evaluate backbone=cat3d                                                  # a base as it is
    cameo evaluate checkpoint=outputs/lora-cat3d-tiny/adapter output=results/with
    cameo evaluate checkpoint=outputs/lora-cat3d-tiny/checkpoint-200 num_sampled=32 attention_layers=all
    cameo evaluate checkpoint=you/rooms-lora train_data_dir=path/to/rgbd
    cameo evaluate --compare results/without results/with output=results/difference

A checkpoint is a saved adapter or pipeline, a `checkpoint-N` of a run, or the id of a Hub repository
(`checkpoint_revision=`). Its data is the validation set of its run (`config.yaml` beside it), else that of the
backbone's settings file; every setting of `cameo.training.settings.TrainingConfig` can be given as key=value, which
takes precedence. The settings of `cameo.evaluation.settings.EvaluationSettings`, given the same way, say what is
measured, on how many samples and with how many sampling steps. --help lists all of them, --print-config prints
those that a run would use.
Without a GPU and with the default settings a small model takes minutes; num_sampled=0 skips the figures that need
sampling.

Written to `output` (default `outputs/evaluation`): result.json, table.md, denoising.png, attention.png, scenes.png,
samples.png; with --compare table.md and comparison.png (default `outputs/comparison`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cameo.evaluation.settings import EvaluationSettings
from cameo.files import write_atomically
from cameo.recipes import CONFIGS
from cameo.settings import Settings, run_recipe, setting, split_arguments, typed_values
from cameo.training.run_settings import evaluation_settings, run_settings
from cameo.training.settings import TrainingConfig


@dataclass
class Options(Settings):
    """What is evaluated or compared, and where the result goes."""

    # Saved adapter or pipeline, checkpoint-N of a run, or id of a Hub repository. null, the default, evaluates the base
    # that the settings name.
    checkpoint: str | None = setting(None, path=True)
    # Branch, tag or commit of checkpoint on the Hub. null, the default, is the main branch.
    checkpoint_revision: str | None = setting(None)
    # Folder of the result. null, the default, is outputs/evaluation, or outputs/comparison with --compare.
    output: str | None = setting(None, path=True)
    # Whether results are compared instead: --compare FOLDER FOLDER ...; all others are compared with the first. false
    # by default.
    compare: bool = setting(False)
    # Folders of the results that --compare compares.
    results: list[str] = setting(factory=list, positional=True)

    def check(self) -> None:
        """Refuse settings that contradict each other."""
        if self.results and not self.compare:
            raise ValueError(
                f"argument {self.results[0]!r}: expected key=value, for example checkpoint=outputs/run/adapter; "
                "results are compared with --compare"
            )


def read(arguments: list[str]) -> tuple[Options, dict[str, Any], dict[str, Any]]:
    """Read the options, and separate the other settings into those of the evaluation and those of the training."""
    options, evaluation, settings = split_arguments(arguments, Options, EvaluationSettings, TrainingConfig)
    return Options(**typed_values(Options, options)), evaluation, settings


def read_all(arguments: list[str]) -> tuple[Any, ...]:
    """Read the settings that a run would use, for --print-config."""
    options, evaluation, settings = read(arguments)
    if options.compare:
        return (options,)
    folder = None
    if options.checkpoint is not None:
        folder = Path(options.checkpoint)
        if not folder.is_dir():
            from cameo.hub import local_folder

            folder = local_folder(options.checkpoint, options.checkpoint_revision)
    config, _ = run_settings(settings, CONFIGS, folder)
    return options, evaluation_settings(evaluation, config), config


def main(arguments: list[str]) -> None:
    """Evaluate or compare, and print the table."""
    from cameo.processes.launch import Launch

    Launch.from_environment().refuse_several_processes("cameo evaluate")
    options, evaluation, settings = read(arguments)
    if options.compare:
        compare(options.results, Path(options.output or "outputs/comparison"))
        return
    from cameo.evaluation.protocol import evaluate, sample_targets
    from cameo.evaluation.report import result_table, write_result
    from cameo.training.data import build_dataset
    from cameo.training.runs import data_settings, load_evaluated

    run = load_evaluated(settings, CONFIGS, checkpoint=options.checkpoint, revision=options.checkpoint_revision)
    settings_of_evaluation = evaluation_settings(evaluation, run.config)
    data = build_dataset(run.config, "validation")
    sampled = None
    if settings_of_evaluation.num_sampled and run.config.num_reference_views:
        sampled = sample_targets(run.model, run.pipeline, data, settings_of_evaluation)
    result = evaluate(
        run.model, run.pipeline, data, settings_of_evaluation, sampled=sampled, trained_head=run.trained_head
    )
    result["data"] |= data_settings(run.config)
    result["run"] = run.facts
    output = Path(options.output or "outputs/evaluation")
    name = options.checkpoint or run.config.backbone
    files = write_result(result, output, sampled=sampled, name=name)
    print(f"\n{result_table(result, name=name)}\n")
    print(f"{', '.join(file.name for file in files)} in {output}")


def compare(paths: list[str], output: Path) -> None:
    """Compare the results of several evaluations with the first of them."""
    from cameo.evaluation.compare import comparison_figure, comparison_table, name_results
    from cameo.evaluation.pictures import save_figure

    results = name_results(paths)
    table = comparison_table(results)
    print(f"\n{table}\n")
    write_atomically(output / "table.md", table + "\n")
    figure = save_figure(comparison_figure(results), output / "comparison.png")
    print(f"table.md, {figure.name} in {output}")


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe; `arguments` are those of the command line by default."""
    run_recipe(main, read_all, [Options, EvaluationSettings, TrainingConfig], about=__doc__ or "", arguments=arguments)


if __name__ == "__main__":
    run()
