"""Checkpoint files: written so that a kill at any moment leaves a whole one, and looked up again."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from imbsam import SettingError

LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"
"""The checkpoint before the last one, in the same folder."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file, syncs it and renames it, so that no checkpoint is ever half-written.

    The ``last.ckpt`` before it is kept as ``previous.ckpt``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the file, and return once it is on the disk.

        Raises:
            OSError: it cannot be written, for example because the disk is full. Nothing is left behind, and the
                existing files are unchanged.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        try:
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            unfinished.unlink(missing_ok=True)
            if (cause := _os_error(error)) is not None:
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise
        if path.name == LAST and path.exists():
            path.replace(path.with_name(PREVIOUS))
        unfinished.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error, which torch.save hides behind a RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = (error.__cause__ or error.__context__) if isinstance(error, RuntimeError) else None
    return error


def check_checkpoint(path: Path) -> None:
    """Refuse a file that is missing, cut off or damaged, before anything is built.

    Args:
        path: A checkpoint. A folder (a sharded one) is not checked.

    Raises:
        SettingError: There is no whole checkpoint; the message names the previous one if that is whole.
    """
    if not path.exists():
        raise SettingError(f"ckpt_path is {path}: there is no such file; a run keeps checkpoints/last.ckpt")
    if path.is_dir() or (reason := _damage(path)) is None:
        return
    previous = path.with_name(PREVIOUS)
    fix = "name another one, or start over without --ckpt_path"
    if previous != path and previous.exists() and _damage(previous) is None:
        fix = f"the previous one is whole: --ckpt_path {previous}"
    raise SettingError(f"ckpt_path is {path}: {reason}; {fix}")


def _damage(path: Path) -> str | None:
    """What is wrong with the file; torch.load checks neither its length nor its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "it is damaged (a checksum is wrong)" if archive.testzip() else None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError):
        return "it is cut off or no checkpoint"


def newest_checkpoint(runs: Path, version: int | str | None = None) -> Path | None:
    """The last checkpoint of the newest run that has one.

    Args:
        runs: The folder with the runs' folders ``version_0``, ``version_1``, ...
        version: Only this run: its number, or the name of its folder.

    Returns:
        Its ``last.ckpt``, or ``previous.ckpt`` if a kill came between the two renames, or None.
    """
    for run in _newest_first(runs) if version is None else [run_folder(runs, version)]:
        for name in (LAST, PREVIOUS):
            if (run / "checkpoints" / name).exists():
                return run / "checkpoints" / name
    return None


def newest_run(runs: Path) -> Path | None:
    """The folder of the newest run, with or without a checkpoint, or None. An empty folder does not count."""
    return next((run for run in _newest_first(runs) if any(run.iterdir())), None)


def run_folder(runs: Path, version: int | str) -> Path:
    """The folder of a run by its number or name, as CSVLogger names it."""
    return runs / (version if isinstance(version, str) else f"version_{version}")


def _newest_first(runs: Path) -> list[Path]:
    versions = [run for run in runs.glob("version_*") if run.name.removeprefix("version_").isdigit()]
    return sorted(versions, key=lambda run: int(run.name.removeprefix("version_")), reverse=True)
