"""Save a trained model to a folder, load it again, push it to the Hugging Face Hub."""

from __future__ import annotations

from cameo.hub.save_load import from_pretrained, local_folder, push_to_hub, save_pretrained

__all__ = [
    "from_pretrained",
    "local_folder",
    "push_to_hub",
    "save_pretrained",
]
