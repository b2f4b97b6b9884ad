"""Image size, mean and standard deviation of a network's input: from settings, a pretrained model, or the data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from imbsam.checks import check_whole_numbers
from imbsam.errors import SettingError


@dataclass
class Preprocessing:
    """What the images are turned into.

    Args:
        image_size: side of the network's input in pixels.
        mean: mean of each channel, in [0, 1].
        std: standard deviation of each channel, in [0, 1].
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class PreprocessingSettings:
    """The settings of a user, which win over a pretrained model's, which win over the data set's.

    Args:
        image_size: of :class:`Preprocessing`, None where no setting says.
        mean: the same.
        std: the same.
        default: the data set's.

    Attributes:
        used: what holds, since the last call of :meth:`resolve`.

    Raises:
        SettingError: a setting is out of range.
    """

    def __init__(
        self,
        image_size: int | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        default: Preprocessing,
    ) -> None:
        if image_size is not None:
            check_whole_numbers(image_size=image_size)
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and (len(values) != len(default.mean) or not all(0 <= v <= 1 for v in values)):
                raise SettingError(
                    f"{name} is {list(values)}: give {len(default.mean)} numbers in [0, 1], one for each channel"
                )
        if std is not None and not all(std):
            raise SettingError(f"std is {list(std)}: give numbers above 0")
        self._set = {"image_size": image_size, "mean": mean, "std": std}
        self._default = default
        self.used = self.resolve()

    def resolve(
        self,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Preprocessing:
        """What holds for a model; prints one line if it says anything.

        Args:
            image_size: the model's, None where it does not say.
            mean: the same.
            std: the same.
        """
        model = {"image_size": image_size, "mean": mean, "std": std}
        if mean is not None and len(mean) != len(self._default.mean):  # of a model for images of other channels
            model["mean"] = model["std"] = None
        values: dict[str, Any] = {}
        excepted: dict[str, list[str]] = {"set": [], "the data set's": []}
        for name, default in vars(self._default).items():
            theirs = _plain(model[name])
            values[name] = _plain(next(v for v in (self._set[name], theirs, default) if v is not None))
            if self._set[name] is not None and values[name] != theirs:
                excepted["set"].append(f"data.{name}")
            elif self._set[name] is None and theirs is None:
                excepted["the data set's"].append(name)
        self.used = found = Preprocessing(**values)
        if any(value is not None for value in model.values()):
            parts = [
                f"{' and '.join(names)}, which {'is' if len(names) == 1 else 'are'} {what}"
                for what, names in excepted.items()
                if names
            ]
            said = f", except {', and '.join(parts)}" if parts else ""
            numbers = (", ".join(f"{v:.3g}" for v in part) for part in (found.mean, found.std))
            rank_zero_info(
                "images: {} pixels, mean ({}), std ({}): as the model was trained{}".format(
                    found.image_size, *numbers, said
                )
            )
        return found


def _plain(value: int | Sequence[float] | None) -> int | tuple[float, ...] | None:
    return tuple(value) if isinstance(value, Sequence) else value
