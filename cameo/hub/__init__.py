"""Save a trained model to a folder, load it again, push it to the Hugging Face Hub."""

from typing import TYPE_CHECKING

from cameo.lazy import load_on_use

if TYPE_CHECKING:
    from cameo.hub.save_load import from_pretrained, local_folder, push_to_hub, save_pretrained
else:
    __getattr__, __dir__ = load_on_use(
        __name__,
        {
            "from_pretrained": "cameo.hub.save_load",
            "local_folder": "cameo.hub.save_load",
            "push_to_hub": "cameo.hub.save_load",
            "save_pretrained": "cameo.hub.save_load",
        },
    )

__all__ = [
    "from_pretrained",
    "local_folder",
    "push_to_hub",
    "save_pretrained",
]
