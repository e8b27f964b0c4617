"""Compute the matches of a training set once, so that the training reads them instead of computing them.

    cameo precompute config=my.yaml precomputed_correspondence=matches
    cameo lora       config=my.yaml precomputed_correspondence=matches
    torchrun --nproc_per_node 2 -m cameo.recipes.precompute_correspondence config=my.yaml ...  # several processes

The settings are those of the training, so one settings file serves both, and a few more; --help lists all of them,
--print-config prints those that a run would use.

Matches that are written are kept: an interrupted run continues and loses ten minutes of work at most, a longer training
adds to the folder, and if no match is missing nothing is done. Processes divide the scenes by their number in the
environment, and need not run at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cameo.recipes import CONFIGS
from cameo.settings import Settings, run_recipe, setting, split_arguments, typed_values
from cameo.training.settings import TrainingConfig, load_config, settings_file


@dataclass
class Options(Settings):
    """Which matches are computed, and how they are written."""

    # Pairs of views: drawn, those that the samples of this run have, for scenes of many views; all pairs of every
    # scene, for runs of any length and seed; auto, the default, takes all where scenes have at most 16 views.
    pairs: str = setting("auto", choices=("auto", "drawn", "all"))
    # How many processes will train, >= 1. null, the default, is as many as compute the matches.
    training_processes: int | None = setting(None, at_least=1)
    # Size in megabytes that no file exceeds, >= 1. 128 by default.
    shard_megabytes: int = setting(128, at_least=1)


def read(arguments: list[str]) -> tuple[Options, TrainingConfig]:
    """Read the options, and the settings of the training."""
    options, settings = split_arguments(arguments, Options, TrainingConfig)
    config = load_config(settings_file("lora", CONFIGS, settings), settings)
    return Options(**typed_values(Options, options)), config


def main(arguments: list[str]) -> None:
    """Fill the folder, and print how much was written and which processes have not finished."""
    options, config = read(arguments)
    from cameo.training.precompute import Share, precompute

    share = Share.from_environment()
    done = precompute(
        config,
        pairs=options.pairs,
        training_processes=options.training_processes or share.num_processes,
        shard_bytes=options.shard_megabytes << 20,
        share=share,
    )
    folder = config.precomputed_correspondence
    if done.num_kept is None:
        print(f"{folder}: everything is there, nothing was done")
        return
    each = f", {done.num_bytes / done.num_pairs:,.0f} bytes each" if done.num_pairs else ""
    print(
        f"{folder}: {done.num_pairs:,} pairs of views written in {done.seconds:.1f} s, {done.num_bytes / 1e6:.1f} MB"
        f"{each}; {done.num_kept:,} were there"
    )
    if done.waiting:
        print(f"still to be done by process {', '.join(map(str, done.waiting))} of {share.num_processes}")


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe; `arguments` are those of the command line by default."""
    run_recipe(main, read, [Options, TrainingConfig], about=__doc__ or "", arguments=arguments)


if __name__ == "__main__":
    run()
