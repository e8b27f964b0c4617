"""Find the layers of a multi-view diffusion model whose attention matches the same surface point in other views.

    cameo probe backbone=cat3d                              # the base of the settings file
    cameo probe checkpoint=outputs/lora-cat3d-tiny/adapter  # a trained model, or its run's
    cameo probe backbone=sv3d layers=0,2 timesteps=0.5,1.0 train_data_dir=path/to/rgbd
    cameo probe backbone=cat3d --perturb                    # and the effect of each layer
    cameo probe --list backbone=zero123plus                 # only list the layers
    cameo probe --list backbone=mvdream pretrained_model_name_or_path=path/to/model

The settings are those of the training recipes, and a few more; --help lists all of them, --print-config prints those
that a run would use. The layers are probed on `num_validation_samples` samples of the validation set; with
`inflate=true` these are the layers that see one view each, as if they were inflated. A checkpoint is given as for
`cameo evaluate` (`checkpoint_revision=` for a Hub repository). `--perturb` validates the model with the attention
of one layer at a time restricted to its own view.

Written to `output` (default `outputs/probe`): probe.json, for `cameo.wrap(layer="auto", probe=LayerProbe.load(...))`,
table.md and heat_map.png; with --perturb also perturbation.png. With --list nothing is written, and the token grids are
those for `resolution` and `num_views`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cameo.files import write_atomically
from cameo.recipes import CONFIGS
from cameo.settings import Settings, run_recipe, setting, split_arguments, typed_values
from cameo.training.run_settings import evaluation_settings, run_settings
from cameo.training.settings import TrainingConfig

if TYPE_CHECKING:
    from cameo import CameoModel
    from cameo.pipeline import MultiViewPipeline


@dataclass
class Options(Settings):
    """What is probed, and where the result is written."""

    # Saved adapter or pipeline, checkpoint-N of a run, or id of a Hub repository. null, the default, probes the base
    # that the settings name.
    checkpoint: str | None = setting(None, path=True)
    # Branch, tag or commit of checkpoint on the Hub. null, the default, is the main branch.
    checkpoint_revision: str | None = setting(None)
    # Layers to probe, by index in execution order or module path: 0,2. null, the default, probes all.
    layers: tuple[int | str, ...] | None = setting(None)
    # Noise levels at which the layers are probed, shares of the last timestep in [0, 1]: 0.5,1.0. By default from
    # little noise to pure noise, as `cameo.probe_layers` has them.
    timesteps: tuple[float, ...] = setting((0.1, 0.3, 0.5, 0.7, 0.9, 1.0), share="[0, 1]")
    # Folder of the result. outputs/probe by default.
    output: str = setting("outputs/probe", path=True)
    # Whether the model is also validated with each layer restricted to its own view, to measure the effect of the
    # layer. false by default, since it takes one validation for each layer.
    perturb: bool = setting(False)
    # Whether the layers are only listed, and whether each can be supervised; nothing is measured or written. false by
    # default.
    list: bool = setting(False)


def read(arguments: list[str]) -> tuple[Options, dict[str, Any]]:
    """Read the options, and leave the settings of the training as they were typed."""
    options, settings = split_arguments(arguments, Options, TrainingConfig)
    if options.get("list", "false") != "false" and (unused := sorted(options.keys() - {"list"})):
        raise ValueError(f"--list: only lists the layers; leave out {', '.join(unused)}")
    return Options(**typed_values(Options, options)), settings


def read_all(arguments: list[str]) -> tuple[Options, TrainingConfig]:
    """Read the settings that a run would use, for --print-config."""
    options, settings = read(arguments)
    folder = None if options.checkpoint is None else Path(options.checkpoint)
    if folder is not None and not folder.is_dir():
        from cameo.hub import local_folder

        folder = local_folder(str(options.checkpoint), options.checkpoint_revision)
    return options, run_settings(settings, CONFIGS, folder)[0]


def main(arguments: list[str]) -> None:
    """Probe the layers, or list them, and print a table."""
    from cameo.processes.launch import Launch

    Launch.from_environment().refuse_several_processes("cameo probe")
    options, settings = read(arguments)
    if options.list:
        list_layers(run_settings(settings, CONFIGS, None)[0])
        return
    import cameo
    from cameo.evaluation.pictures import save_figure
    from cameo.probing.ablation import effects_figure, effects_table, perturb_layers
    from cameo.probing.denoising import ValidationSettings, sample_batches
    from cameo.training.data import build_dataset

    pipeline, wrapped, config = load_model(options, settings)
    data = build_dataset(config, "validation")
    device = next(pipeline.denoiser.parameters()).device
    batches = sample_batches(data, config.num_validation_samples, config.train_batch_size, device)
    probe = cameo.probe_layers(
        wrapped or pipeline,
        (batch for _, batch in batches),
        options.timesteps,
        layers=options.layers,
        prepare=pipeline,
        backbone=config.backbone,
        inflate=config.inflate,
        own_view=config.own_view,
        metric=evaluation_settings({}, config).metric_depth,
    )
    output = Path(options.output)
    files = [probe.save(output / "probe.json"), save_figure(probe.heat_map(), output / "heat_map.png")]
    table = probe.table()
    if options.perturb:
        model = wrapped or cameo.wrap(pipeline.denoiser, config.backbone)  # which layer it supervises does not matter
        checked = ValidationSettings(num_samples=config.num_validation_samples, batch_size=config.train_batch_size)
        # Layers that see one view each cannot be cut; then the cross-view layers are.
        chosen = (
            None if probe.own_view or (probe.inflate and wrapped is None) else [layer.path for layer in probe.layers]
        )
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
    options: Options, settings: dict[str, Any]
) -> tuple[MultiViewPipeline, CameoModel | None, TrainingConfig]:
    """Load the pipeline; with a checkpoint whose alignment head is trained, also the model that holds it."""
    if options.checkpoint is None:
        import torch

        from cameo.training.setup import load_pipeline

        config, _ = run_settings(settings, CONFIGS, None)
        pipeline: Any = load_pipeline(config)
        return pipeline.to("cuda") if torch.cuda.is_available() else pipeline, None, config
    from cameo.training.runs import load_evaluated

    run = load_evaluated(settings, CONFIGS, checkpoint=options.checkpoint, revision=options.checkpoint_revision)
    run.pipeline.denoiser = run.model.base_model
    if run.trained_head:
        return run.pipeline, run.model, run.config
    run.model.unwrap()
    return run.pipeline, None, run.config


def list_layers(config: TrainingConfig) -> None:
    """Print the layers in which tokens of several views attend to each other."""
    from cameo.backbone import get_backbone
    from cameo.probing.listing import layer_table
    from cameo.training.setup import load_pipeline

    denoiser = load_pipeline(config).denoiser
    size = {"height": config.resolution, "width": config.resolution, "num_views": config.num_views}
    print(f"{config.backbone}: {type(denoiser).__name__}, {config.num_views} views of {config.resolution} px\n")
    print(layer_table(get_backbone(config.backbone), denoiser, **size))


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe; `arguments` are those of the command line by default."""
    run_recipe(main, read_all, [Options, TrainingConfig], about=__doc__ or "", arguments=arguments)


if __name__ == "__main__":
    run()
