"""Save a trained model to a folder, load it again, push it to the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from cameo.backbone import get_backbone, unwrap_peft
from cameo.config import CONFIG_NAME, CameoConfig
from cameo.errors import DataError
from cameo.files import move_into_place, write_atomically
from cameo.hub.access import check_access
from cameo.hub.card import Pictures, copy_pictures, model_card
from cameo.hub.card_facts import CardFacts
from cameo.hub.left_out import left_out
from cameo.hub.license import find_license, hub_id, require_license
from cameo.hub.loading import check_numbers, load_base, read_adapter, read_full
from cameo.hub.places import (
    builds_in_diffusers,
    forget_local_names,
    is_named_elsewhere,
    package_of,
    public_config,
)
from cameo.hub.publish import explained_errors, file_names, upload, verify
from cameo.hub.results import Metrics
from cameo.hub.weights import (
    ADAPTER_FORMATS,
    DATA_FILES,
    HEAD_FILE,
    adapter_settings,
    check_readable,
    component_name,
    format_in,
    stale_files,
    write_weights,
)
from cameo.model import CameoModel, attach
from cameo.renamed import old_keywords
from cameo.version import __version__

__all__ = ["from_pretrained", "local_folder", "push_to_hub", "save_pretrained"]

logger = logging.getLogger(__name__)


@old_keywords
def save_pretrained(
    model: CameoModel,
    folder: str | Path,
    *,
    include_head: bool = False,
    pipeline: Any = None,
    metrics: Metrics | None = None,
    pictures: Pictures | None = None,
    license: str | Mapping[str, str] | None = None,
    repo_id: str | None = None,
    local_base: bool = False,
) -> Path:
    """Write weights, `cameo_config.json` and a model card to `folder`.

    Example:
        >>> import tempfile, cameo
        >>> from cameo.backbone import get_backbone
        >>> pipeline = get_backbone("cat3d").build("transformer-tiny", blocks=2)
        >>> model = cameo.wrap(pipeline.denoiser, backbone="cat3d")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in save_pretrained(model, f"{folder}/rooms").iterdir())
        ['README.md', 'cameo_config.json', 'config.json', 'diffusion_pytorch_model.safetensors']

    The format follows the model: a diffusers LoRA or PEFT adapter is written alone, a full model in
    diffusers' layout (see `cameo.hub.weights`). Everything is written beside `folder` first and moved in file by
    file, so a crash leaves whole files. Files of an earlier save that would mislead a reader are removed; files of
    other programs stay.

    Args:
        model: what `cameo.wrap` returned.
        folder: created if needed.
        include_head: also write the alignment head, to go on training; inference does not need it.
        pipeline: the pipeline around a full model; its other components are saved with it.
        metrics: for the card, name to value, or to compare models column to names and values; the last column is this
            model's. A figure of this model goes into the card's `model-index` too.
        pictures: for the card, caption to path or `PIL.Image`, or a list of paths.
        license: identifier of the Hub, or a mapping with `license`, `license_name`, `license_link`. Default:
            that of the base weights where it is known without network, else the card states none.
        repo_id: Hub repository under which the card is to name the model; without it the code on the card runs in the
            folder, and `cameo push` fills the name in.
        local_base: whether the path of a base in a local folder is written too, so that `from_pretrained` finds it
            by itself. Without, no file names a path of this machine, whichever way the folder is passed on.

    A warning says what no file keeps: the scale of an adapter, a disabled one, other adapters, parameters that were
    trained beside it.

    Raises:
        ValueError: if the adapter is ambiguous or merged, if `pipeline` holds another model, if the backbone does not
            recognize the model any more (its views were taken apart after it was wrapped), or if `folder` holds
            weights of another format that cameo did not write.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: {folder} is a file")
    target = folder.absolute()
    stage = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        stage.mkdir(parents=True)
        facts = find_license(model.cameo_config, license, backbone=_backbone(model.cameo_config))
        _stage(model, stage, repo_id, facts, include_head, pipeline, metrics, pictures, local_base=local_base)
        _move_in(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return folder


def from_pretrained(
    name_or_path: str | Path,
    *,
    base_model: nn.Module | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    is_trainable: bool = False,
) -> CameoModel:
    """Load what `save_pretrained` or `push_to_hub` wrote; the model comes wrapped and in eval mode.

    Example:
        >>> import tempfile, cameo
        >>> from cameo.backbone import get_backbone
        >>> denoiser = get_backbone("cat3d").build("transformer-tiny", blocks=2).denoiser
        >>> model = cameo.wrap(denoiser, backbone="cat3d")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = cameo.from_pretrained(model.save_pretrained(folder), base_model=model.unwrap())
        >>> again.unwrap() is denoiser
        True

    Args:
        name_or_path: folder, or id of a Hub repository.
        base_model: module that gets the weights, and the map of positions that the saved model had or had not,
            changed in place. Default: the base named in `cameo_config.json`, loaded by the backbone at the recorded
            revision.
        revision: branch, tag or commit of `name_or_path`.
        token: for a private repository; default `HF_TOKEN` or the token of `hf auth login`. The base, another
            repository, is always read with the default.
        cache_dir: where downloads are kept, those of the base too.
        local_files_only: use what is in the cache, without network, for the base too.
        is_trainable: whether the parameters of a loaded adapter take gradients. Its base never does; a full
            model always does.

    Raises:
        DataError: if a file is missing or incomplete.
        ValueError: if the weights do not fit the base, or the base is not known; pass `base_model=`.
        OSError: if the repository cannot be reached; says what to do.
    """
    if isinstance(base_model, CameoModel):
        raise TypeError("base_model: is wrapped; pass the plain module, base_model=model.unwrap()")
    folder = local_folder(str(name_or_path), revision, token, cache_dir, local_files_only)
    config = CameoConfig.load(folder)
    weight_format = format_in(folder)
    check_readable(folder, weight_format)
    # The base is in another repository, to which the token of this one may give no access.
    place: dict[str, Any] = {"cache_dir": cache_dir} if cache_dir is not None else {}
    place |= {"local_files_only": True} if local_files_only else {}
    if not Path(name_or_path).is_dir() and config.base_model is not None and not is_named_elsewhere(config.base_model):
        config.base_model = None  # a folder of its author's machine, whatever there is on this one under that name
    if weight_format in ADAPTER_FORMATS:
        base = load_base(config, **place) if base_model is None else base_model
        module = read_adapter(folder, weight_format, base, is_trainable=is_trainable)
    else:
        module = read_full(folder, weight_format, config, base_model, **place)
        # A training of this model starts from these weights, and not from the base that they were trained from.
        is_local = Path(name_or_path).is_dir()
        config = replace(config, base_model=str(name_or_path), base_revision=None if is_local else folder.name)
    try:
        model = attach(module, config)
    except ValueError as error:
        raise DataError(f"{folder / CONFIG_NAME}: {error}") from error
    if config.backbone is not None:
        get_backbone(config.backbone).set_position(unwrap_peft(module), config.position)
    _read_head(model, folder)
    return model.eval()


@old_keywords
def push_to_hub(
    model: CameoModel,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload with cameo",
    include_head: bool = False,
    create_pr: bool = False,
    pipeline: Any = None,
    metrics: Metrics | None = None,
    pictures: Pictures | None = None,
    license: str | Mapping[str, str] | None = None,
    revision: str | None = None,
) -> str:
    """Save to a temporary folder, load it back and compare, then upload it in one commit; returns the URL.

    Example:
        >>> model.push_to_hub("me/rooms-lora", license="openrail")  # doctest: +SKIP
        'https://huggingface.co/me/rooms-lora'

    Before anything is written to the Hub the saved files are loaded into a fresh base, and its output on the
    backbone's example inputs must equal the model's bit for bit. Nothing but the saved files is uploaded.

    Args:
        model: what `cameo.wrap` returned.
        repo_id: `name` or `owner/name`; created if it does not exist.
        token: with write permission; default `HF_TOKEN` or the token of `hf auth login`.
        private: for a new repository; default the owner's setting.
        commit_message: title of the commit.
        include_head, pipeline, metrics, pictures: see `save_pretrained`.
        create_pr: open a pull request instead of changing the branch.
        license: see `save_pretrained`. Default: the one on the base's card, else the one its backbone knows.
        revision: branch to write to, created if needed; default `main`.

    Raises:
        ValueError: if no license is known, or the repository holds weights of another format that cameo did
            not write.
        RuntimeError: if the saved files do not reproduce the model's output; nothing is pushed then.
        PermissionError: without a token, or if the Hub refuses it.
        ConnectionError: if the Hub cannot be reached.
    """
    if create_pr and revision is not None:
        raise ValueError(
            "revision: a pull request is opened against the default branch; leave out create_pr or revision"
        )
    config = model.cameo_config
    repo_id = check_access(repo_id, token)
    facts = require_license(config, license, backbone=_backbone(config), token=token)
    with tempfile.TemporaryDirectory() as root:
        stage = Path(root) / "model"
        stage.mkdir()
        _stage(model, stage, repo_id, facts, include_head, pipeline, metrics, pictures, on_hub=True)
        verify(
            model.base_model,
            config,
            stage,
            lambda base: from_pretrained(stage, base_model=base).unwrap(),
        )
        return upload(
            stage,
            repo_id,
            token=token,
            private=private,
            message=commit_message,
            create_pr=create_pr,
            revision=revision,
        )


def _stage(
    model: CameoModel,
    folder: Path,
    repo_id: str | None,
    license: dict[str, str],
    include_head: bool,
    pipeline: Any,
    metrics: Metrics | None,
    pictures: Pictures | None,
    *,
    on_hub: bool = False,
    local_base: bool = False,
) -> None:
    """Write the files of a save into an empty folder."""
    from safetensors.torch import save_file

    base, core = model.base_model, unwrap_peft(model.base_model)
    backbone = _backbone(model.cameo_config)
    if backbone is not None and not backbone.recognizes(core):
        raise ValueError(
            f"model: backbone {backbone.name!r} does not fit any more, so this is not the model that was wrapped: "
            f"{backbone.explain_mismatch(core)}"
        )
    position = "none" if backbone is None else backbone.position(core)
    config = replace(model.cameo_config, cameo_version=__version__, position=position)
    if not local_base:
        config = public_config(config, warn=on_hub)
    for lost in left_out(base):
        warnings.warn(f"saving: {lost}", stacklevel=4)
    weight_format = write_weights(base, folder, config=config, pipeline=pipeline)
    if not local_base:
        forget_local_names(folder)
    config.save(folder)
    head = {key: value.contiguous() for key, value in model.alignment_heads.state_dict().items()}
    if include_head and head:
        save_file(head, str(folder / HEAD_FILE), metadata={"format": "pt"})
    component = component_name(core, pipeline)
    card = CardFacts(
        repo_id=repo_id,
        weight_format=weight_format,
        config=config,
        class_name=type(core).__name__,
        package=package_of(core),
        component=component,
        license=license,
        plain_base=weight_format in ADAPTER_FORMATS and builds_in_diffusers(core, component, config, online=on_hub),
        has_head=include_head and bool(head),
        adapter=_adapter_facts(base) if weight_format in ADAPTER_FORMATS else {},
        metrics=metrics,
        pictures=copy_pictures(pictures, folder),
    )
    if backbone is not None:
        card.pipeline_tag, card.backbone_package = backbone.pipeline_tag, type(backbone).__module__.partition(".")[0]
    write_atomically(folder / "README.md", model_card(card))


def _adapter_facts(base: nn.Module) -> dict[str, Any]:
    settings = adapter_settings(base)
    facts = {"type": settings.peft_type.value, "rank": getattr(settings, "r", None)}
    facts["alpha"] = getattr(settings, "lora_alpha", None)
    targets = getattr(settings, "target_modules", None)
    facts["on"] = ", ".join(sorted(targets)) if isinstance(targets, set | list) else targets
    return {name: value for name, value in facts.items() if value is not None}


def _move_in(stage: Path, target: Path) -> None:
    """Move staged files into place, the configuration last; then remove what they made stale."""
    if not target.exists():
        move_into_place(stage, target)
        return
    new = file_names(stage)
    stale = stale_files(file_names(target), new, place=str(target))
    for name in sorted(new, key=lambda name: name == CONFIG_NAME):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        move_into_place(stage / name, target / name)
    for name in stale:
        (target / name).unlink()
        with contextlib.suppress(OSError):  # not empty: it holds files of other programs
            if (target / name).parent != target:
                (target / name).parent.rmdir()


def _backbone(config: CameoConfig) -> Any:
    return None if config.backbone is None else get_backbone(config.backbone)


def local_folder(
    name: str,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return a folder as it is, or download a Hub repository without its code; arguments as of `from_pretrained`.

    Raises:
        DataError: if there is no such folder and the name is not the id of a Hub repository.
        OSError: if the repository cannot be reached; says what to do.
    """
    if Path(name).is_dir():
        return Path(name)
    if hub_id(name) is None:
        raise DataError(f"{name}: no such folder, and not the id of a Hub repository (owner/name)")
    from huggingface_hub import snapshot_download

    with explained_errors(name):
        snapshot = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(DATA_FILES),
        )
    return Path(snapshot)


def _read_head(model: CameoModel, folder: Path) -> None:
    from safetensors.torch import load_file

    path = folder / HEAD_FILE
    if path.is_file():
        state = load_file(str(path))
        check_numbers(path, state)
        try:
            model.alignment_heads.load_state_dict(state)
        except RuntimeError as error:
            raise DataError(f"{path}: does not fit the head in {CONFIG_NAME}: {error}") from error
    elif any(True for _ in model.alignment_heads.parameters()):
        logger.info("%s holds no alignment head; it starts with new weights (inference does not need it)", folder)
