"""Does CAMEO train multi-view diffusion models in fewer steps? Same data order, noise and budget in every arm.

    python -m benchmarks.convergence.study --preset tiny --jobs 2                     # on a CPU, all backbones
    python -m benchmarks.convergence.study --preset tiny --jobs 2 --repeat            # are the figures the same again?
    python -m benchmarks.convergence.study --preset small --subjects cat3d --minutes 9.5    # on a GPU, in several goes
    python -m benchmarks.convergence.study --preset tiny --subjects rgbd_room --data path/to/sequence
    python -m benchmarks.convergence.study --preset tiny --subjects cat3d --arms loss_weight=0.02 softness=1.0 --seeds 0

Trains each subject of `presets/<preset>.yaml` from scratch in each arm with each seed, and validates on the way. A
finished run is kept in `benchmarks/results/convergence/<preset>/<subject>/<arm>-<seed>.json` and not repeated; an
unfinished one is continued from its checkpoint in `--work`. With `--minutes` the run in progress is stopped in time
with a checkpoint.
The table of all finished runs is printed last; `python -m benchmarks.pages` writes docs/results.md from them.

Arms, in the order in which they run: `none`; `cameo` at the layer that the probe ranks first in the model of `none`,
with a constant loss weight; `linear`, the same with a weight that decays to zero; `other_scene` and `random`, with
matches that must not help; `wrong_layer`, at the layer that the probe ranks last; `repa`, by the features that the
preset names (`feature_model`); or any `key=value[,key=value]` of the training settings. The preset declares which of
`cameo` and `linear` is `shown`, and the arms after these two have its schedule of the loss weight.

`--repeat` makes runs that are kept once more, by default the `shown` arm with seed 0, and compares all figures but the
times with the kept ones, to the last digit; the exit status is 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.convergence import arms, repeat, runs, schedule
from benchmarks.convergence.tables import table_of_arms
from cameo.backbone import get_backbone
from cameo.data import MultiViewDataset
from cameo.data.control_hits import control_hits
from cameo.evaluation.validation import validate
from cameo.files import write_atomically
from cameo.pipeline import MultiViewPipeline
from cameo.probing import probe_layers
from cameo.probing.ablation import perturb_layers
from cameo.probing.denoising import ValidationSettings, sample_batches
from cameo.probing.layer_probe import LayerProbe
from cameo.settings import shown_settings
from cameo.training.checkpoints.folder import list_checkpoints
from cameo.training.data import build_dataset, supervised_grids
from cameo.training.layer_choice import PROBED_SAMPLES
from cameo.training.settings import TrainingConfig
from cameo.training.setup import load_pipeline, wrap_denoiser
from cameo.training.trainer import Trainer
from cameo.wrap import CameoModel

UNSAVED = ("output_dir", "train_data_dir")


class Clock:
    """Seconds of training without the validations, carried on by a resumed run.

    `busy` counts the processor time of this process, which other processes on the machine hardly change.
    """

    def __init__(self, earlier: Sequence[Mapping[str, Any]]) -> None:
        last = earlier[-1] if earlier else {"seconds": 0.0, "busy_seconds": 0.0}
        self.wall, self.busy = last["seconds"], last["busy_seconds"]
        self.start()

    def start(self) -> None:
        """Begin to count."""
        self.since = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        """Stop counting and return the sums."""
        self.wall += time.perf_counter() - self.since[0]
        self.busy += time.process_time() - self.since[1]
        return {"seconds": round(self.wall, 2), "busy_seconds": round(self.busy, 2)}


def run(
    config: TrainingConfig, validation: ValidationSettings, stop_at: float | None, *, look_inside: bool
) -> dict[str, Any] | None:
    """Train one arm with one seed; None if it was stopped before its end.

    With `look_inside` the layers of the trained model are probed and, where there are several scenes, cut one by one.
    """
    train, held_out = build_dataset(config, "train"), build_dataset(config, "validation")
    pipeline = load_pipeline(config)
    pipeline.denoiser.requires_grad_(True)
    if config.inflate:  # all of them in all arms: inflation alone changes a model
        adapter = get_backbone(config.backbone)
        for layer in adapter.inflatable_layers(pipeline.denoiser):
            adapter.inflate(pipeline.denoiser, layer.path)
    model = wrap_denoiser(pipeline, config, train)
    # Without supervision every layer is read, since which one the other arms supervise is not known yet.
    read = [] if config.loss_weight else [layer for layer in model.attention_layers if layer.unsupported is None]
    trainer = Trainer(model, pipeline, train, config, on_validation=lambda model, step: measure(model, step))
    clock = Clock(trainer.validations.read())

    def measure(model: CameoModel, step: int) -> dict[str, Any]:
        times = clock.stop()
        found = validate(model, pipeline, held_out, validation, predict_from=0.0, layers=read)
        del found["settings"]
        clock.start()
        return {**found, **times}

    timer = None
    if stop_at is not None:
        timer = threading.Timer(max(stop_at - time.monotonic(), 0.1), os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
    try:
        result = trainer.train()
    finally:
        if timer is not None:
            timer.cancel()
    if result.stopped_by:
        return None
    history = result.history()
    record = {
        "layer": model.supervised_layers[0].path,
        "parameters": sum(parameter.numel() for parameter in pipeline.denoiser.parameters()),
        "validations": result.validations,
        "losses": [[entry["step"], entry["loss"], entry["alignment_loss"]] for entry in history[9::10]],
    }
    if config.correspondence_control == "other_scene":
        hits = control_hits(train, supervised_grids(model, config)[0], batch_size=config.train_batch_size)
        record["control_within_one_token"] = hits.control
    if look_inside:
        record["probe"] = probe(pipeline, held_out, config, validation).to_dict()
        if config.data_format != "rgbd":  # a sequence is one scene, and intervals are over scenes
            record["effects"] = [asdict(effect) for effect in perturb_layers(model, pipeline, held_out, validation)]
    return record


def probe(
    pipeline: MultiViewPipeline, data: MultiViewDataset, config: TrainingConfig, validation: ValidationSettings
) -> LayerProbe:
    """Rank the layers of a trained model."""
    device = next(pipeline.denoiser.parameters()).device
    batches = (batch for _, batch in sample_batches(data, PROBED_SAMPLES, validation.batch_size, device))
    levels = validation.noise_levels
    return probe_layers(
        pipeline, batches, levels, backbone=config.backbone, inflate=config.inflate, own_view=config.own_view
    )


def run_and_keep(options: argparse.Namespace, run_of: schedule.RunOf, stop_at: float | None) -> bool:
    """Make one result file, from the checkpoint of an earlier attempt if there is one; False if time ran out."""
    subject, arm, seed = run_of
    folder = Path(options.work) / options.preset / subject / f"{arm}-{seed}"
    rules = arms.declared(options.preset, subject)
    settings = arms.settings_of(options.preset, subject, options.data)
    settings |= arms.arm_settings(arm, rules, schedule.known_probe(options.preset, subject))
    validation = ValidationSettings(**settings.pop("validation"))
    latest = "latest" if list_checkpoints(folder) else None
    config = TrainingConfig(**settings, seed=seed, output_dir=str(folder), resume_from_checkpoint=latest)
    print(f"{subject} {arm} seed {seed}", flush=True)
    look_inside = seed == rules.probe_seed and arm in ("none", rules.shown)
    record = run(config, validation, stop_at, look_inside=look_inside)
    if record is None:
        return False
    cuda = torch.cuda.is_available()
    facts = {
        "subject": subject,
        "arm": arm,
        "seed": seed,
        "preset": options.preset,
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": {name: value for name, value in shown_settings(config).items() if name not in UNSAVED},
        "validation_settings": asdict(validation),
    }
    path = runs.result_path(options.preset, run_of, options.results)
    write_atomically(path, json.dumps({**facts, **record}) + "\n")
    return True


def main(arguments: list[str]) -> None:
    """Run what is missing, then print the tables; or repeat what is kept."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="tiny", choices=sorted(path.stem for path in arms.PRESETS.glob("*.yaml")))
    parser.add_argument("--subjects", nargs="+", help="default: those of the preset that need no --data")
    parser.add_argument("--arms", nargs="+", help=f"default: {', '.join(arms.ARMS)}; with --repeat, the shown arm")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; with --repeat, 0")
    parser.add_argument("--data", help="folder of an RGB-D sequence, for subjects with data_format: rgbd")
    parser.add_argument("--work", default="outputs/convergence", help="checkpoints of unfinished runs")
    parser.add_argument("--results", type=Path, help="folder of the result files; default: that of the pages")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--minutes", type=float, help="stop with a checkpoint after so long")
    parser.add_argument("--quiet", action="store_true", help="print no table at the end")
    parser.add_argument("--repeat", action="store_true", help="compare runs that are kept with the same made again")
    options = parser.parse_args(arguments)
    options.subjects = options.subjects or arms.families(options.preset)
    if options.repeat:
        raise SystemExit(repeat.main(options))
    options.arms, options.seeds = options.arms or list(arms.ARMS), options.seeds or [0, 1, 2]
    stop_at = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    failed = []
    if options.jobs > 1:
        failed = schedule.run_in_processes(options, schedule.missing_runs(options), stop_at)
    else:
        for run_of in schedule.missing_runs(options):
            if stop_at is not None and time.monotonic() > stop_at - 20:
                break
            if not run_and_keep(options, run_of, stop_at):
                break
    for subject in [] if options.quiet else options.subjects:
        results = runs.load_results(options.preset, subject, options.results)
        shown = arms.declared(options.preset, subject).shown
        table = table_of_arms(results, shown) if results else "no run"
        print(f"\n{subject}, preset {options.preset}\n\n{table}")
    if failed:
        raise SystemExit("failed: " + "; ".join("{} {} seed {}".format(*run_of) for run_of in failed))
    if left := schedule.missing_runs(options):
        print(f"\n{len(left)} runs are left; the same command goes on with them")


if __name__ == "__main__":
    main(sys.argv[1:])
