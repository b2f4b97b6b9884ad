"""Which images to predict: a file, a folder, a list in a file, or several of these."""

import os
from collections.abc import Sequence
from pathlib import Path

from datamodules.image_files.disk import check_files, images_below
from datamodules.image_files.lists import ListedImages
from datamodules.tables.columns import read_columns
from imbsam.errors import SettingError


def images_to_predict(given: str | Path | Sequence[str], path_column: str = "path") -> tuple[Path, ListedImages]:
    """Find the unlabelled images that ``data.predict`` names.

    Args:
        given: An image file; a folder, with the images in it and below it; a ``.txt`` file with a path a line; a
            ``.csv``, ``.tsv`` or ``.parquet`` file with a column of paths; or a list of image files and folders.
            Paths in a file are relative to its folder.
        path_column: The column of the paths.

    Returns:
        The folder that the paths are relative to, and the images, with label -1: sorted in a folder, otherwise in the
        order given.

    Raises:
        SettingError: There is no such file, or no image; it names the first five that are missing.
    """
    root, source = Path(), "data.predict"
    if not isinstance(given, (str, Path)):
        paths = [path for one in given for path in _image_or_folder(Path(one).expanduser())]
    else:
        path = Path(given).expanduser()
        source, suffix = str(path), path.suffix.lower()
        if path.is_dir():
            root, paths = path, sorted(os.path.relpath(image, path) for image in images_below(path))
        elif path.is_file() and suffix in (".csv", ".tsv", ".parquet"):
            root, paths = path.parent, [cell for (cell,) in read_columns(path, [path_column])]
        elif path.is_file() and suffix == ".txt":
            lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
            root, paths = path.parent, [line.strip() for line in lines if line.strip()]
        else:
            paths = _image_or_folder(path)
    if not paths:
        raise SettingError(f"data.predict is {source}, which has no images: give an image, a folder or a list of them")
    images = ListedImages.from_paths(source, paths, [-1] * len(paths))
    check_files(root, [images], "Paths in a list are relative to its folder.")
    return root, images


def _image_or_folder(path: Path) -> list[str]:
    if path.is_dir():
        return sorted(images_below(path))
    if not path.is_file():
        raise SettingError(f"data.predict is {path}: there is no such file or folder")
    return [os.fspath(path)]
