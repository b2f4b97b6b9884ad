"""A cosine schedule of the learning rate that is as long as the run."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from imbsam.errors import SettingError


class CosineToEnd(CosineAnnealingLR):
    """PyTorch's cosine, which ends with the run: `T_max` is the run's epochs, or steps, where it is not given.

    Args:
        optimizer: whose learning rate it is.
        T_max: epochs, or steps, to the least learning rate.
        eta_min: least learning rate.
        last_epoch: as PyTorch's.
    """

    def __init__(
        self, optimizer: Optimizer, T_max: int | None = None, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        if T_max is None:
            raise SettingError("T_max is None: outside of our modules, which fill it in, say how long the cosine is")
        super().__init__(optimizer, T_max, eta_min, last_epoch)
