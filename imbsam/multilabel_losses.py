r"""Multi-label losses: one for each pair of a sample and a class.

Each returns shape (N, C), because the engine weights the pairs itself. Reduce with ``.mean()`` for plain training.
Papers that sum over the classes have C times this loss, and so another learning rate.

Shapes of a call ``loss(logits, target)``:

* logits: floating (N, C), on the module's device. 16-bit logits are raised to float32 first, so that the losses are the
  same inside and outside autocast.
* target: :math:`y_{ij}` (N, C), 1 where sample i has class j, else 0; integers, bool or floating.
* returns: losses >= 0 of shape (N, C), float64 for float64 logits, else float32.

A call raises :class:`~imbsam.errors.SettingError` for other shapes, or logits of another number of classes than
``class_counts``. Below, z is a logit and :math:`p = \sigma(z) = 1 / (1 + e^{-z})`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbsam.checks import check_interval, check_numbers
from imbsam.class_groups import class_counts_tensor
from imbsam.errors import SettingError

__all__ = ["Asymmetric", "BinaryCrossEntropy", "DistributionBalanced"]


class _PairLoss(nn.Module):
    """Shared by the losses: settings in ``repr``, and the checks of logits and target."""

    def __init__(self, **settings: float) -> None:
        super().__init__()
        self._settings = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, float(value))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each pair, shape (N, C)."""
        if logits.ndim != 2 or target.shape != logits.shape:
            raise SettingError(
                f"logits have shape {tuple(logits.shape)} and target {tuple(target.shape)}: give both as (N, C), the "
                "target 1 where a sample has a class, else 0"
            )
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return self._losses(logits, target.to(logits.dtype))

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Settings for ``repr``."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self._settings)


class BinaryCrossEntropy(_PairLoss):
    r"""Binary cross-entropy of each pair, torch's.

    .. math::
        \ell_{ij} = -y_{ij} \log p_{ij} - (1 - y_{ij}) \log (1 - p_{ij})

    torch's ``pos_weight`` is the engine's ``class_weight`` of shape (C, 2), with ones in its first column.

    Example:
        >>> BinaryCrossEntropy()(torch.tensor([[0.0, 2.0]]), torch.tensor([[1, 0]]))
        tensor([[0.6931, 2.1269]])
    """

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")


class Asymmetric(_PairLoss):
    r"""Asymmetric loss: a focal loss that discounts easy negatives more than easy positives, and drops the easiest.

    .. math::
        \ell = \begin{cases}
            -(1 - p)^{\gamma_+} \log p & y = 1 \\
            -p_m^{\gamma_-} \log (1 - p_m) & y = 0
        \end{cases} \qquad p_m = \max(p - m, 0)

    A negative with :math:`p \le m` has no loss and no gradient. With ``gamma_neg=gamma_pos=margin=0`` it is binary
    cross-entropy. The gradient is that of the formula; the authors' code can also hold the focusing factors constant.

    Args:
        gamma_neg: :math:`\gamma_-` >= 0, finite; the paper's choice is 4.
        gamma_pos: :math:`\gamma_+` >= 0, finite; the paper's choice is 0.
        margin: m in [0, 1); the paper's choice is 0.05.

    Raises:
        SettingError: if a setting is outside its range.

    Source:
        Ben-Baruch et al., *Asymmetric Loss For Multi-Label Classification*, ICCV 2021, arXiv 2009.14119, section 2
        (asymmetric focusing and probability shifting together).

    Example:
        >>> loss = Asymmetric(gamma_neg=2, margin=0.1)
        >>> loss(torch.tensor([[0.0, 0.0, -4.0]]), torch.tensor([[1, 0, 0]]))  # p = 0.5, 0.5, 0.018
        tensor([[0.6931, 0.0817, 0.0000]])
    """

    gamma_neg: float
    gamma_pos: float
    margin: float

    def __init__(self, gamma_neg: float = 4.0, gamma_pos: float = 0.0, margin: float = 0.05) -> None:
        check_numbers(gamma_neg=gamma_neg, gamma_pos=gamma_pos, hint="0 is no focusing")
        check_interval("[0, 1)", margin=margin)
        super().__init__(gamma_neg=gamma_neg, gamma_pos=gamma_pos, margin=margin)

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        # (1 - p)^gamma as exp(gamma log(1 - p)): a power below 1 has no finite slope at 0
        positive = -(self.gamma_pos * F.logsigmoid(-logits)).exp() * F.logsigmoid(logits)
        if self.margin == 0:
            negative = -(self.gamma_neg * F.logsigmoid(logits)).exp() * F.logsigmoid(-logits)
        else:
            shifted = logits.sigmoid() - self.margin
            counted = shifted > 0
            shifted = shifted.where(counted, 0.5)  # or the slope of a power at 0 would be nan times 0
            negative = (-(shifted**self.gamma_neg) * torch.log1p(-shifted)).where(counted, 0.0)
        return positive.where(target == 1, negative)


class DistributionBalanced(_PairLoss):
    r"""Distribution-balanced loss: weights that know which classes occur together, and tolerance for negatives.

    .. math::
        \ell_{ij} = \hat r_{ij} \Big[ y_{ij} \log \big(1 + e^{-(z_{ij} - \nu_j)}\big)
            + \frac1\lambda (1 - y_{ij}) \log \big(1 + e^{\lambda (z_{ij} - \nu_j)}\big) \Big]

    .. math::
        \hat r_{ij} = \alpha + \sigma(\beta (r_{ij} - \mu)), \qquad
        r_{ij} = \frac{1 / n_j}{\sum_k y_{ik} / n_k}, \qquad
        \nu_j = \frac{\kappa}{\lambda} \log \Big( \frac{N}{n_j} - 1 \Big)

    with :math:`n_j` of N training samples having class j. :math:`r_{ij}` is how often class-balanced sampling would
    draw sample i for class j, over how often it would draw it for any class. A sample without a class has no r, and the
    weight is then that of r going to infinity, :math:`\alpha + 1`. The authors draw their batches class by class and
    put a focal factor on top ("DB-Focal"); neither is here.

    A class that no or every training sample has counts as if one did, or did not.

    Args:
        class_counts: of every class the training samples without it, and those with it: integers (C, 2).
        alpha: :math:`\alpha` >= 0, finite.
        beta: :math:`\beta` >= 0, finite.
        mu: :math:`\mu` >= 0, finite.
        neg_scale: :math:`\lambda` > 0, finite: the larger, the less a negative counts once its logit is below 0.
        kappa: :math:`\kappa` >= 0, finite; 0 shifts no logit.

    Raises:
        SettingError: if a setting is outside its range, or ``class_counts`` is of another shape.

    Source:
        Wu et al., *Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed Datasets*, ECCV 2020,
        arXiv 2007.09654, section 3; defaults and :math:`\nu` as in the authors' code, settings for COCO.

    Example:
        >>> loss = DistributionBalanced([[20, 80], [80, 20]], kappa=0)
        >>> loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1, 0]]))  # r is 1 and 4, lambda 2
        tensor([[0.7622, 0.3812]])
    """

    class_counts: Tensor
    alpha: float
    beta: float
    mu: float
    neg_scale: float
    kappa: float

    def __init__(
        self,
        class_counts: Tensor | Sequence[Sequence[int]],
        alpha: float = 0.1,
        beta: float = 10.0,
        mu: float = 0.2,
        neg_scale: float = 2.0,
        kappa: float = 0.05,
    ) -> None:
        check_numbers(alpha=alpha, beta=beta, mu=mu, kappa=kappa)
        check_numbers(neg_scale=neg_scale, above=True, hint="2 is the authors'")
        super().__init__(alpha=alpha, beta=beta, mu=mu, neg_scale=neg_scale, kappa=kappa)
        counts = class_counts_tensor(class_counts, by_label=True)  # type: ignore[arg-type]
        if counts.dim() != 2:
            raise SettingError(
                f"class_counts has shape {tuple(counts.shape)}: give (C, 2), of every class the training samples "
                "without it and with it"
            )
        self.register_buffer("class_counts", counts, persistent=False)  # counts: .half() would round floats

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        if logits.shape[1] != len(self.class_counts):
            raise SettingError(
                f"logits have {logits.shape[1]} classes and class_counts {len(self.class_counts)}: give the counts of "
                "each class of the model"
            )
        without, having = self.class_counts.clamp(min=1).to(logits.dtype).unbind(1)
        drawn = (target / having).sum(1, keepdim=True)
        r = 1 / having / drawn.clamp(min=torch.finfo(drawn.dtype).tiny)
        weight = self.alpha + torch.sigmoid(self.beta * (r - self.mu))
        z = logits - self.kappa / self.neg_scale * (without / having).log()
        # F.softplus is cut off at 20, which float64 sees
        negative = -F.logsigmoid(-self.neg_scale * z) / self.neg_scale
        return weight * torch.where(target == 1, -F.logsigmoid(z), negative)
