r"""Per-sample classification losses, some of which know the class prior.

Each returns one loss per sample, shape (N,), because the engine weights the samples itself. Reduce with
``.mean()`` for plain training.

Shapes of a call ``loss(logits, target)``:

* logits: floating (N, C), on the module's device. 16-bit logits are raised to float32 first, so that the losses are the
  same inside and outside autocast.
* target: int64 class indices (N,), or floating probabilities :math:`q` (N, C), as mixup and CutMix make them. A sample
  with probabilities has the expected loss :math:`\sum_j q_j\, \ell(x, j)`; for cross-entropy that is the usual
  definition.
* returns: losses >= 0 of shape (N,), float64 for float64 logits, else float32.

A call raises :class:`~imbsam.errors.SettingError` for other shapes, or logits of another number of classes than
``class_counts``.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbsam.checks import check_interval, check_numbers
from imbsam.class_groups import nonzero_class_counts
from imbsam.errors import SettingError

__all__ = ["LDAM", "CrossEntropy", "Focal", "LogitAdjusted", "VectorScaling"]


class _Loss(nn.Module):
    """Shared by the losses: class counts, settings in ``repr``, and the checks of logits and target."""

    class_counts: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int] | None = None, **settings: float) -> None:
        super().__init__()
        counts = None if class_counts is None else nonzero_class_counts(class_counts)
        # the counts and not what is computed from them: .half() and bf16-true training round floats
        self.register_buffer("class_counts", counts, persistent=False)
        self._settings = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, float(value))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each sample, shape (N,)."""
        if logits.ndim != 2 or target.shape not in (logits.shape[:1], logits.shape):
            raise SettingError(
                f"logits have shape {tuple(logits.shape)} and target {tuple(target.shape)}: give logits (N, C) with "
                "class indices (N,) or probabilities (N, C)"
            )
        if self.class_counts is not None and logits.shape[1] != len(self.class_counts):
            raise SettingError(
                f"logits have {logits.shape[1]} classes and class_counts {len(self.class_counts)}: give one count per "
                "class of the model"
            )
        return self._losses(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, target)

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Settings for ``repr``."""
        classes = [] if self.class_counts is None else [f"num_classes={len(self.class_counts)}"]
        return ", ".join([*classes, *(f"{name}={getattr(self, name)}" for name in self._settings)])


class CrossEntropy(_Loss):
    r"""Softmax cross-entropy of each sample.

    .. math::
        \ell_i = -\sum_{j} q_{ij} \log \frac{e^{f_j(x_i)}}{\sum_k e^{f_k(x_i)}}, \qquad
        q_{ij} = (1 - \alpha) p_{ij} + \frac{\alpha}{C}

    with logits :math:`f`, targets :math:`p` (one-hot for class indices) and label smoothing :math:`\alpha`.

    Args:
        label_smoothing: :math:`\alpha` in [0, 1].

    Raises:
        SettingError: if ``label_smoothing`` is outside [0, 1].

    Source:
        Label smoothing: Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*,
        CVPR 2016, arXiv 1512.00567, section 7.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> CrossEntropy()(logits, torch.tensor([0, 1]))
        tensor([0.1269, 0.6931])
    """

    label_smoothing: float

    def __init__(self, label_smoothing: float = 0.0) -> None:
        check_interval("[0, 1]", label_smoothing=label_smoothing)
        super().__init__(label_smoothing=label_smoothing)

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        return _cross_entropy(logits, target, self.label_smoothing)


class LogitAdjusted(_Loss):
    r"""Cross-entropy of logits shifted by the class prior, so that the raw logits suit a balanced test set.

    .. math::
        \ell_i = -\sum_j q_{ij}
        \log \frac{e^{f_j(x_i) + \tau \log \pi_j}}{\sum_k e^{f_k(x_i) + \tau \log \pi_k}},
        \qquad \pi_j = \frac{n_j}{\sum_k n_k}

    with :math:`q` as in :class:`CrossEntropy`. The shift belongs to the loss alone: predict with the argmax
    of the raw logits. ``tau=1`` is balanced softmax, ``tau=0`` plain cross-entropy.

    A class without training samples counts as if it had one: its true prior 0 would shift its logit by minus infinity.

    Args:
        class_counts: training samples per class :math:`n_j`, C integers, at least one above 0.
        tau: :math:`\tau` >= 0, finite; the paper's experiments use 1.
        label_smoothing: in [0, 1].

    Raises:
        SettingError: if a setting is outside its range, or every count is 0.

    Source:
        Menon et al., *Long-tail learning via logit adjustment*, ICLR 2021, arXiv 2007.07314, equation 10;
        Ren et al., *Balanced Meta-Softmax for Long-Tailed Visual Recognition*, NeurIPS 2020,
        arXiv 2007.10740, theorem 1 (``tau=1``).

    Example:
        >>> logits = torch.zeros(2, 2)
        >>> LogitAdjusted([90, 10])(logits, torch.tensor([0, 1]))  # -log 0.9, -log 0.1
        tensor([0.1054, 2.3026])
    """

    tau: float
    label_smoothing: float

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        tau: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        check_numbers(tau=tau, hint="1 is balanced softmax")
        check_interval("[0, 1]", label_smoothing=label_smoothing)
        super().__init__(class_counts, tau=tau, label_smoothing=label_smoothing)

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        counts = self.class_counts.clamp(min=1).to(logits.dtype)
        return _cross_entropy(logits + self.tau * (counts / counts.sum()).log(), target, self.label_smoothing)


class Focal(_Loss):
    r"""Focal loss in its softmax form: cross-entropy that down-weights well-classified samples.

    .. math::
        \ell_i = -\sum_j q_{ij}\, (1 - p_j(x_i))^\gamma \log p_j(x_i), \qquad
        p_j(x_i) = \frac{e^{f_j(x_i)}}{\sum_k e^{f_k(x_i)}}

    with targets :math:`q` (one-hot for class indices). It does not use the class counts; class-balanced focal loss is
    this loss with :func:`imbsam.class_weights.effective_number_weights`.

    Args:
        gamma: :math:`\gamma` >= 0, finite; 0 is cross-entropy, 2 the paper's choice.

    Raises:
        SettingError: if ``gamma`` is outside its range.

    Source:
        Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017, arXiv 1708.02002, equation 4, with the softmax
        probability instead of the sigmoid's, as in Cui et al. (CVPR 2019, arXiv 1901.05555) and the LDAM code.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> Focal(gamma=2.0)(logits, torch.tensor([0, 1]))  # cross-entropy: 0.1269, 0.6931
        tensor([0.0018, 0.1733])
    """

    gamma: float

    def __init__(self, gamma: float = 2.0) -> None:
        check_numbers(gamma=gamma, hint="0 is cross-entropy, 2 usual")
        super().__init__(gamma=gamma)

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        against = _log_odds_against(logits)
        # log(1 - p) and not 1 - p: a power below 1 has no finite slope at 0
        return _target_loss(torch.exp(-self.gamma * _softplus(-against)) * _softplus(against), target)


class LDAM(_Loss):
    r"""Label-distribution-aware margin loss: rare classes must win by a larger margin.

    .. math::
        \ell(x, y) = -\log \frac{e^{f_y(x) - s \Delta_y}}{e^{f_y(x) - s \Delta_y} + \sum_{k \ne y} e^{f_k(x)}}, \qquad
        \Delta_j = \Delta_\text{max} \left( \frac{\min_k n_k}{n_j} \right)^{1/4}

    so that :math:`\Delta_j \propto n_j^{-1/4}` and the largest margin is ``max_margin``.

    **The logits are already scaled.** The margins are for a cosine classifier, whose logits are
    :math:`f = s \cos` with s = ``scale``; then this is :math:`\operatorname{CE}(s (\cos - \Delta_y))`, the loss of the
    paper's code, which scales inside the loss. Here the head scales, so that its softmax gives probabilities and the
    losses can be compared. ``scale`` must be the head's. With an ordinary linear head the margins have no fixed
    meaning, since its logits can grow without bound.

    A class without training samples has the margin of the smallest class that has samples.

    Args:
        class_counts: training samples per class :math:`n_j`, C integers, at least one above 0.
        max_margin: :math:`\Delta_\text{max}` >= 0, finite, in units of the cosine; 0 is cross-entropy.
        scale: :math:`s` > 0, finite, the scale of the cosine head.

    Raises:
        SettingError: if a setting is outside its range, or every count is 0.

    Source:
        Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss*, NeurIPS 2019,
        arXiv 1906.07413, section 3.2; ``max_margin`` 0.5 and ``scale`` 30 are its code's.

    Example:
        >>> logits = 30 * torch.tensor([[0.9, 0.6], [0.5, 0.5]])
        >>> LDAM([160, 10])(logits, torch.tensor([0, 1]))  # margins 0.25 and 0.5
        tensor([ 0.2014, 15.0000])
    """

    max_margin: float
    scale: float

    def __init__(self, class_counts: Tensor | Sequence[int], max_margin: float = 0.5, scale: float = 30.0) -> None:
        check_numbers(max_margin=max_margin, hint="0.5 is the paper's")
        check_numbers(scale=scale, above=True, hint="30 is the paper's")
        super().__init__(class_counts, max_margin=max_margin, scale=scale)

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        counts = self.class_counts.to(logits.dtype)
        smallest = counts.masked_fill(counts == 0, math.inf).min()
        margins = self.max_margin * (smallest / counts.clamp(min=smallest)) ** 0.25
        return _target_loss(_softplus(_log_odds_against(logits) + self.scale * margins), target)


class VectorScaling(_Loss):
    r"""Vector-scaling loss: cross-entropy of logits scaled and shifted by class.

    .. math::
        \ell_i = -\sum_j q_{ij}
        \log \frac{e^{\Delta_j f_j(x_i) + \iota_j}}{\sum_k e^{\Delta_k f_k(x_i) + \iota_k}}, \qquad
        \Delta_j = \left( \frac{n_j}{\max_k n_k} \right)^\gamma, \qquad
        \iota_j = \tau \log \frac{n_j}{\sum_k n_k}

    with targets :math:`q` (one-hot for class indices). The scaling moves the decision boundaries of a model that fits
    its training set, where a shift no longer does; the shift helps at the start. Both belong to the loss alone: predict
    with the argmax of the raw logits. ``gamma=0`` is :class:`LogitAdjusted`, ``tau=0`` the class-dependent temperature
    loss (Ye et al., 2020, arXiv 2001.01385).

    A class without training samples counts as if it had one.

    Args:
        class_counts: training samples per class :math:`n_j`, C integers, at least one above 0.
        gamma: :math:`\gamma` >= 0, finite.
        tau: :math:`\tau` >= 0, finite.

    Raises:
        SettingError: if a setting is outside its range, or every count is 0.

    Source:
        Kini et al., *Label-Imbalanced and Group-Sensitive Classification under Overparameterization*, NeurIPS 2021,
        arXiv 2103.01550; the dependence on n_j and the defaults are its code's.

    Example:
        >>> logits = torch.tensor([[2.0, 2.0], [2.0, 2.0]])
        >>> VectorScaling([90, 10], gamma=0.3, tau=1.0)(logits, torch.tensor([0, 1]))
        tensor([0.0414, 3.2041])
    """

    gamma: float
    tau: float

    def __init__(self, class_counts: Tensor | Sequence[int], gamma: float = 0.3, tau: float = 1.0) -> None:
        check_numbers(gamma=gamma, hint="0 is logit adjustment")
        check_numbers(tau=tau, hint="0 shifts nothing")
        super().__init__(class_counts, gamma=gamma, tau=tau)

    def _losses(self, logits: Tensor, target: Tensor) -> Tensor:
        counts = self.class_counts.clamp(min=1).to(logits.dtype)
        scales, shifts = (counts / counts.max()) ** self.gamma, self.tau * (counts / counts.sum()).log()
        return _cross_entropy(scales * logits + shifts, target)


def _log_odds_against(logits: Tensor) -> Tensor:
    """log((1 - p_j) / p_j) for every class, (N, C), exact to rounding even if p_j is nearly 1."""
    top = logits.argmax(1, keepdim=True)
    # log sum of exp over the other classes: from p_j, and for the top class, where 1 - p_j cancels, summed directly
    others = logits.logsumexp(1, keepdim=True) + torch.log1p(-logits.softmax(1).scatter(1, top, 0.0))
    others = others.scatter(1, top, logits.scatter(1, top, -math.inf).logsumexp(1, keepdim=True))
    return others - logits


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, x.new_zeros(()))  # F.softplus is cut off at 20, which float64 sees


def _target_loss(class_losses: Tensor, target: Tensor) -> Tensor:
    """The loss of each sample from those of all classes: its own class, or the expectation."""
    if target.is_floating_point():
        return (target.to(class_losses.dtype) * class_losses).sum(1)
    return F.nll_loss(-class_losses, target, reduction="none")


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    if target.is_floating_point():
        target = target.to(logits.dtype)
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
