"""The push at the end of a training, which is checked before its first step."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from cameo.backbone import get_backbone
from cameo.config import CameoConfig
from cameo.hub.access import check_access
from cameo.hub.license import require_license
from cameo.hub.publish import NotReproducedError
from cameo.model import CameoModel
from cameo.training.settings import TrainingConfig
from cameo.training.setup import base_name

__all__ = ["check_push", "push_finished"]


def check_push(config: TrainingConfig) -> None:
    """Check before the training whether a push after it would be refused, and complete `hub_model_id` with its owner.

    Raises:
        PermissionError: if there is no token, the Hub does not know it, or it may not write for that owner.
        ConnectionError: if the Hub cannot be reached.
        ValueError: if `hub_model_id` is no id, or no license is known for the base weights.
    """
    if not config.push_to_hub:
        return
    adapter, name = get_backbone(config.backbone), base_name(config)
    base = CameoConfig(config.backbone, [], base_model=name, base_revision=config.revision or adapter.revision(name))
    untrained = "Nothing was trained yet"
    try:
        config.hub_model_id = check_access(str(config.hub_model_id), config.hub_token)
    except ValueError as error:
        raise ValueError(f"push_to_hub=true: hub_model_id={error}. {untrained}") from error
    except PermissionError as error:
        raise PermissionError(f"push_to_hub=true: {error}. {untrained}") from error
    except ConnectionError as error:
        raise ConnectionError(
            f"push_to_hub=true: {error}. {untrained}; train without push_to_hub, and push later with cameo push"
        ) from error
    try:
        require_license(base, config.hub_license, backbone=adapter, token=config.hub_token)
    except ValueError as error:
        raise ValueError(f"push_to_hub=true: {error}; here as hub_license=. {untrained}") from error


def push_finished(model: CameoModel, folder: Path, config: TrainingConfig, **facts: Any) -> None:
    """Push a trained model if the run is to; a push that fails does not fail the run.

    Then the command is printed that pushes what was saved in `folder`. The facts are arguments of `push_to_hub`.
    """
    if not config.push_to_hub:
        return
    hub = {"token": config.hub_token, "private": config.hub_private, "license": config.hub_license}
    try:
        print(f"pushed to {model.push_to_hub(str(config.hub_model_id), **hub, **facts)}")
    except NotReproducedError as error:
        print(f"not pushed: {error}. What was saved is in {folder}")
    except Exception as error:  # whatever the network does: the model is trained and saved
        private = "" if config.hub_private is None else f" private={str(config.hub_private).lower()}"
        command = f"cameo push {shlex.quote(str(folder))} {config.hub_model_id}{private}"
        reason = " ".join(str(error).split())
        print(f"not pushed: {reason}\nThe model is complete in {folder}. To push it:\n\n    {command}")
