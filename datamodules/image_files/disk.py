"""Image files on the disk: found below a folder, or looked for where a list names them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from torchvision.datasets.folder import IMG_EXTENSIONS

from datamodules.image_files.lists import ListedImages
from imbsam.errors import SettingError
from imbsam.messages import first_few


def check_files(root: Path, parts: Sequence[ListedImages], advice: str) -> int:
    """Look for every listed file, by reading each folder once instead of asking for each file.

    Args:
        root: Folder that the paths are relative to.
        parts: The lists.
        advice: Where to get what is missing.

    Returns:
        Number of different files.

    Raises:
        SettingError: Files are missing; it names the first five and counts them.
    """
    wanted: dict[str, set[str]] = {}
    for part in parts:
        for path in part.paths:
            folder, _, name = os.fsdecode(path).rpartition("/")
            wanted.setdefault(folder, set()).add(name)
    console = Console(stderr=True)
    folders = track(
        wanted,
        f"looking for {sum(map(len, wanted.values())):,} images",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    found = {folder: _files(root / folder) for folder in folders}
    for part in parts:
        missing = []
        for path in part.paths:
            folder, _, name = os.fsdecode(path).rpartition("/")
            if name not in found[folder]:
                missing.append(os.fsdecode(path))
        if missing:
            raise SettingError(
                f"{len(missing):,} of the {len(part):,} images in {part.source} are not in {root}: "
                f"{first_few(missing)}. {advice}"
            )
    return sum(map(len, wanted.values()))


def images_below(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Paths of the images in a folder and those below it, links followed.

    Args:
        folder: The folder.
        above: Device and inode of the folders it lies in; those of the first call are found.

    Raises:
        SettingError: A link leads to a folder that it lies in, or to nothing, or a folder cannot be read.
    """
    try:
        above = above or tuple(map(_identity, folder.absolute().parents))
        own = _identity(folder)
        if own in above:
            raise SettingError(f"{folder} is a link to a folder that it lies in: remove that link.")
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.lower().endswith(IMG_EXTENSIONS) and not entry.name.startswith("."):
                    yield entry.path
                elif entry.is_dir():
                    yield from images_below(Path(entry.path), (*above, own))
    except OSError as error:
        raise SettingError(f"{error.filename or folder} cannot be read: {error.strerror}.") from error


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _files(folder: Path) -> set[str]:
    """Names in a folder; a link counts where it leads somewhere."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_symlink() or os.path.exists(entry.path)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise SettingError(f"folder {folder} cannot be read: {error.strerror}.") from error
