"""Push a folder that a run has left: with its card, and checked as far as the folder and its base allow."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cameo.backbone import get_backbone
from cameo.config import CONFIG_NAME, CameoConfig
from cameo.errors import DataError
from cameo.files import write_atomically
from cameo.hub.access import check_access
from cameo.hub.card_facts import UNNAMED
from cameo.hub.license import hub_id, require_license
from cameo.hub.loading import BaseNeededError
from cameo.hub.places import forget_local_names, public_config
from cameo.hub.publish import file_names, upload, verify
from cameo.hub.save_load import from_pretrained
from cameo.hub.weights import check_readable, format_in, is_saved_file

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

__all__ = ["PushedFolder", "named_card", "push_folder", "saved_folder"]

CARD = "README.md"
RESULTS = ("adapter", "model")  # folders of the results in that of a finished run


@dataclass(frozen=True)
class PushedFolder:
    """What was pushed.

    Attributes:
        url: where it is.
        folder: which folder it was.
        unverified: why the output was not compared; None where it was.
    """

    url: str
    folder: Path
    unverified: str | None


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    license: str | Mapping[str, str] | None = None,
    commit_message: str = "Upload with cameo",
    create_pr: bool = False,
    revision: str | None = None,
) -> PushedFolder:
    """Push what `save_pretrained` wrote, after loading it from what is uploaded; the folder stays as it is.

    The card is that of the folder, with the name of the repository in its title and code. The model in the folder and
    the one in the files that are uploaded must have the same output bit for bit, on a base that is loaded for each;
    where the base cannot be loaded, only the files are checked, and `unverified` says why. Weights that were changed
    beside an adapter are not in the folder any more, so they are not found here.

    Example:
        >>> push_folder("outputs/lora-cat3d-tiny", "me/rooms-lora").url  # doctest: +SKIP
        'https://huggingface.co/me/rooms-lora'

    Args:
        folder: a saved model, or a finished run, of which `adapter` or `model` is taken.
        repo_id: `name` or `owner/name`; created if it does not exist.
        token, private, commit_message, create_pr, revision: see `cameo.hub.push_to_hub`.
        license: see `save_pretrained`. Default: the one on the card, else that of the base.

    Raises:
        DataError: if the folder is no saved model, or a file is damaged.
        ValueError: if no license is known, or `repo_id` is no id.
        RuntimeError: if the files do not reproduce the model; nothing is pushed then.
        PermissionError: without a token, or if the Hub refuses it.
        ConnectionError: if the Hub cannot be reached.
    """
    folder = saved_folder(folder)
    config, weight_format = CameoConfig.load(folder), format_in(folder)
    check_readable(folder, weight_format)
    repo_id = check_access(repo_id, token)
    with tempfile.TemporaryDirectory() as root:
        stage = Path(root) / "model"
        for name in file_names(folder):
            if name == CARD or is_saved_file(name, weight_format, folder):
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, stage / name)
        card = named_card((folder / CARD).read_text(encoding="utf-8"), repo_id)
        backbone = None if config.backbone is None else get_backbone(config.backbone)
        stated = _stated_license(card) if license is None else license
        for key, value in require_license(config, stated, backbone=backbone, token=token).items():
            card.data[key] = value
        write_atomically(stage / CARD, f"---\n{card.data.to_yaml()}\n---\n{card.text}")
        public_config(config).save(stage)
        forget_local_names(stage)
        unverified = _verify(folder, stage, config, weight_format)
        url = upload(
            stage,
            repo_id,
            token=token,
            private=private,
            message=commit_message,
            create_pr=create_pr,
            revision=revision,
        )
    return PushedFolder(url, folder, unverified)


def saved_folder(folder: str | Path) -> Path:
    """Return the folder of a saved model: the folder itself, or the results in that of a finished run.

    Raises:
        DataError: if there is none, or it has no card.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected that of a finished run, or of a saved adapter or model")
    within = [folder, *(folder / name for name in RESULTS)]
    found = next((place for place in within if (place / CONFIG_NAME).is_file()), None)
    if found is None:
        raise DataError(
            f"{folder}: holds no saved model: expected {CONFIG_NAME} in it, or in its folder {' or '.join(RESULTS)}, "
            "as in that of a finished run"
        )
    if not (found / CARD).is_file():
        raise DataError(f"{found / CARD}: no such file; the card is pushed with the model. Save the model again")
    return found


def named_card(text: str, repo_id: str) -> ModelCard:
    """Return the card of a saved model with a repository's id in its title, its code and its `model-index`.

    What its author has written into it stays.
    """
    from huggingface_hub import ModelCard

    card = ModelCard(text)
    name, body = repo_id.rpartition("/")[2], card.text
    blocks = re.findall(r"```python\n.*?```", body, flags=re.DOTALL)
    calls = (r'cameo\.from_pretrained\("([^"]+)"', r'\.load\("([^"]+)"')
    found = (re.search(call, block) for call in calls for block in blocks)
    former = next((match[1] for match in found if match), None)
    if former is not None:
        for block in blocks:
            body = body.replace(block, block.replace(f'"{former}"', f'"{repo_id}"'))
    title = re.search(r"^# (.*)$", body, flags=re.MULTILINE)
    own = {(former or "").rpartition("/")[2], card.data.get("model_name")}
    if title and (title[1].startswith(UNNAMED) or title[1] in own):
        body = f"{body[: title.start(1)]}{name}{body[title.end(1) :]}"
    if card.data.get("eval_results"):
        card.data["model_name"] = name
    card.text = body
    return card


def _stated_license(card: ModelCard) -> dict[str, str] | None:
    stated = {key: card.data.get(key) for key in ("license", "license_name", "license_link")}
    return {key: str(value) for key, value in stated.items() if value} if stated["license"] else None


def _verify(folder: Path, stage: Path, config: CameoConfig, weight_format: str) -> str | None:
    """Compare the model in the folder with the one that is uploaded; return why it could not be done."""
    base = config.base_model or ""
    local = base and hub_id(base) is None and ":" not in base
    if local and weight_format != "pipeline" and not Path(base).exists():
        return f"the base {base} is not there"
    try:
        model = from_pretrained(folder)
    except (BaseNeededError, OSError) as error:
        return str(error).partition("; pass ")[0]  # what follows is a cure in Python
    verify(model.base_model, config, stage, lambda base: from_pretrained(stage, base_model=base).unwrap())
    return None
