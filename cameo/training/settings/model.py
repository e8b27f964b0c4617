"""Settings of the model that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cameo.settings import Settings, setting

__all__ = ["LoraSettings", "ModelSettings"]


@dataclass
class ModelSettings(Settings):
    """Model: released weights, or a preset with fresh ones."""

    # Adapter of the model, one of `cameo.backbones()`: cat3d, mvdream, sv3d, zero123plus, or one of your own. cat3d by
    # default, as in the paper.
    backbone: str = setting("cat3d")
    # Weights to start from: id on the Hub, folder in diffusers layout, or bundled:NAME. null, the default, builds
    # preset.
    pretrained_model_name_or_path: str | None = setting(None, path=True)
    # Branch, tag or commit of the weights on the Hub. null, the default, takes the one that the adapter pins.
    revision: str | None = setting(None)
    # Architecture with fresh weights, by its name in the adapter (tiny, small, ...), instead of released weights. null,
    # the default, is tiny where there are no released weights either.
    preset: str | None = setting(None)
    # What to change in the preset, or what else to pass to the loading of released weights: {option: value}.
    preset_options: dict[str, Any] = setting(factory=dict)
    # Whether activations are computed again in the backward pass instead of kept: less memory, more time. false by
    # default.
    gradient_checkpointing: bool = setting(False, changeable=True)
    # Whether attention runs through xformers, on a GPU. false, the default, takes the kernels of torch, which need no
    # further package.
    enable_xformers_memory_efficient_attention: bool = setting(False, changeable=True)

    def check(self) -> None:
        """Refuse settings that contradict each other."""
        if self.pretrained_model_name_or_path and self.preset:
            raise ValueError(
                "pretrained_model_name_or_path and preset: give one, the weights to start from or a preset to build; "
                "preset=null drops that of a settings file"
            )


@dataclass
class LoraSettings(Settings):
    """LoRA, for `cameo lora`."""

    # Rank of the update of each weight matrix, >= 1. 4 by default, as in diffusers' LoRA scripts.
    rank: int = setting(4, at_least=1)
    # Numerator of the factor lora_alpha / rank of the update, >= 1. null, the default, is rank, so the factor is 1.
    lora_alpha: int | None = setting(None, at_least=1)
    # Share of the inputs of the update that is dropped in training, in [0, 1). 0 by default, as in diffusers' scripts.
    lora_dropout: float = setting(0.0, share="[0, 1)")
    # Modules that get an update, by the end of their name. By default the four projections of every attention layer.
    target_modules: list[str] = setting(factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    # Whether the same training runs without supervision too, before, and both are compared. false by default.
    compare_without_cameo: bool = setting(False, changeable=True)
