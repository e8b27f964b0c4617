"""Save a trained model to a folder, load it again, push it to the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import copy
import logging
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cameo import weights
from cameo.backbone import core_module, get_backbone
from cameo.card import CardFacts, Metrics, Pictures, copy_pictures, find_licence, hub_id, model_card
from cameo.config import CONFIG_NAME, CameoConfig, write_atomically
from cameo.errors import DataError
from cameo.weights import BaseNeeded
from cameo.wrap import CameoModel, attach

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

logger = logging.getLogger(__name__)

DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model"]  # never pickles or code


def save_pretrained(
    model: CameoModel,
    folder: str | Path,
    *,
    include_head: bool = False,
    pipeline: Any = None,
    metrics: Metrics | None = None,
    pictures: Pictures | None = None,
    licence: str | Mapping[str, str] | None = None,
) -> Path:
    """Write weights, `cameo_config.json` and a model card to `folder`.

    Example:
        >>> import tempfile, cameo
        >>> from torch import nn
        >>> net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
        >>> model = cameo.wrap(net, layer="attention", layout="b (v h w)")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in save_pretrained(model, f"{folder}/rooms").iterdir())
        ['README.md', 'cameo_config.json', 'model.safetensors']

    The format follows the model: a diffusers LoRA or PEFT adapter is written alone, a full model in diffusers'
    layout (see `cameo.weights`). Everything is written beside `folder` first and moved in file by file, so a crash
    leaves whole files. Files of an earlier save that would mislead are removed; files of others stay.

    Args:
        model: what `cameo.wrap` returned.
        folder: created if needed.
        include_head: also write the alignment head, to go on training; inference does not need it.
        pipeline: the pipeline around a full model; its other components are saved with it.
        metrics: for the card, name to value or group to names and values.
        pictures: for the card, caption to path or `PIL.Image`, or a list of paths.
        licence: identifier of the Hub, or a mapping with `license`, `license_name`, `license_link`. Default: that of
            the base weights where it is known, else the card states none.

    Raises:
        ValueError: if the adapter is ambiguous or merged, if `pipeline` holds another model, or if `folder` holds
            weights of another format that cameo did not write.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: {folder} is a file")
    target = folder.absolute()
    stage = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        stage.mkdir(parents=True)
        facts = find_licence(model.cameo_config, licence, backbone=_backbone(model.cameo_config))
        _stage(model, stage, target.name, facts, include_head, pipeline, metrics, pictures)
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
        >>> from torch import nn
        >>> net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
        >>> model = cameo.wrap(net, layer="attention", layout="b (v h w)")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = cameo.from_pretrained(model.save_pretrained(folder), base_model=model.unwrap())
        >>> again.unwrap() is net
        True

    Args:
        name_or_path: folder, or id of a Hub repository.
        base_model: module that gets the weights, changed in place. Default: the base named in `cameo_config.json`,
            loaded by the backbone at the recorded revision.
        revision: branch, tag or commit of `name_or_path`.
        token: for a private repository; default `HF_TOKEN` or the token of `hf auth login`. The base, another
            repository, is always read with the default.
        cache_dir: where downloads are kept.
        local_files_only: use what is in the cache, without network.
        is_trainable: whether the parameters of a loaded adapter take gradients. Its base never does; a full model
            always does.

    Raises:
        DataError: if a file is missing or incomplete.
        ValueError: if the weights do not fit the base, or the base is not known; pass `base_model=`.
        OSError: if the repository cannot be reached; says what to do.
    """
    if isinstance(base_model, CameoModel):
        raise ValueError("base_model: is wrapped; pass the plain module, base_model=model.unwrap()")
    folder = _local_folder(str(name_or_path), revision, token, cache_dir, local_files_only)
    config = CameoConfig.load(folder)
    form = weights.format_in(folder)
    if form in weights.ADAPTER_FORMATS:
        base = _load_base(config) if base_model is None else base_model
        module = weights.read_adapter(folder, form, base, is_trainable=is_trainable)
    else:
        module = _load_full(folder, form, config, base_model)
        # Whatever is trained from here on starts from these weights, no longer from the base of that training.
        is_local = Path(name_or_path).is_dir()
        config = replace(
            config, base_model=str(name_or_path), base_revision=None if is_local else folder.name
        )
    model = attach(module, config)
    _read_head(model, folder)
    return model.eval()


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
    licence: str | Mapping[str, str] | None = None,
    revision: str | None = None,
) -> str:
    """Save to a temporary folder, load it back and compare, then upload it in one commit; returns the URL.

    Example:
        >>> model.push_to_hub("me/rooms-lora", licence="openrail")  # doctest: +SKIP
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
        licence: see `save_pretrained`. Default: the one on the base's card, else the one its backbone knows.
        revision: branch to write to, created if needed; default `main`.

    Raises:
        ValueError: if no licence is known, or the repository holds weights of another format not written by cameo.
        RuntimeError: if the saved files do not reproduce the model's output; nothing is pushed then.
        PermissionError: without a token, or if the Hub refuses it.
        ConnectionError: if the Hub cannot be reached.
    """
    if create_pr and revision is not None:
        raise ValueError(
            "revision: a pull request is opened against the default branch; leave out create_pr or revision"
        )
    from huggingface_hub import HfApi, get_token

    config = model.cameo_config
    if not (token or get_token()):
        raise PermissionError(
            "no Hugging Face token: pass token=, set the environment variable HF_TOKEN, or run `hf auth login`"
        )
    facts = find_licence(config, licence, backbone=_backbone(config), online=True, token=token)
    if not facts:
        raise ValueError(
            f"no licence is known for the base weights ({config.base_model or 'not recorded'}), and a model follows the "
            "licence of its base; pass licence= (for example licence='openrail')"
        )
    api = HfApi(token=token, library_name="cameo")
    if "/" not in repo_id:
        with _explained(repo_id):
            repo_id = f"{api.whoami()['name']}/{repo_id}"
    with tempfile.TemporaryDirectory() as root:
        stage = Path(root) / "model"
        stage.mkdir()
        _stage(model, stage, repo_id, facts, include_head, pipeline, metrics, pictures, on_hub=True)
        _verify(model, stage)
        with _explained(repo_id):
            return _upload(api, stage, repo_id, private, commit_message, create_pr, revision)


def _stage(
    model: CameoModel,
    folder: Path,
    place: str,
    licence: dict[str, str],
    include_head: bool,
    pipeline: Any,
    metrics: Metrics | None,
    pictures: Pictures | None,
    *,
    on_hub: bool = False,
) -> None:
    """Write the files of a save into an empty folder."""
    import diffusers
    from safetensors.torch import save_file

    from cameo import __version__

    base, core = model.base_model, core_module(model.base_model)
    config = replace(model.cameo_config, cameo_version=__version__)
    if on_hub and config.base_model is not None and Path(config.base_model).exists():
        logger.warning(
            "base model %s is a local folder: others have to pass base_model= to load this", config.base_model
        )
        config.base_model = config.base_revision = None
    form = weights.write_weights(base, folder, config=config, pipeline=pipeline)
    config.save(folder)
    head = {key: value.contiguous() for key, value in model.alignment_heads.state_dict().items()}
    if include_head and head:
        save_file(head, str(folder / weights.HEAD_FILE), metadata={"format": "pt"})
    backbone = _backbone(config)
    card = CardFacts(
        place=place,
        on_hub=on_hub,
        form=form,
        config=config,
        class_name=type(core).__name__,
        component=weights.lora_prefix(core, pipeline),
        plain_class=getattr(diffusers, type(core).__name__, None) is type(core),
        licence=licence,
        has_head=include_head and bool(head),
        adapter=_adapter_facts(base) if form in weights.ADAPTER_FORMATS else {},
        metrics=metrics,
        pictures=copy_pictures(pictures, folder),
    )
    if backbone is not None:
        card.pipeline_tag = backbone.pipeline_tag
    write_atomically(folder / "README.md", model_card(card))


def _adapter_facts(base: nn.Module) -> dict[str, Any]:
    settings = base.peft_config[weights.adapter_name(base)]  # type: ignore[index]
    facts = {"type": settings.peft_type.value, "rank": getattr(settings, "r", None)}
    facts["alpha"] = getattr(settings, "lora_alpha", None)
    targets = getattr(settings, "target_modules", None)
    facts["on"] = ", ".join(sorted(targets)) if isinstance(targets, set | list) else targets
    return {name: value for name, value in facts.items() if value is not None}


def _move_in(stage: Path, target: Path) -> None:
    """Move staged files into place, the configuration last; then remove what they made stale."""
    if not target.exists():
        stage.rename(target)
        return
    new = _names(stage)
    stale = weights.stale_files(_names(target), new, place=str(target))
    for name in sorted(new, key=lambda name: name == CONFIG_NAME):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).replace(target / name)
    for name in stale:
        (target / name).unlink()
        with contextlib.suppress(OSError):  # not empty: holds files of others
            if (target / name).parent != target:
                (target / name).parent.rmdir()


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _backbone(config: CameoConfig) -> Any:
    return None if config.backbone is None else get_backbone(config.backbone)


def _local_folder(
    name: str, revision: str | None, token: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if hub_id(name) is None:
        raise DataError(f"{name}: no such folder, and not the id of a Hub repository (owner/name)")
    from huggingface_hub import snapshot_download

    with _explained(name):
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=DOWNLOADED,
            )
        )


def _load_base(config: CameoConfig) -> nn.Module:
    """Load the base denoiser that a configuration names."""
    name = config.base_model
    if name is None or name.startswith("preset:"):
        known = (
            "does not name its base"
            if name is None
            else f"was trained on fresh weights ({name}) that were not saved"
        )
        raise BaseNeeded(f"this adapter {known}; pass the base as base_model=")
    if config.backbone is None:
        raise BaseNeeded(
            f"base {name!r} has no backbone that could load it; load it yourself and pass base_model="
        )
    try:
        loaded = get_backbone(config.backbone).load(name, revision=config.base_revision)
    except NotImplementedError as error:
        raise BaseNeeded(f"{error}; pass it as base_model=") from error
    except OSError as error:
        raise OSError(
            f"base {name!r} (revision {config.base_revision}) could not be loaded: {error}\n"
            "If you have these weights elsewhere, load them and pass base_model="
        ) from error
    denoiser: nn.Module = loaded.denoiser
    return denoiser


def _load_full(folder: Path, form: str, config: CameoConfig, base: nn.Module | None) -> nn.Module:
    backbone = _backbone(config)
    preset = (config.base_model or "").partition("preset:")[2]
    if base is None and form == "diffusers" and backbone is not None:
        plain = weights.read_full(folder, form, backbone=backbone, base=None)
        if backbone.recognises(plain):
            return plain
        # The class alone does not bring the backbone's attention; its own pipeline does.
        base = backbone.build(preset).denoiser if preset else _load_base(config)
    elif base is None and form == "module" and backbone is not None:
        base = backbone.build(preset).denoiser if preset else _load_base(config)
    return weights.read_full(folder, form, backbone=backbone, base=base)


def _read_head(model: CameoModel, folder: Path) -> None:
    from safetensors.torch import load_file

    path = folder / weights.HEAD_FILE
    if path.is_file():
        try:
            model.alignment_heads.load_state_dict(load_file(str(path)))
        except RuntimeError as error:
            raise DataError(f"{path}: does not fit the head in {CONFIG_NAME}: {error}") from error
    elif any(True for _ in model.alignment_heads.parameters()):
        logger.info("%s holds no alignment head; it starts fresh (inference does not need it)", folder)


def _verify(model: CameoModel, stage: Path) -> None:
    """Load the staged files as a user would and compare the outputs bit for bit."""
    base, config = model.base_model, model.cameo_config
    with torch.random.fork_rng(devices=[]):  # fresh heads must not shift the random numbers of a training
        try:
            is_adapter = weights.format_in(stage) in weights.ADAPTER_FORMATS
            again = from_pretrained(stage, base_model=_load_base(config) if is_adapter else None).unwrap()
        except BaseNeeded:
            fresh = weights.without_adapter(base) if is_adapter else _emptied(core_module(base))
            again = from_pretrained(stage, base_model=fresh).unwrap()
    _align_precision(again, base)
    try:
        args, kwargs = (
            get_backbone(config.backbone).example_inputs(core_module(base)) if config.backbone else (None, {})
        )
    except NotImplementedError:
        args, kwargs = None, {}
    if args is None:
        ours, theirs = base.state_dict(), again.state_dict()
        pairs = [(value, theirs.get(_loaded_name(key, base))) for key, value in ours.items()]
        same = all(other is not None and torch.equal(value, other) for value, other in pairs)
    else:
        with _same_processors(core_module(base), core_module(again)), torch.no_grad():
            first, second = (_tensors(_evaluate(one, args, kwargs)) for one in (base, again))
        same = bool(first) and len(first) == len(second) and all(map(torch.equal, first, second))
    if not same:
        raise RuntimeError(
            "the saved files do not reproduce the model's output, so nothing was pushed. Likely causes: the base in "
            f"cameo_config.json ({config.base_model}) is not the one trained on, base weights changed beside the adapter "
            "(save the full model instead), the adapter's scale was changed, or the output holds NaN"
        )


def _emptied(core: nn.Module) -> nn.Module:
    """Copy a module and zero its weights, so that only what is loaded can reproduce its output."""
    blank = copy.deepcopy(core)
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.zero_()
    return blank


def _loaded_name(name: str, base: nn.Module) -> str:
    """Translate a parameter name of the trained model to the freshly loaded one."""
    adapter = weights.adapter_name(base) if weights.adapter_layers(base) else None
    return name if adapter is None else name.replace(f".{adapter}.", f".{weights.ADAPTER}.")


def _align_precision(again: nn.Module, base: nn.Module) -> None:
    """Give the loaded model the devices and precisions of the trained one, as its user would."""
    loaded = dict(core_module(again).named_parameters())
    for name, parameter in core_module(base).named_parameters():
        if (twin := loaded.get(_loaded_name(name, base))) is not None:
            twin.data = twin.data.to(parameter)
    for buffer, twin in zip(core_module(base).buffers(), core_module(again).buffers(), strict=False):
        twin.data = twin.data.to(buffer)


@contextlib.contextmanager
def _same_processors(base: Any, again: Any) -> Iterator[None]:
    """Let both run the loaded model's attention kernels: another kernel differs in the last bits."""
    if not all(hasattr(one, "set_attn_processor") for one in (base, again)):
        yield
        return
    own = dict(base.attn_processors)
    try:
        base.set_attn_processor(dict(again.attn_processors))
        yield
    finally:
        base.set_attn_processor(own)


def _evaluate(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    modes = {one: one.training for one in module.modules()}
    try:
        return module.eval()(*args, **kwargs)
    finally:
        for one, mode in modes.items():
            one.training = mode


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    )
    return [tensor for part in parts for tensor in _tensors(part)]


def _upload(
    api: Any,
    stage: Path,
    repo_id: str,
    private: bool | None,
    message: str,
    create_pr: bool,
    revision: str | None,
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    url = api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    new = _names(stage)
    stale = weights.stale_files(api.list_repo_files(repo_id, revision=revision), new, place=repo_id)
    # One commit: upload_folder may split a folder into several, and a failure between them leaves half a model.
    operations: list[Any] = [CommitOperationAdd(name, str(stage / name)) for name in sorted(new)]
    operations += [CommitOperationDelete(name) for name in stale]
    commit = api.create_commit(
        repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr or None
    )
    return str(commit.pr_url or url)


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into ones that say what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import httpx

    try:
        yield
    except RevisionNotFoundError as error:
        raise DataError(f"{repo_id}: has no such revision. {error}") from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{repo_id}: not in the local cache, and the Hub was not reached. Check the connection and HF_HUB_OFFLINE, or "
            f"pass local_files_only=False. ({error})"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise PermissionError(
                f"{repo_id}: the Hub answered {status}. Check the id; for a private repository or an upload pass token= "
                "or set HF_TOKEN to a token with access (for uploads: write permission to that owner), or run "
                f"`hf auth login`. ({error})"
            ) from error
        raise ConnectionError(f"{repo_id}: the Hub answered {status}; try again later. ({error})") from error
    except httpx.HTTPError as error:
        raise ConnectionError(
            f"{repo_id}: the Hub could not be reached ({type(error).__name__}: {error}). Check the connection, proxy and "
            "HF_ENDPOINT, and try again; nothing half written stays behind"
        ) from error
