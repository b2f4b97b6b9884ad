"""The settings of a method that schedules change between calls."""

from collections.abc import Sequence

from torch import Tensor

from imbsam.checks import check_numbers
from imbsam.errors import SettingError
from imbsam.row_weights import class_vector


class Scheduled:
    """Checks ``rho`` and ``class_weight`` of :class:`ClassAwareSAM` whenever they are set."""

    sharpness_weight: Tensor

    @property
    def rho(self) -> float:
        """Length of the perturbation e."""
        return self._rho

    @rho.setter
    def rho(self, rho: float) -> None:
        check_numbers(rho=rho, hint="0.05 is the literature's")
        self._rho = float(rho)

    @property
    def class_weight(self) -> Tensor | None:
        """Loss weight a for every class, float64 (C,) or (C, 2) on the CPU; None if all are 1."""
        return self._class_weight

    @class_weight.setter
    def class_weight(self, class_weight: Tensor | Sequence[float] | None) -> None:
        weight = None if class_weight is None else class_vector("class_weight", class_weight)
        classes = self.sharpness_weight
        if weight is not None and weight.dim() and classes.dim() and len(weight) != len(classes):
            raise SettingError(
                f"class_weight has {len(weight)} entries for {len(classes)} classes: give one weight for each class"
            )
        self._class_weight = weight
