"""The prompts of CLIP's text tower: class names that a reader understands, in templates."""

import re
from collections.abc import Sequence
from pathlib import Path

from imbsam.errors import SettingError
from imbsam.messages import first_few

_WORDNET_ID = re.compile(r"n\d{8}")
"""ImageNet's folders, such as n01440764 (tench)."""


def readable_names(class_names: Sequence[str], path: str | Path | None = None) -> list[str]:
    """What the classes are called in prompts.

    Args:
        class_names: the data's, often names of folders: ``_`` is a space, and so are ``-`` and ``/`` in a name without
            any.
        path: a file with other names, see :func:`read_names`.

    Returns:
        A name for each class.

    Raises:
        SettingError: the names are WordNet's ids, or the file cannot be read or does not fit the classes.

    Example:
        >>> readable_names(["sea_lion", "pub-indoor", "Nymphalis l-album"])
        ['sea lion', 'pub indoor', 'Nymphalis l-album']
    """
    if path is not None:
        return read_names(path, class_names)
    if ids := [name for name in class_names if _WORDNET_ID.fullmatch(name)]:
        raise SettingError(
            f"head_init is TextFeatures, and the classes have WordNet's ids for names ({first_few(ids, 2)}), which say "
            "nothing to CLIP: set head_init.names to a file with lines such as 'n01440764 tench'"
        )
    return [re.sub("_+" if " " in name else "[-_/]+", " ", name).strip() for name in class_names]


def read_names(path: str | Path, class_names: Sequence[str]) -> list[str]:
    """Read a file of names, such as the classnames.txt of CoOp's, CLIP's and LIFT's repositories.

    Args:
        path: its lines are a class name of the data, a space or tab, and the name to read, in any order, and may have
            further classes; or, one for each class, the names to read in the order of the classes. ``_`` is a space.
        class_names: the data's.

    Returns:
        A name for each class.

    Raises:
        SettingError: there is no such file, or its lines are neither.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"head_init.names is {path}: it cannot be read ({error}); name a text file") from error
    split = (line.partition("\t" if "\t" in line else " ") for line in lines)
    of_class = {name: readable.strip() for name, _, readable in split}
    found = [of_class[name] for name in class_names if of_class.get(name)]
    if len(found) == len(class_names):
        names = found
    elif len(lines) == len(class_names) and not found and not any(map(_WORDNET_ID.match, lines)):
        names = lines
    else:
        lacking = next(name for name in class_names if not of_class.get(name))
        raise SettingError(
            f"head_init.names is {path}, which has {len(lines)} lines for {len(class_names)} classes and none for "
            f"{lacking}: write a class, a space and the name to read on each line, or the names alone in the order of "
            "the classes"
        )
    return [name.replace("_", " ") for name in names]


def prompts_of(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The prompts of all classes, those of a class one after the other.

    Example:
        >>> prompts_of(["sea lion"], ["a photo of a {}.", "a {}."])
        ['a photo of a sea lion.', 'a sea lion.']
    """
    return [template.replace("{}", name) for name in names for template in templates]
