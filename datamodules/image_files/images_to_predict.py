"""Which images to predict: a file, a folder, a list in a file, or several of these."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.image_files.disk import check_files, images_below
from datamodules.image_files.lists import ListedImages
from datamodules.tables.columns import read_columns
from imbsam.errors import SettingError

TABLES = (".csv", ".tsv", ".parquet")


def images_to_predict(given: str | Sequence[str], path_column: str = "path") -> tuple[Path, ListedImages]:
    """Find the images without labels that ``data.predict`` names.

    Args:
        given: An image file; a folder, whose images and those in the folders below it count; a ``.txt`` file with a
            path a line; a ``.csv``, ``.tsv`` or ``.parquet`` file with a column of paths; or a list of image files and
            folders. Paths in a file are relative to its folder.
        path_column: The column of the paths.

    Returns:
        The folder that the paths are relative to, and the images, with label -1: sorted in a folder, otherwise in the
        order in which they are named.

    Raises:
        SettingError: There is no such file, or no image; it names the first five that are missing.
    """
    if not isinstance(given, str):
        paths = [found for one in given for found in _files(one)]
        root, source = Path(), "data.predict"
    else:
        path = Path(given).expanduser()
        source = os.fspath(path)
        if path.suffix.lower() in (*TABLES, ".txt") and path.is_file():
            root, paths = path.parent, _listed(path, path_column)
        elif path.is_dir():
            root, paths = path, sorted(os.path.relpath(found, path) for found in images_below(path))
        else:
            root, paths = Path(), _files(given)
    if not paths:
        raise SettingError(f"data.predict is {source}: there is no image")
    images = ListedImages.from_paths(source, paths, [-1] * len(paths))
    check_files(root, [images], "Paths in a list are relative to its folder.")
    return root, images


def as_text(given: Any) -> str | list[str] | None:
    """A path or paths as text: checkpoints refuse a Path."""
    if given is None:
        return None
    return os.fspath(given) if isinstance(given, (str, Path)) else [os.fspath(path) for path in given]


def _files(one: str) -> list[str]:
    """A file, or the images in a folder."""
    path = Path(one).expanduser()
    if path.is_dir():
        return sorted(images_below(path))
    if not path.is_file():
        raise SettingError(f"data.predict is {one}: there is no such file or folder")
    return [os.fspath(path)]


def _listed(path: Path, column: str) -> list[str]:
    if path.suffix.lower() in TABLES:
        return [row[0] for row in read_columns(path, [column])]
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise SettingError(f"data.predict is {path}: {error.strerror}") from error
    return [line.strip() for line in lines if line.strip()]
