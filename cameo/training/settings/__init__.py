"""Settings of the training, one dataclass per component; `TrainingConfig` is all of them."""

from typing import TYPE_CHECKING

from cameo.lazy import load_on_use

if TYPE_CHECKING:
    from cameo.training.settings.config import (
        TrainingConfig,
        continued_settings,
        load_config,
        save_config,
        settings_file,
    )
else:
    __getattr__, __dir__ = load_on_use(
        __name__,
        dict.fromkeys(
            ("TrainingConfig", "continued_settings", "load_config", "save_config", "settings_file"),
            "cameo.training.settings.config",
        ),
    )

__all__ = ["TrainingConfig", "continued_settings", "load_config", "save_config", "settings_file"]
