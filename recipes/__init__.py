"""What users run, installed as `cameo.recipes`: each recipe is a script and a command of `cameo`."""

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"  # settings files; `config=lora_cat3d_sd21` finds one by its name
