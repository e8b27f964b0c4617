"""Find the layers of a multi-view diffusion model whose attention looks at the same surface point in other views.

    python recipes/probe_layers.py backbone=cat3d                                    # the base of the settings file
    python recipes/probe_layers.py checkpoint=outputs/lora-cat3d-tiny/adapter        # a trained model, or its run's
    python recipes/probe_layers.py backbone=sv3d layers=0,2 timesteps=0.5,1.0 train_data_dir=path/to/rgbd
    python recipes/probe_layers.py backbone=cat3d --perturb                          # and what each layer is needed for
    python recipes/probe_layers.py --list backbone=zero123plus                       # only list the layers
    python recipes/probe_layers.py --list backbone=mvdream pretrained_model_name_or_path=path/to/model

Settings are those of the training recipes. Probed are `num_validation_samples` samples of the validation set; with
`inflate=true` the layers that see one view each, as if they were joined. A checkpoint is what `recipes/evaluate.py`
takes (`checkpoint_revision=` for a Hub repository). `--perturb` validates the model with the attention of one layer at
a time cut to its own view.

Written to `output` (default `outputs/probe`): probe.json, for `cameo.wrap(layer="auto", probe=LayerProbe.load(...))`,
table.md and heat_map.png; with --perturb also perturbation.png. With --list nothing is written, and `resolution` and
`num_views` are what the token grids are told for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import cameo
from cameo.backbone import get_backbone
from cameo.config import write_atomically
from cameo.evaluation.pictures import save_figure
from cameo.evaluation.runs import evaluation_settings, load_evaluated
from cameo.evaluation.validation import ValidationSettings, sample_batches
from cameo.listing import layer_table
from cameo.model import CameoModel
from cameo.perturbation import effects_figure, effects_table, perturb_layers
from cameo.pipeline import MultiViewPipeline
from cameo.training.config import TrainingConfig, load_config, settings_file
from cameo.training.data import build_dataset
from cameo.training.launch import Launch
from cameo.training.setup import load_pipeline

CONFIGS = Path(__file__).parent / "configs"
OPTIONS = ("checkpoint", "checkpoint_revision", "layers", "timesteps", "output")
FLAGS = ("--list", "--perturb")


def main(arguments: list[str]) -> None:
    """Probe the layers, or list them; prints a table."""
    Launch.from_environment().refuse_several_processes("recipes/probe_layers.py")
    flags = {argument for argument in arguments if argument in FLAGS}
    given = dict(argument.lstrip("-").partition("=")[::2] for argument in arguments if argument not in FLAGS)
    options = {name: value for name, value in given.items() if name in OPTIONS}
    settings = [f"{name}={value}" for name, value in given.items() if name not in OPTIONS]
    if "--list" in flags:
        if unused := sorted(flags - {"--list"} | options.keys()):
            raise SystemExit(f"--list: only lists the layers; leave out {', '.join(unused)}")
        list_layers(read_settings(settings))
        return
    pipeline, wrapped, config = load_model(options, settings)
    data = build_dataset(config, "validation")
    device = next(pipeline.denoiser.parameters()).device
    batches = sample_batches(data, config.num_validation_samples, config.train_batch_size, device)
    probe = cameo.probe_layers(
        wrapped or pipeline,
        (batch for _, batch in batches),
        **read_numbers(options),
        prepare=pipeline,
        backbone=config.backbone,
        inflate=config.inflate,
        metric=evaluation_settings({}, config).metric_depth,
    )
    output = Path(options.get("output", "outputs/probe"))
    files = [probe.save(output / "probe.json"), save_figure(probe.heat_map(), output / "heat_map.png")]
    table = probe.table()
    if "--perturb" in flags:
        model = wrapped or cameo.wrap(pipeline.denoiser, config.backbone)  # which layer it supervises does not matter
        checked = ValidationSettings(num_samples=config.num_validation_samples, batch_size=config.train_batch_size)
        # Layers that were probed as if they were joined mix no views yet; then those that do are cut.
        chosen = None if probe.inflate and wrapped is None else [layer.path for layer in probe.layers]
        effects = perturb_layers(model, pipeline, data, checked, chosen)
        lost = {
            effect.path: "{:.2f} [{:.2f}, {:.2f}]".format(*effect.drop_psnr_all)
            for effect in effects
            if effect.drop_psnr_all is not None
        }
        table = f"{probe.table(columns={'PSNR lost without it (dB)': lost})}\n\n{effects_table(effects)}"
        if lost:
            files.append(save_figure(effects_figure(effects), output / "perturbation.png"))
    write_atomically(output / "table.md", table + "\n")
    print(f"\n{table}\n")
    print(f"best layer: {probe.best}; table.md, {', '.join(file.name for file in files)} in {output}")


def load_model(
    options: dict[str, str], settings: list[str]
) -> tuple[MultiViewPipeline, CameoModel | None, TrainingConfig]:
    """Load the pipeline; with a checkpoint whose alignment head is trained, also the model that holds it."""
    if "checkpoint" not in options:
        config = read_settings(settings)
        pipeline: Any = load_pipeline(config)
        return pipeline.to("cuda") if torch.cuda.is_available() else pipeline, None, config
    run = load_evaluated(
        settings, CONFIGS, checkpoint=options["checkpoint"], revision=options.get("checkpoint_revision")
    )
    run.pipeline.denoiser = run.model.base_model
    if run.trained_head:
        return run.pipeline, run.model, run.config
    run.model.unwrap()
    return run.pipeline, None, run.config


def read_settings(settings: list[str]) -> TrainingConfig:
    """Read the settings file of the backbone, with the settings of the command line in place of its own."""
    if any(setting.startswith("pretrained_model_name_or_path=") for setting in settings):
        settings = ["preset=null", *settings]  # that of the settings file
    return load_config(settings_file("lora", CONFIGS, settings), settings)


def read_numbers(options: dict[str, str]) -> dict[str, Any]:
    """Read `layers` and `timesteps`, lists with commas."""
    numbers: dict[str, Any] = {}
    if "layers" in options:
        names = options["layers"].split(",")
        numbers["layers"] = [int(name) if name.isdecimal() else name for name in names]
    if "timesteps" in options:
        numbers["timesteps"] = [float(level) for level in options["timesteps"].split(",")]
    return numbers


def list_layers(config: TrainingConfig) -> None:
    """Print the layers in which the views meet."""
    denoiser = load_pipeline(config).denoiser
    size = {"height": config.resolution, "width": config.resolution, "num_views": config.num_views}
    print(f"{config.backbone}: {type(denoiser).__name__}, {config.num_views} views of {config.resolution} px\n")
    print(layer_table(get_backbone(config.backbone), denoiser, **size))


if __name__ == "__main__":
    main(sys.argv[1:])
