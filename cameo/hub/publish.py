"""Check saved files against the model they came from, and upload them in one commit."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cameo.backbone import get_backbone, unwrap_peft
from cameo.config import CameoConfig
from cameo.errors import DataError
from cameo.hub.loading import ADAPTER, BaseNeededError, load_base, without_adapter
from cameo.hub.weights import ADAPTER_FORMATS, adapter_layers, adapter_name, format_in, stale_files
from cameo.memory import placed_like

__all__ = ["NotReproducedError", "explained_errors", "file_names", "upload", "verify"]


class NotReproducedError(RuntimeError):
    """The saved files do not reproduce the output of the model that they were saved from."""


def verify(base: nn.Module, config: CameoConfig, stage: Path, load: Callable[[nn.Module | None], nn.Module]) -> None:
    """Load staged files into a fresh base and compare with the trained model bit for bit.

    The outputs on the backbone's example inputs are compared; without a backbone, the weights.

    Args:
        base: the trained model.
        config: names its base weights.
        stage: folder with the saved files.
        load: loads the staged files, given the base or None.

    Raises:
        NotReproducedError: if they differ.
    """
    with torch.random.fork_rng(devices=[]):  # fresh heads must not shift the random numbers of a training
        is_adapter = format_in(stage) in ADAPTER_FORMATS
        try:
            again = load(load_base(config) if is_adapter else None)
        except BaseNeededError:
            again = load(without_adapter(base) if is_adapter else _zeroed(unwrap_peft(base)))
    _align_precision(again, base)
    if not _is_reproduced(base, again, config):
        raise NotReproducedError(
            "the saved files do not reproduce the model's output, so nothing was pushed. Likely causes: the "
            f"base in cameo_config.json ({config.base_model}) is not the one trained on, base weights "
            "changed beside the adapter (merge it and save the full model), the adapter's scale was changed, "
            "or the output is NaN"
        )


def _is_reproduced(base: nn.Module, again: nn.Module, config: CameoConfig) -> bool:
    inputs = None
    if config.backbone is not None:
        with contextlib.suppress(NotImplementedError):
            inputs = get_backbone(config.backbone).example_inputs(unwrap_peft(base))
    if inputs is None:
        theirs, loaded_name = unwrap_peft(again).state_dict(), _loaded_names(base)
        pairs = [(value, theirs.get(loaded_name(key))) for key, value in unwrap_peft(base).state_dict().items()]
        return all(other is not None and torch.equal(value, other) for value, other in pairs)
    with _same_processors(unwrap_peft(base), unwrap_peft(again)), torch.no_grad():
        first, second = (_tensors(_evaluate(model, *inputs)) for model in (base, again))
    return bool(first) and len(first) == len(second) and all(map(torch.equal, first, second))


def _zeroed(core: nn.Module) -> nn.Module:
    """Copy a module and zero its weights, so that only what is loaded can reproduce its output."""
    blank = copy.deepcopy(core)
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.zero_()
    return blank


def _loaded_names(base: nn.Module) -> Callable[[str], str]:
    """Return a function that translates a parameter's name in the trained model to its name in the loaded one."""
    if not adapter_layers(base):
        return str
    trained = f".{adapter_name(base)}."  # asked once: it looks at every module
    return lambda name: name.replace(trained, f".{ADAPTER}.")


def _align_precision(again: nn.Module, base: nn.Module) -> None:
    """Give the loaded model the devices, precisions, places in memory and trainable parameters of the trained one."""
    trained, loaded = unwrap_peft(base), unwrap_peft(again)
    twins, loaded_name = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}, _loaded_names(base)
    for name, tensor in [*trained.named_parameters(), *trained.named_buffers()]:
        if (twin := twins.get(loaded_name(name))) is not None:
            twin.data = placed_like(twin.data.to(tensor), tensor)
            # PyTorch chooses the matrix product of some layouts by whether the weight takes a gradient.
            twin.requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def _same_processors(base: Any, again: Any) -> Iterator[None]:
    """Let both models run the attention kernels of the loaded one: another kernel differs in the last bits."""
    if not all(hasattr(model, "set_attn_processor") for model in (base, again)):
        yield
        return
    processors = dict(base.attn_processors)
    try:
        base.set_attn_processor(dict(again.attn_processors))
        yield
    finally:
        base.set_attn_processor(processors)


def _evaluate(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)  # some models draw noise in their forward (Zero123++, on its reference)
            args, kwargs = copy.deepcopy((args, kwargs))  # and some write into their input (ImageDream)
            return module.eval()(*args, **kwargs)
    finally:
        for part, mode in modes.items():
            part.training = mode


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts: Any = output.values() if isinstance(output, Mapping) else output
    return [tensor for part in parts for tensor in _tensors(part)] if isinstance(output, Mapping | list | tuple) else []


def file_names(folder: Path) -> list[str]:
    """List the files below a folder, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def upload(
    stage: Path,
    repo_id: str,
    *,
    token: str | None,
    private: bool | None,
    message: str,
    create_pr: bool,
    revision: str | None,
) -> str:
    """Create the repository if needed, upload the files of `stage` in one commit and return the URL.

    Files of an earlier upload that would mislead are removed in the same commit.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, library_name="cameo")
    with explained_errors(repo_id):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        new = file_names(stage)
        stale = stale_files(api.list_repo_files(repo_id, revision=revision), new, place=repo_id)
        # upload_folder may split a folder into several commits, and a failure between them leaves half a model.
        operations: list[Any] = [CommitOperationAdd(name, str(stage / name)) for name in new]
        operations += [CommitOperationDelete(name) for name in stale]
        commit = api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr or None
        )
    return str(commit.pr_url or url)


@contextlib.contextmanager
def explained_errors(repo_id: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into ones that say what to do."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import httpx  # hub 1.x and 2.x use different HTTP libraries under this name

    try:
        yield
    except RevisionNotFoundError as error:
        raise DataError(f"{repo_id}: has no such revision; check revision=. ({error})") from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{repo_id}: not in the local cache, and the Hub was not reached. Check the connection and "
            f"HF_HUB_OFFLINE, or pass local_files_only=False. ({error})"
        ) from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError(f"{repo_id}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise PermissionError(
                f"{repo_id}: the Hub answered {status}. Check the id. A private repository and every upload "
                "need a token with access (uploads: write permission for that owner): pass token=, set "
                f"HF_TOKEN, or run `hf auth login`. ({error})"
            ) from error
        raise ConnectionError(f"{repo_id}: the Hub answered {status}. ({error})") from error
    except httpx.HTTPError as error:
        raise ConnectionError(
            f"{repo_id}: the Hub could not be reached ({type(error).__name__}: {error}). Check the "
            "connection, the proxy and HF_ENDPOINT, and try again; no incomplete files were left"
        ) from error
