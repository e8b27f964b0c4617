"""An output folder belongs to one run at a time, and the demonstration replaces only an earlier demonstration."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from cameo.errors import DataError
from cameo.files import release_lock, write_atomically
from cameo.processes.launch import Launch
from cameo.settings import current_names, shown_settings
from cameo.training.checkpoints.folder import list_checkpoints
from cameo.training.checkpoints.verify import read_state
from cameo.training.settings import TrainingConfig, continued_settings, load_config

__all__ = ["WITHOUT_CAMEO", "hold_folder", "refuse_other_runs"]

# The lock, and beside it which process has it, since Windows lets nobody else read a locked file.
LOCK_FILE, HOLDER_FILE = ".run.lock", ".run.holder"
# Errors of drives that have no locks.
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# Folder, within the output folder, of the run without CAMEO of a comparison.
WITHOUT_CAMEO = "without_cameo"
# Settings that may differ between two demonstrations: how the run was started, where it is written, and the token.
NOT_COMPARED = frozenset(("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "hub_token"))

# Folders that this process holds: how many times, and the lock.
_held: dict[Path, tuple[int, FileLock | None]] = {}


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
        DataError: if another process holds the folder (the message gives its id, and its machine if that is another
            one), or the folder cannot be written to.
    """
    if not Launch.from_environment().is_main_process:
        yield
        return
    folder = Path(output_dir).resolve()
    count, lock = _held[folder] if folder in _held else (0, _lock(folder))
    _held[folder] = (count + 1, lock)
    try:
        yield
    finally:
        count, lock = _held[folder]
        _held[folder] = (count - 1, lock)
        if count == 1:
            del _held[folder]
            _release(folder, lock)


def _lock(folder: Path) -> FileLock | None:
    """Lock a folder and write down which process holds it; None on a drive that has no locks, with a warning.

    filelock closes the lock in a forked process, so that the data workers of a run that was killed do not keep it.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DataError(
            f"output_dir={folder}: another run is writing there (process {_holder(folder)}). Wait for it or stop it, "
            "or choose another output_dir"
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in WITHOUT_LOCKS:
            raise _cannot_be_written(folder, error) from error
        warnings.warn(f"{folder}: cannot be locked ({error}); start no second run in this folder", stacklevel=4)
        return None
    try:
        write_atomically(folder / HOLDER_FILE, f"{os.getpid()} on {platform.node()}\n")
    except OSError as error:
        _release(folder, lock)
        raise _cannot_be_written(folder, error) from error
    return lock


def _release(folder: Path, lock: FileLock | None) -> None:
    if lock is None:
        return
    (folder / HOLDER_FILE).unlink(missing_ok=True)
    release_lock(lock)


def _holder(folder: Path) -> str:
    """Name the process that holds a folder, and its machine if it is another one."""
    try:
        process, _, machine = (folder / HOLDER_FILE).read_text(encoding="utf-8").strip().partition(" on ")
    except (OSError, ValueError):
        return "unknown"
    return process if machine == platform.node() else f"{process} on {machine}"


def _cannot_be_written(folder: Path, error: OSError) -> DataError:
    cure = "Choose another output_dir, make room there, or make it writable"
    return DataError(f"output_dir={folder}: cannot be written to ({error}). {cure}")


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
