"""A cosine schedule of the learning rate over the whole run."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from imbsam.errors import SettingError


class CosineToEnd(CosineAnnealingLR):
    """PyTorch's cosine, which ends with the run: `T_max` defaults to the number of epochs, or steps, of the run.

    Args:
        optimizer: the optimizer whose learning rate is scheduled.
        T_max: epochs, or steps, to the lowest learning rate.
        eta_min: lowest learning rate.
        last_epoch: as PyTorch's.
    """

    def __init__(
        self, optimizer: Optimizer, T_max: int | None = None, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        if T_max is None:
            raise SettingError(
                "T_max is None: imbsam's LightningModules fill it in, others need the length of the cosine"
            )
        super().__init__(optimizer, T_max, eta_min, last_epoch)
