"""Write a page on which a click on a token shows where a model looks: one HTML file that opens from disk.

    cameo explore outputs/lora-cat3d-tiny                    # a finished run: base, without and with CAMEO
    cameo explore outputs/lora-cat3d-tiny/adapter            # an adapter, beside its base
    cameo explore you/rooms-lora                             # the same from the Hub
    cameo explore outputs/one outputs/other output=two.html  # two runs, side by side
    cameo explore outputs/lora-cat3d-tiny/adapter layers=all noise_levels='[1.0]'

The samples are the first ones of the validation set of the (first) run, all models get the same noise. Every setting of
`cameo.training.settings.TrainingConfig` can be given as key=value, which takes precedence over that of the run;
--help lists them, --print-config prints those that would be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cameo.recipes import CONFIGS
from cameo.settings import Settings, run_recipe, setting, split_arguments, typed_values
from cameo.training.output_folder import WITHOUT_CAMEO
from cameo.training.run_settings import run_settings
from cameo.training.settings import TrainingConfig
from cameo.version import __version__

if TYPE_CHECKING:
    from cameo.explore.write import ShownModel
    from cameo.training.runs import EvaluatedModel

ADAPTER = "adapter"  # folder in that of a finished run
SHOWN_LAYERS = ("supervised", "all")


@dataclass
class Options(Settings):
    """What is shown, and where the page goes."""

    # Folders of finished runs, saved adapters or pipelines, or ids of Hub repositories: one, or two to compare.
    models: list[str] = setting(factory=list, positional=True)
    # The page. explore.html by default.
    output: str = setting("explore.html", path=True)
    # Layers that can be chosen on the page: supervised, those of the models, is the default; all takes every layer in
    # which whole views meet, and a larger file.
    layers: str = setting("supervised", choices=SHOWN_LAYERS)
    # Number of scenes; 4 by default.
    num_scenes_shown: int = setting(4, at_least=1)
    # Shares of the last timestep at which the attention is shown, in [0, 1]; half, high and pure noise by default.
    noise_levels: list[float] = setting(factory=lambda: [0.5, 0.8, 1.0])

    def check(self) -> None:
        """Refuse what is not one or two models, and noise levels that are none."""
        from cameo.probing.denoising import check_noise_levels

        if not 1 <= len(self.models) <= 2:
            raise ValueError(
                f"models: expected one or two folders or Hub ids, got {len(self.models)}; "
                "for example cameo explore outputs/lora-cat3d-tiny"
            )
        check_noise_levels("noise_levels", self.noise_levels)


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command; `arguments` are those of the command line by default."""
    run_recipe(main, read_all, [Options, TrainingConfig], about=__doc__ or "", arguments=arguments)


def read(arguments: list[str]) -> tuple[Options, dict[str, Any]]:
    """Read the options, and leave the settings of the training as they were typed."""
    options, settings = split_arguments(arguments, Options, TrainingConfig)
    return Options(**typed_values(Options, options)), settings


def read_all(arguments: list[str]) -> tuple[Any, ...]:
    """Read the settings that would be used, for --print-config."""
    options, settings = read(arguments)
    first = checkpoints_of(options.models[0])[-1]
    folder = Path(first)
    if not folder.is_dir():
        from cameo.hub import local_folder

        folder = local_folder(first, None)
    config, _ = run_settings(settings, CONFIGS, folder)
    return options, config


def main(arguments: list[str]) -> None:
    """Load the models, write the page and say where it is."""
    from cameo.processes.launch import Launch

    Launch.from_environment().refuse_several_processes("cameo explore")
    options, settings = read(arguments)
    from cameo.data import collate
    from cameo.data.batches import to_device
    from cameo.explore.write import write_page
    from cameo.training.data import build_dataset

    shown, first = load_models(options.models, settings)
    data = build_dataset(first.config, "validation")
    samples = collate([data[index] for index in range(options.num_scenes_shown)])
    layers = None
    if options.layers == "all":
        layers = first.model.attention_layers
    page = write_page(
        options.output,
        shown,
        first.pipeline,
        to_device(samples, next(first.model.parameters()).device),
        title=f"Where the attention looks: {', '.join(options.models)}",
        layers=layers,
        noise_levels=options.noise_levels,
        about=[f"Made by cameo {__version__} from {', '.join(options.models)}, backbone {first.config.backbone}."],
    )
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB): open it in a browser")


def checkpoints_of(model: str) -> list[str]:
    """List what a name on the command line stands for: the adapters of a finished run, or the model itself.

    The run without CAMEO comes first.
    """
    folder = Path(model)
    if not (folder / ADAPTER).is_dir():
        return [model]
    runs = [folder / WITHOUT_CAMEO / ADAPTER, folder / ADAPTER]
    return [str(run) for run in runs if run.is_dir()]


def load_models(models: list[str], settings: dict[str, Any]) -> tuple[dict[str, ShownModel], EvaluatedModel]:
    """Load all checkpoints of the models, by name, each run after its base; also returns the first of them.

    The others are shown on the samples of the first.

    Raises:
        ValueError: models of different backbones.
    """
    from cameo.explore.write import ShownModel
    from cameo.probing.mode import has_adapter
    from cameo.training.runs import load_evaluated

    shown: dict[str, ShownModel] = {}
    first = None
    for model in models:
        for checkpoint in checkpoints_of(model):
            run = load_evaluated(settings, CONFIGS, checkpoint=checkpoint)
            if first is None:
                first = run
                if has_adapter(run.model):
                    shown["base"] = ShownModel(run.model, trained_head=False, base=True)
            elif run.config.backbone != first.config.backbone:
                raise ValueError(
                    f"models: expected one backbone, got {first.config.backbone}, and {run.config.backbone} in "
                    f"{checkpoint}"
                )
            name = "with CAMEO" if run.model.cameo_config.weight > 0 else "without CAMEO"
            shown[name if len(models) == 1 else f"{model}, {name}"] = ShownModel(run.model, run.trained_head)
    assert first is not None  # Options.check
    return shown, first


if __name__ == "__main__":
    run()
