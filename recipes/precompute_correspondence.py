"""Compute the matches of a training set once, so that the training reads them instead of computing them.

    python recipes/precompute_correspondence.py config=my.yaml precomputed_correspondence=matches
    python recipes/lora_finetune.py             config=my.yaml precomputed_correspondence=matches
    torchrun --nproc_per_node 2 recipes/precompute_correspondence.py config=my.yaml precomputed_correspondence=matches

Settings are those of the training, so its settings file serves both. Besides them:

    pairs=drawn               the pairs of views that the samples of this run have, for scenes of many views
    pairs=all                 all pairs of every scene, for runs of any length and seed; auto (the default) takes all
                              where scenes have at most 16 views
    training_processes=8      how many processes will train; without it as many as compute the matches
    shard_megabytes=128       size that no file exceeds

What is written stays: a run that was interrupted goes on and has lost ten minutes at most, a longer training adds to
the folder, and where all is there nothing is done. Processes share the scenes by their number in the environment and
need not run at the same time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cameo.training.config import load_config, settings_file
from cameo.training.precompute import Share, precompute

CONFIGS = Path(__file__).parent / "configs"
OPTIONS = ("pairs", "training_processes", "shard_megabytes")


def main(arguments: list[str]) -> None:
    """Fill the folder, and say how much was written and what is still to be done."""
    options, settings = {}, []
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if name in OPTIONS and equals:
            options[name] = value
        else:
            settings.append(argument)
    config, share = load_config(settings_file("lora", CONFIGS, settings), settings), Share.from_environment()
    done = precompute(
        config,
        pairs=options.get("pairs", "auto"),
        training_processes=_whole_number(options, "training_processes", share.num_processes),
        shard_bytes=_whole_number(options, "shard_megabytes", 128) << 20,
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


def _whole_number(options: dict[str, str], name: str, default: int) -> int:
    value = options.get(name, str(default))
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value}")
    return int(value)


if __name__ == "__main__":
    main(sys.argv[1:])
