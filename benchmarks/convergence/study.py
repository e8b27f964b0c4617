"""Does CAMEO train multi-view diffusion models in fewer steps? Same data order, noise and budget in every arm.

    python -m benchmarks.convergence.study --preset tiny                              # on a CPU, all backbones
    python -m benchmarks.convergence.study --preset small --subjects cat3d --minutes 9.5    # on a GPU, in several goes
    python -m benchmarks.convergence.study --preset tiny --subjects rgbd_room --data path/to/sequence
    python -m benchmarks.convergence.study --preset tiny --subjects cat3d --arms loss_weight=0.02 softness=1.0 --seeds 0

Trains each subject of `presets/<preset>.yaml` from scratch in each arm with each seed, and validates on the way. A
finished run is kept in `benchmarks/results/convergence/<preset>/<subject>/<arm>-<seed>.json` and not repeated; an
unfinished one is continued from its checkpoint in `--work`. With `--minutes` the run in progress is stopped in time
with a checkpoint.
The table of all finished runs is printed last; `python -m benchmarks.pages` writes docs/results.md from them.

Arms: `none`; `cameo` at the layer that the probe ranks best in the model of `none`, seed 0; `wrong_layer` at the one it
ranks last; `other_scene` and `random`, CAMEO with matches that must not help; `repa`, by the
features that the preset names (`feature_model: xfeat` needs the extra `matching`); or any `key=value[,key=value]`
of the training settings on top of `cameo`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import page
from benchmarks.convergence.curves import load_results, table_of_arms
from cameo.backbone import get_backbone
from cameo.data import MultiViewDataset
from cameo.evaluation.validation import validate
from cameo.files import write_atomically
from cameo.pipeline import MultiViewPipeline
from cameo.probing import probe_layers
from cameo.probing.ablation import perturb_layers
from cameo.probing.denoising import ValidationSettings, sample_batches
from cameo.probing.layer_probe import LayerProbe
from cameo.settings import current_names, read_yaml, shown_settings, split_arguments, typed_values
from cameo.training.checkpoint import list_checkpoints
from cameo.training.data import build_dataset
from cameo.training.layer_choice import PROBED_SAMPLES
from cameo.training.settings import TrainingConfig
from cameo.training.setup import load_pipeline, wrap_denoiser
from cameo.training.trainer import Trainer
from cameo.wrap import CameoModel

MODULE = "benchmarks.convergence.study"
PRESETS = Path(__file__).parent / "presets"
RESULTS = page.RESULTS / "convergence"
SUBJECTS = ("cat3d", "mvdream", "zero123plus", "sv3d", "cat3d_transformer")
ARMS = ("none", "cameo", "wrong_layer", "other_scene", "random", "repa")
UNSAVED = ("output_dir", "train_data_dir")


def settings_of(preset: str, subject: str, data: str | None) -> dict[str, Any]:
    """Return the training settings of a subject, without those of an arm."""
    file = read_yaml(PRESETS / f"{preset}.yaml")
    if subject not in file["subjects"]:
        raise SystemExit(f"--subjects {subject}: expected some of {', '.join(file['subjects'])}")
    typed = {**file["common"], **file["subjects"][subject]}
    validation = typed_values(ValidationSettings, typed.pop("validation"))
    settings = {**typed_values(TrainingConfig, current_names(TrainingConfig, typed)), "validation": validation}
    if settings.get("data_format") == "rgbd":
        if data is None:
            raise SystemExit(f"--subjects {subject}: needs --data, the folder of an RGB-D sequence")
        settings["train_data_dir"] = data
    return settings


def arm_settings(arm: str, probe: LayerProbe | None) -> dict[str, Any]:
    """Return what an arm changes; `none` needs no probe."""
    if arm == "none":
        return {"loss_weight": 0.0}
    if probe is None:
        raise SystemExit(f"--arms {arm}: its layer comes from the arm none with seed 0; run that first")
    ranked = [entry.path for entry in probe.ranking]
    settings: dict[str, dict[str, Any]] = {
        "cameo": {},
        "wrong_layer": {"layer": ranked[-1]},
        "other_scene": {"correspondence_control": "other_scene"},
        "random": {"correspondence_control": "random"},
        "repa": {"supervision": "repa"},
    }
    if arm not in settings:
        settings[arm] = free_arm(arm, ranked)
    return {"layer": ranked[0], **settings[arm]}


def free_arm(arm: str, ranked: Sequence[str]) -> dict[str, Any]:
    """Read `key=value,key=value`; `layers=3` means the best three, `rank=2` the layer on that place of the ranking."""
    if "=" not in arm:
        raise SystemExit(f"--arms {arm}: expected one of {', '.join(ARMS)} or key=value[,key=value]")
    ranking, settings = split_arguments(arm.split(","), Ranking, TrainingConfig)
    chosen, values = typed_values(Ranking, ranking), typed_values(TrainingConfig, settings)
    if "layers" in chosen:
        values["layer"] = list(ranked[: chosen["layers"]])
    if "rank" in chosen:
        values["layer"] = ranked[chosen["rank"]]
    return values


@dataclass
class Ranking:
    """What an arm may say of its layer: the best `layers`, or the one on place `rank` of the ranking, from 0."""

    layers: int = 1
    rank: int = 0


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
    trainer = Trainer(model, pipeline, train, config, on_validation=lambda model, step: measure(model, step))
    clock = Clock(trainer.validations.read())

    def measure(model: CameoModel, step: int) -> dict[str, Any]:
        times = clock.stop()
        found = validate(model, pipeline, held_out, validation)
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
    return probe_layers(pipeline, batches, levels, backbone=config.backbone, inflate=config.inflate)


def result_path(preset: str, subject: str, arm: str, seed: int) -> Path:
    """Where a finished run is kept."""
    return RESULTS / preset / subject / f"{arm}-{seed}.json"


def known_probe(preset: str, subject: str) -> LayerProbe | None:
    """Return the ranking of the layers in the model of `none`, seed 0, if that run is finished."""
    path = result_path(preset, subject, "none", 0)
    return LayerProbe.from_dict(json.loads(path.read_text(encoding="utf-8"))["probe"]) if path.is_file() else None


def run_and_keep(options: argparse.Namespace, subject: str, arm: str, seed: int, stop_at: float | None) -> bool:
    """Make one result file, from the checkpoint of an earlier attempt if there is one; False if time ran out."""
    folder = Path(options.work) / options.preset / subject / f"{arm}-{seed}"
    settings = settings_of(options.preset, subject, options.data)
    settings |= arm_settings(arm, known_probe(options.preset, subject))
    validation = ValidationSettings(**settings.pop("validation"))
    latest = "latest" if list_checkpoints(folder) else None
    config = TrainingConfig(**settings, seed=seed, output_dir=str(folder), resume_from_checkpoint=latest)
    print(f"{subject} {arm} seed {seed}", flush=True)
    record = run(config, validation, stop_at, look_inside=seed == 0 and arm in ("none", "cameo"))
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
    write_atomically(result_path(options.preset, subject, arm, seed), json.dumps({**facts, **record}) + "\n")
    return True


def missing_runs(options: argparse.Namespace) -> list[tuple[str, str, int]]:
    """List the runs without a result file, those that others depend on first."""
    wanted = [
        (subject, arm, seed)
        for arm in sorted(options.arms, key=lambda arm: arm != "none")
        for seed in options.seeds
        for subject in options.subjects
    ]
    return [run_of for run_of in wanted if not result_path(options.preset, *run_of).is_file()]


def run_in_processes(options: argparse.Namespace, runs: Sequence[tuple[str, str, int]], stop_at: float | None) -> None:
    """Make the result files, `--jobs` at a time, each in a process of its own with its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    waiting, going = list(runs), []
    while waiting or going:
        going = [process for process in going if not finished(process)]
        while waiting and len(going) < options.jobs and (stop_at is None or time.monotonic() < stop_at):
            subject, arm, seed = waiting[0]
            if arm != "none" and known_probe(options.preset, subject) is None:
                break  # its layer is still to be found
            command = [sys.executable, "-m", MODULE, "--preset", options.preset, "--subjects", subject, "--arms", arm]
            command += ["--seeds", str(seed), "--work", options.work]
            command += ["--data", options.data] if options.data else []
            command += ["--minutes", str((stop_at - time.monotonic()) / 60)] if stop_at is not None else []
            going.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}))
            waiting.pop(0)
        if waiting and not going:
            return
        time.sleep(0.5)


def finished(process: subprocess.Popen[bytes]) -> bool:
    """Whether a run has ended; raises if it failed."""
    code = process.poll()
    if code:
        raise SystemExit(f"{' '.join(map(str, process.args))}: failed with exit status {code}")
    return code is not None


def main(arguments: list[str]) -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="tiny", choices=sorted(path.stem for path in PRESETS.glob("*.yaml")))
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", help="folder of an RGB-D sequence, for the subject rgbd_room")
    parser.add_argument("--work", default="outputs/convergence", help="checkpoints of unfinished runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--minutes", type=float, help="stop with a checkpoint after so long")
    options = parser.parse_args(arguments)
    stop_at = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    if options.jobs > 1:
        run_in_processes(options, missing_runs(options), stop_at)
    else:
        for subject, arm, seed in missing_runs(options):
            if stop_at is not None and time.monotonic() > stop_at - 20:
                break
            if not run_and_keep(options, subject, arm, seed, stop_at):
                break
    left = missing_runs(options)
    for subject in options.subjects:
        results = load_results(RESULTS / options.preset / subject)
        print(
            f"\n{subject}, preset {options.preset}\n\n{table_of_arms(results)}" if results else f"\n{subject}: no run"
        )
    if left:
        print(f"\n{len(left)} runs are left; the same command goes on with them")


if __name__ == "__main__":
    main(sys.argv[1:])
