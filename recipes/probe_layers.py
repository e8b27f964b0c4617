"""List the layers of a multi-view diffusion model in which its views meet.

    python recipes/probe_layers.py --list backbone=zero123plus               # a preset, with fresh weights
    python recipes/probe_layers.py --list backbone=sv3d resolution=576 num_views=21
    python recipes/probe_layers.py --list backbone=mvdream pretrained_model_name_or_path=path/to/model

Settings are those of the training recipes; `resolution` and `num_views` are what the token grids are told for.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cameo.backbone import get_backbone
from cameo.listing import layer_table
from cameo.training.config import load_config, settings_file
from cameo.training.setup import load_pipeline

CONFIGS = Path(__file__).parent / "configs"


def main(arguments: list[str]) -> None:
    """Print the table."""
    if "--list" not in arguments:
        raise SystemExit(f"{__doc__}\nExpected --list, got: {' '.join(arguments) or 'nothing'}")
    settings = [argument for argument in arguments if argument != "--list"]
    if any(setting.lstrip("-").startswith("pretrained_model_name_or_path=") for setting in settings):
        settings.insert(0, "preset=null")  # that of the settings file
    config = load_config(settings_file("lora", CONFIGS, settings), settings)
    denoiser = load_pipeline(config).denoiser
    size = {"height": config.resolution, "width": config.resolution, "num_views": config.num_views}
    print(f"{config.backbone}: {type(denoiser).__name__}, {config.num_views} views of {config.resolution} px\n")
    print(layer_table(get_backbone(config.backbone), denoiser, **size))


if __name__ == "__main__":
    main(sys.argv[1:])
