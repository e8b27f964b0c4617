"""The trained weights of a checkpoint, loaded into the modules that train."""

from __future__ import annotations

from pathlib import Path

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from cameo.backbone import get_backbone, unwrap_peft
from cameo.config import CameoConfig
from cameo.errors import DataError
from cameo.hub.weights import ADAPTER_FORMATS, HEAD_FILE, LORA_FILE, MODULE_FILE, PEFT_FILE, adapter_name, format_in
from cameo.model import CameoModel

__all__ = ["load_trained"]


def load_trained(model: CameoModel, folder: str | Path) -> None:
    """Load the trained weights and the heads of a checkpoint into the modules that are being trained, in place.

    They get the checkpoint's map of positions too, since a preset of an earlier release may have had none.

    Raises:
        DataError: if the folder does not hold exactly the weights that the model trains.
    """
    folder = Path(folder)
    core, weight_format = unwrap_peft(model.base_model), format_in(folder)
    try:
        if weight_format in ADAPTER_FORMATS:
            _load_adapter(model.base_model, folder, weight_format)
        elif weight_format == "module":
            load_model(core, str(folder / MODULE_FILE))
        else:
            state: dict[str, Tensor] = {}
            for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
                state |= load_file(str(path))
            core.load_state_dict(state)
        heads = model.alignment_heads.state_dict()
        model.alignment_heads.load_state_dict(load_file(str(folder / HEAD_FILE)) if heads else {})
        if model.cameo_config.backbone is not None:
            position = CameoConfig.load(folder).position
            get_backbone(model.cameo_config.backbone).set_position(core, position)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{folder}: its weights are missing or damaged ({error})") from error
    except RuntimeError as error:
        first = " ".join(str(error).split("\n\t")[:2])  # torch lists every parameter
        raise DataError(f"{folder}: does not fit the model that trains: {first}") from error


def _load_adapter(base: nn.Module, folder: Path, weight_format: str) -> None:
    path = folder / (LORA_FILE if weight_format == "diffusers_lora" else PEFT_FILE)
    state, name = load_file(str(path)), adapter_name(base)
    if not hasattr(base, "get_base_model"):  # only the keys of a PeftModel carry the prefix of the file themselves
        prefix = next(iter(state), "").split(".")[0] if weight_format == "diffusers_lora" else "base_model.model"
        state = {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
    expected = get_peft_model_state_dict(base, adapter_name=name)
    if differing := sorted(expected.keys() ^ state.keys()):
        raise DataError(f"{path}: does not fit the model that trains; in one of them only: {', '.join(differing[:3])}")
    set_peft_model_state_dict(base, state, adapter_name=name)
