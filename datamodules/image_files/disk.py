"""Image files on disk: the images below a folder, and the files that a list names."""

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

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
    names = cache(lambda folder: _names(root / folder))
    files: set[str] = set()
    for part in parts:
        paths = [os.fsdecode(path) for path in part.paths]
        missing = []
        for path in tqdm(paths, "looking for images", leave=False, disable=None):
            folder, _, name = path.rpartition("/")
            if name not in names(folder):
                missing.append(path)
        if missing:
            raise SettingError(
                f"{len(missing):,} of the {len(part):,} images in {part.source} are not in {root}: "
                f"{first_few(missing)}. {advice}"
            )
        files.update(paths)
    return len(files)


def images_below(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Paths of the images in a folder and those below it, following links.

    Args:
        folder: The folder.
        above: Device and inode of the folders above it; the recursion passes them on.

    Raises:
        SettingError: A link leads to a folder above it or to nothing, or a folder cannot be read.
    """
    try:
        above = above or tuple(map(_identity, folder.absolute().parents))
        own = _identity(folder)
        if own in above:
            raise SettingError(f"{folder} is a link to a folder that it lies in: remove the link")
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.lower().endswith(IMG_EXTENSIONS) and not entry.name.startswith("."):
                    yield entry.path
                elif entry.is_dir():
                    yield from images_below(Path(entry.path), (*above, own))
    except OSError as error:
        raise SettingError(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _names(folder: Path) -> set[str]:
    """Names in a folder; dangling links do not count."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_symlink() or os.path.exists(entry.path)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise SettingError(f"folder {folder} cannot be read: {error.strerror}") from error
