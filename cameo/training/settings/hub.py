"""Settings of a push to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass

from cameo.settings import Settings, setting

__all__ = ["HubSettings"]


@dataclass
class HubSettings(Settings):
    """Hugging Face Hub."""

    # Whether the trained model is pushed at the end, false by default: nothing leaves the machine unasked.
    push_to_hub: bool = setting(False, changeable=True)
    # Repository to push to, your-name/your-model; created if it does not exist. null by default.
    hub_model_id: str | None = setting(None, changeable=True)
    # Token with write permission; it is never written or shown. null, the default, takes the variable HF_TOKEN or the
    # token of `hf auth login`, which no other user of the machine sees, as they see a command line.
    hub_token: str | None = setting(None, secret=True, changeable=True)
    # Whether a new repository is private. null, the default, leaves it to the owner's setting.
    hub_private: bool | None = setting(None, changeable=True)
    # License of the weights, an identifier of the Hub as openrail++. null, the default, takes that of the base weights;
    # where none is known a push is refused.
    hub_license: str | None = setting(None, changeable=True)
    # Name of the training data on the model card. null, the default, states their format alone: the name of a folder
    # may say more than is to be public.
    hub_data_name: str | None = setting(None, changeable=True)

    def check(self) -> None:
        """Refuse settings that contradict each other."""
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub=true needs hub_model_id=your-name/your-model")
