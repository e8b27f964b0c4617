"""How often are the matches of another scene right by accident, on the data of each subject of the study?

    python -m benchmarks.convergence.control_hits --preset tiny
    python -m benchmarks.convergence.control_hits --preset tiny --subjects cat3d camera_rig=fan num_views=3

The arm `other_scene` of `benchmarks.convergence.study` trains with the matches of the next sample of the batch. It is a
control as far as these are wrong: where all scenes are seen from the same poses they come near the truth, and the arm
may gain from them. The table gives, over the first training samples, the share of the control's matches within one
token of the true ones (in all views, and in the reference alone), the same for a token drawn uniformly, the share of
the targets' tokens that have a match in the reference, and how much of a target the reference shows. Nothing is
trained. Further arguments are settings of the training, on top of those of the subject.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.convergence import arms, schedule
from cameo.backbone import get_backbone
from cameo.data.control_hits import ControlHits, control_hits
from cameo.settings import split_arguments, typed_values
from cameo.tables import markdown_table
from cameo.training.data import build_dataset, supervised_grids
from cameo.training.settings import TrainingConfig
from cameo.training.setup import load_pipeline, wrap_denoiser

HEADER = ("subject", "control within 1 token", "in the reference", "chance", "matched", "overlap, 5 / 50 / 95 %")


def hits_of(
    preset: str, subject: str, changed: Mapping[str, Any], *, data: str | None = None, num_samples: int = 128
) -> ControlHits:
    """Count on the training samples of a subject, at the token grid of the layer that the study supervises."""
    settings = arms.settings_of(preset, subject, data)
    del settings["validation"]
    probe = schedule.known_probe(preset, subject)
    layer = {"layer": 0} if probe is None else arms.arm_settings("cameo", arms.declared(preset, subject), probe)
    config = TrainingConfig(**settings | layer | dict(changed))
    train, pipeline = build_dataset(config, "train"), load_pipeline(config)
    if config.inflate:
        adapter = get_backbone(config.backbone)
        for inflatable in adapter.inflatable_layers(pipeline.denoiser):
            adapter.inflate(pipeline.denoiser, inflatable.path)
    grids = supervised_grids(wrap_denoiser(pipeline, config, train), config)[0]
    return control_hits(train, grids, batch_size=config.train_batch_size, num_samples=num_samples)


def row(subject: str, hits: ControlHits) -> list[str]:
    """Format one row of the table."""
    shares = (hits.control, hits.control_in_reference, hits.chance, hits.matched)
    return [subject, *(f"{share:.0%}" for share in shares), " / ".join(f"{share:.2f}" for share in hits.overlap)]


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="tiny", choices=sorted(path.stem for path in arms.PRESETS.glob("*.yaml")))
    parser.add_argument("--subjects", nargs="+", default=[], help="default: those of the preset that need no --data")
    parser.add_argument("--data", help="folder of an RGB-D sequence, for the subject rgbd_room")
    parser.add_argument("--samples", type=int, default=128, help="training samples to count over")
    options, overrides = parser.parse_known_args(arguments)
    named = [subject for subject in options.subjects if "=" not in subject]  # the rest are settings
    overrides = [*(subject for subject in options.subjects if "=" in subject), *overrides]
    (given,) = split_arguments(overrides, TrainingConfig)
    changed = typed_values(TrainingConfig, given)
    rows = []
    for subject in named or arms.families(options.preset):
        hits = hits_of(options.preset, subject, changed, data=options.data, num_samples=options.samples)
        rows.append(row(subject, hits))
    print(markdown_table(HEADER, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
