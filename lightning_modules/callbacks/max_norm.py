"""MaxNorm: keep the class weights of the last layer inside a ball."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from imbsam.errors import SettingError
from imbsam.gradients import local_shards
from lightning_modules.backbones.heads import CosineClassifier, classifier


class MaxNorm(Callback):
    r"""Project the weights of every class into a ball of one radius, after every optimizer step.

    .. math::
        w_c \leftarrow \min\left(1, \frac{r}{\|w_c\|}\right) w_c, \qquad
        r = \min_c \|w_c\| + t \left(\max_c \|w_c\| - \min_c \|w_c\|\right)

    with r from the initial weights :math:`w_c`, so that the weights of frequent classes, which have become the longest,
    are cut back to about the length of the others. Biases are not changed. The radius is kept in checkpoints. The
    published code projects only once an epoch.

    Args:
        threshold: t >= 0; the published code uses 0.1 on CIFAR-100-LT. From 1 on only growth is limited.

    Raises:
        SettingError: ``threshold`` is negative, or the head is a cosine one, for which the lengths do not matter.

    Source:
        Alshammari et al., *Long-Tailed Recognition via Weight Balancing*, CVPR 2022, arXiv 2203.14197, and its code
        (ShadeAlsha/LTR-weight-balancing, ``utils/regularizers.py``).
    """

    def __init__(self, threshold: float = 0.1) -> None:
        if not threshold >= 0:
            raise SettingError(f"threshold is {threshold}: give a number from 0 (0.1 is the published code's)")
        self.threshold = threshold
        self.radius: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the radius from the initial weights, unless a checkpoint has it."""
        classifier = _classifier(pl_module)
        if isinstance(classifier, CosineClassifier):
            raise SettingError("MaxNorm is for a linear head: the lengths of a cosine head's weights do not matter")
        if self.radius is None:
            weight: Any = classifier.weight
            norms = (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().norm(dim=1)
            self.radius = float(norms.min() + self.threshold * (norms.max() - norms.min()))
        max_norm_(classifier.weight, self.radius)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Project; between the micro-batches of a step nothing changes."""
        assert self.radius is not None
        max_norm_(_classifier(pl_module).weight, self.radius)

    def state_dict(self) -> dict[str, Any]:
        """The radius."""
        return {"radius": self.radius}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume with the radius of the start."""
        self.radius = state_dict["radius"]


def _classifier(pl_module: Any) -> Any:
    return classifier(pl_module.backbone)


@torch.no_grad()
def max_norm_(weight: Tensor, radius: float) -> None:
    """Shorten rows longer than the radius, in place.

    Args:
        weight: shape (C, D), floating; of a sharded one this rank's rows.
        radius: greatest length of a row, > 0.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> max_norm_(weight, radius=1.0)
        >>> weight
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    (rows,) = local_shards([weight])
    if len(rows):
        rows.copy_(torch.renorm(rows, p=2, dim=0, maxnorm=radius))
