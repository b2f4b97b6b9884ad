"""Whether data have the classes that a model was trained on, by name: a label is only a position."""

from collections.abc import Sequence
from typing import Any

from imbsam import SettingError
from imbsam.messages import first_few


def check_class_names(trained: Sequence[str], data: Any, source: str = "the checkpoint") -> None:
    """Refuse data whose labels mean other classes than the model's outputs do.

    A renamed class folder keeps the number of classes but changes their order: the model would be scored on permuted
    labels, which only a low accuracy would reveal.

    Args:
        trained: Names of the C classes that the model was trained on, in the order of its outputs.
        data: A LightningDataModule; without ``class_names`` (there are no labels) nothing is checked.
        source: Where the trained classes come from, for the message.

    Raises:
        SettingError: The names differ, or their order; the message names the classes.
    """
    names = getattr(data, "class_names", None)
    if names is None or list(names) == list(trained):
        return
    lacking = [name for name in trained if name not in set(names)]
    unknown = [name for name in names if name not in set(trained)]
    if lacking or unknown:
        parts = [f"{source} knows {first_few(lacking)}, which the data lack"] if lacking else []
        parts += [f"the data have {first_few(unknown)}, which {source} does not know"] if unknown else []
        fix = "rename the classes as they were" if len(lacking) == len(unknown) else "use the data it was trained on"
        raise SettingError(f"the classes of the data are not those of {source}: {'; '.join(parts)}: {fix}")
    first = next(i for i, name in enumerate(trained) if name != names[i])
    raise SettingError(
        f"the classes of the data are those of {source} in another order: class {first} is {trained[first]} there and "
        f"{names[first]} in the data: give class_names and labels in the order of the training"
    )
