"""Check whether cameras, depth and images of a data set fit together, before anything is trained on them.

    cameo check-data train_data_dir=path/to/data  # any folder that a training can read
    cameo check-data train_data_dir=path/to/data depth_scale=5000 resolution=256
    cameo check-data config=my.yaml               # the data of a run
    cameo check-data                              # embedded rooms, which are right

The settings are those of the training recipes, and a few more; --help lists all of them, --print-config prints those
that a run would use. Printed are figures for pairs of views and a verdict in words: "agrees"; "wrong", with what it
looks like and the cure; or "cannot tell". The exit status is 0, 1 or 3; it is 2 where the data cannot be opened.

Written to `output` (default `outputs/check_data`): table.md with the figures and the verdict, and check.png with
matched points, views warped into each other and their differences, as given and as it looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cameo.files import write_atomically
from cameo.recipes import CONFIGS
from cameo.settings import Settings, run_recipe, setting, split_arguments, typed_values
from cameo.training.settings import TrainingConfig, load_config, settings_file


@dataclass
class Options(Settings):
    """What is compared, and where the result is written."""

    # Folder of the table and the picture. outputs/check_data by default.
    output: str = setting("outputs/check_data", path=True)
    # Scenes that are looked at, evenly spread, >= 1. 6 by default, which takes seconds.
    scenes: int = setting(6, at_least=1)
    # Pairs of views that are compared, of all scenes together, >= 1. 48 by default; more make a verdict more certain
    # where views hardly overlap.
    pairs: int = setting(48, at_least=1)
    # Pairs of views that are drawn, >= 1. 3 by default.
    pictures: int = setting(3, at_least=1)


def read(arguments: list[str]) -> tuple[Options, TrainingConfig]:
    """Read the options, and the settings of the training."""
    options, settings = split_arguments(arguments, Options, TrainingConfig)
    config = load_config(settings_file("lora", CONFIGS, settings), settings)
    return Options(**typed_values(Options, options)), config


def main(arguments: list[str]) -> None:
    """Check the training data, print and write the result, and end with the exit status of the verdict."""
    options, config = read(arguments)
    from cameo.inspection import check_views
    from cameo.processes.launch import Launch
    from cameo.training.data import build_dataset

    Launch.from_environment().refuse_several_processes("cameo check-data")
    # Data without depth is opened too, whatever the run would match with.
    source = build_dataset(replace(config, loss_weight=0.0, compare_without_cameo=False), "train").source
    check = check_views(source, scenes=options.scenes, pairs=options.pairs)
    output = Path(options.output)
    write_atomically(output / "table.md", f"{check}\n")
    picture = check.draw(output / "check.png", pairs=options.pictures)
    print(f"{check}\n\ntable.md and {picture.name} in {output}")
    raise SystemExit(check.exit_status)


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe; `arguments` are those of the command line by default."""
    run_recipe(main, read, [Options, TrainingConfig], about=__doc__ or "", arguments=arguments)


if __name__ == "__main__":
    run()
