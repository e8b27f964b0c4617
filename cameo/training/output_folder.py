"""An output folder belongs to one run at a time, and the demonstration replaces only an earlier demonstration."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from cameo.errors import DataError
from cameo.processes.launch import Launch
from cameo.settings import current_names, shown_settings
from cameo.training.checkpoint import list_checkpoints, read_state
from cameo.training.settings import TrainingConfig, continued_settings, load_config

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None  # type: ignore[assignment]

__all__ = ["WITHOUT_CAMEO", "hold_folder", "refuse_other_runs"]

LOCK_FILE = ".run.lock"
# Folder, within the output folder, of the run without CAMEO of a comparison.
WITHOUT_CAMEO = "without_cameo"
# Settings that may differ between two demonstrations: how the run was started, where it is written, and the token.
NOT_COMPARED = frozenset(("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "hub_token"))

# Folders that this process holds: how many times, and the descriptor of the open lock file.
_held: dict[Path, tuple[int, int]] = {}


@contextlib.contextmanager
def hold_folder(output_dir: str | Path) -> Iterator[None]:
    """Keep other processes from writing to a folder during the `with` block; this process may hold it several times.

    Of the processes of one run only the main process holds the folder. The lock ends with the process, also if the
    process is killed.

    Example:
        >>> import tempfile
        >>> with hold_folder(tempfile.mkdtemp()), hold_folder(tempfile.mkdtemp()):
        ...     pass

    Raises:
        DataError: if another process holds the folder (the message gives its id), or the folder cannot be written to.
    """
    if fcntl is None or not Launch.from_environment().is_main_process:
        yield
        return
    folder = Path(output_dir).resolve()
    count, file = _held[folder] if folder in _held else (0, _lock(folder))
    _held[folder] = (count + 1, file)
    try:
        yield
    finally:
        count, file = _held[folder]
        _held[folder] = (count - 1, file)
        if count == 1:
            del _held[folder]
            (folder / LOCK_FILE).unlink(missing_ok=True)
            os.close(file)


def _lock(folder: Path) -> int:
    """Lock the file of a folder and write the id of this process into it; returns the open file.

    A record lock rather than `flock`: after a run was killed, its forked data workers would keep a lock by `flock`.
    """
    path = folder / LOCK_FILE
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DataError(
                f"output_dir={folder}: cannot be written to ({error}). Choose another output_dir, or make it writable"
            ) from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.pread(file, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(file)
            raise DataError(
                f"output_dir={folder}: another run is writing there (process {holder}). Wait for it or stop it, or "
                "choose another output_dir"
            ) from error
        except OSError as error:
            warnings.warn(f"{path}: cannot be locked ({error}); start no second run in this folder", stacklevel=4)
            return file
        try:  # the previous holder may have removed the file between the two calls
            current = path.stat().st_ino == os.fstat(file).st_ino
        except FileNotFoundError:
            current = False
        if current:
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
            return file
        os.close(file)


def refuse_other_runs(planned: Mapping[str, TrainingConfig]) -> None:
    """Raise `DataError` if the demonstration would replace a run with settings of its own.

    An output folder may be empty, or hold the results of a demonstration with the same settings, which its
    `config.yaml` and the settings in its checkpoints show.
    """
    for config in planned.values():
        folder = Path(config.output_dir)
        if reason := _other_run(folder, config):
            raise DataError(
                f"output_dir={folder}: {reason}. The recipe without arguments replaces only an earlier run of the same "
                "kind. Give another output_dir=, or overwrite_output_dir=true to replace what is there"
            )


def _other_run(folder: Path, config: TrainingConfig) -> str | None:
    """Say why a folder holds another run than the one with these settings; None if it does not."""
    if not folder.is_dir():
        return f"{folder} is a file" if folder.exists() else None
    if not any(path.name != WITHOUT_CAMEO and not path.name.startswith(".") for path in folder.iterdir()):
        return None
    file = folder / "config.yaml"
    if not file.is_file():
        return "holds files, and no config.yaml that says of which run"
    try:
        saved = shown_settings(load_config(file, interpolate=False))
    except ValueError as error:
        return f"holds a run whose settings cannot be read ({error})"
    if differing := _differing(saved, shown_settings(config)):
        return f"holds a run with settings of its own ({differing})"
    for checkpoint in list_checkpoints(folder):
        try:
            state = current_names(TrainingConfig, read_state(checkpoint)["settings"], warn=False)
        except (ValueError, KeyError) as error:
            return f"holds {checkpoint.name}, whose settings cannot be read ({error!r})"
        saved_settings = {name: value for name, value in state.items() if name != "processes"}
        if differing := _differing(saved_settings, continued_settings(config)):
            return f"holds {checkpoint.name} of a run with settings of its own ({differing})"
    return None


def _differing(saved: Mapping[str, object], given: Mapping[str, object]) -> str:
    """List the settings that differ, with both values; a setting that is missing had its default."""
    names = sorted(name for name in given.keys() | saved.keys() if name not in NOT_COMPARED)
    pairs = {name: (saved.get(name, getattr(TrainingConfig, name, None)), given.get(name)) for name in names}
    return ", ".join(f"{name}={old}, not {new}" for name, (old, new) in pairs.items() if old != new)
