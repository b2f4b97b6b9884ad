"""Per-sample classification losses that may know the class prior.

Each returns one loss per row, shape (N,), because class-aware sharpness weighs the rows itself. Reduce with
``.mean()`` for plain training. Logits of 16 bits are raised to float32 first, so that the losses are the
same inside and outside autocast.

Targets are class indices (N,), or probabilities p (N, C), as mixup and CutMix make them: then the loss of a row is
the expected one, sum_j p_ij * loss(x_i, j), which for cross-entropy is its usual definition.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbsam.class_groups import class_counts_tensor
from imbsam.errors import SettingError

__all__ = ["LDAM", "CrossEntropy", "Focal", "LogitAdjusted", "VectorScaling"]


class CrossEntropy(nn.Module):
    r"""Softmax cross-entropy of each row.

    .. math::
        \ell_i = -\sum_{j} q_{ij} \log \frac{e^{f_j(x_i)}}{\sum_k e^{f_k(x_i)}}, \qquad
        q_{ij} = (1 - \alpha) p_{ij} + \frac{\alpha}{C}

    with logits :math:`f`, targets :math:`p` (one-hot for class indices) and label smoothing :math:`\alpha`.

    Args:
        label_smoothing: :math:`\alpha` in [0, 1].

    Raises:
        SettingError: if ``label_smoothing`` is outside [0, 1].

    Shapes:
        * logits: floating (N, C), any device.
        * target: int64 class indices (N,), or floating probabilities (N, C), the rows of which sum to 1.
        * returns: losses >= 0 of shape (N,), float64 for float64 logits, else float32.

    Source:
        Label smoothing: Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*,
        CVPR 2016, arXiv 1512.00567, section 7.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> CrossEntropy()(logits, torch.tensor([0, 1]))
        tensor([0.1269, 0.6931])
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = _smoothing(label_smoothing)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each row, shape (N,)."""
        _check_shapes(logits, target)
        return _cross_entropy(_wide(logits), target, self.label_smoothing)

    def extra_repr(self) -> str:
        """Settings for ``repr``."""
        return f"label_smoothing={self.label_smoothing}"


class LogitAdjusted(nn.Module):
    r"""Cross-entropy of logits shifted by the class prior, so that the raw logits serve a balanced test set.

    .. math::
        \ell_i = -\sum_j q_{ij}
        \log \frac{e^{f_j(x_i) + \tau \log \pi_j}}{\sum_k e^{f_k(x_i) + \tau \log \pi_k}},
        \qquad \pi_j = \frac{n_j}{\sum_k n_k}

    with :math:`q` as in :class:`CrossEntropy`. The shift belongs to the loss alone: predict with the argmax
    of the raw logits. ``tau=1`` is balanced softmax, ``tau=0`` plain cross-entropy.

    A class without training samples counts as if it had one. With its true prior 0 the shift would be minus
    infinity, the loss of a row of that class infinite, and nan where targets are probabilities.

    Args:
        class_counts: training samples per class :math:`n_j`, C integers, at least one above 0.
        tau: :math:`\tau` >= 0, finite; the paper's experiments use 1.
        label_smoothing: in [0, 1].

    Raises:
        SettingError: if a setting is out of its range, every count is 0, or (in ``forward``) the logits have
            another number of classes than ``class_counts``.

    Shapes:
        * logits: floating (N, C), any device that the module was moved to.
        * target: int64 class indices (N,), or floating probabilities (N, C), the rows of which sum to 1.
        * returns: losses >= 0 of shape (N,), float64 for float64 logits, else float32.

    Source:
        Menon et al., *Long-tail learning via logit adjustment*, ICLR 2021, arXiv 2007.07314, equation 10;
        Ren et al., *Balanced Meta-Softmax for Long-Tailed Visual Recognition*, NeurIPS 2020,
        arXiv 2007.10740, theorem 1 (``tau=1``).

    Example:
        >>> logits = torch.zeros(2, 2)
        >>> LogitAdjusted([90, 10])(logits, torch.tensor([0, 1]))  # -log 0.9, -log 0.1
        tensor([0.1054, 2.3026])
    """

    class_counts: Tensor

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        tau: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.tau = _finite("tau", tau, "1 is balanced softmax")
        self.label_smoothing = _smoothing(label_smoothing)
        self.register_buffer("class_counts", _some_counts(class_counts), persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each row, shape (N,)."""
        logits = _wide(logits)
        _check_shapes(logits, target, self.class_counts)
        counts = self.class_counts.clamp(min=1).to(logits.dtype)
        return _cross_entropy(logits + self.tau * (counts / counts.sum()).log(), target, self.label_smoothing)

    def extra_repr(self) -> str:
        """Settings for ``repr``."""
        classes = self.class_counts.numel()
        return f"num_classes={classes}, tau={self.tau}, label_smoothing={self.label_smoothing}"


class Focal(nn.Module):
    r"""Focal loss in its softmax form: cross-entropy that counts less for rows that are classified well.

    .. math::
        \ell_i = -\sum_j q_{ij}\, (1 - p_j(x_i))^\gamma \log p_j(x_i), \qquad
        p_j(x_i) = \frac{e^{f_j(x_i)}}{\sum_k e^{f_k(x_i)}}

    with targets :math:`q` (one-hot for class indices). It knows nothing of the class counts; class-balanced focal loss
    is this one with :func:`imbsam.class_weights.effective_number_weights`.

    Args:
        gamma: :math:`\gamma` >= 0, finite; 0 is cross-entropy, 2 the paper's choice.

    Raises:
        SettingError: if ``gamma`` is out of its range.

    Shapes:
        * logits: floating (N, C), any device.
        * target: int64 class indices (N,), or floating probabilities (N, C), the rows of which sum to 1.
        * returns: losses >= 0 of shape (N,), float64 for float64 logits, else float32.

    Source:
        Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017, arXiv 1708.02002, equation 4, with the softmax
        probability in place of the sigmoid's, as in Cui et al. (below) and the LDAM code.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> Focal(gamma=2.0)(logits, torch.tensor([0, 1]))  # cross-entropy: 0.1269, 0.6931
        tensor([0.0018, 0.1733])
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = _finite("gamma", gamma, "0 is cross-entropy, 2 usual")

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each row, shape (N,)."""
        logits = _wide(logits)
        _check_shapes(logits, target)
        against = _log_odds_against(logits)
        # log(1 - p) and not 1 - p: a power below 1 has no finite slope at 0
        return _of_target(torch.exp(-self.gamma * _softplus(-against)) * _softplus(against), target)

    def extra_repr(self) -> str:
        """Settings for ``repr``."""
        return f"gamma={self.gamma}"


class LDAM(nn.Module):
    r"""Label-distribution-aware margin loss: rare classes must win by a larger margin.

    .. math::
        \ell(x, y) = -\log \frac{e^{f_y(x) - s \Delta_y}}{e^{f_y(x) - s \Delta_y} + \sum_{k \ne y} e^{f_k(x)}}, \qquad
        \Delta_j = \Delta_\text{max} \left( \frac{\min_k n_k}{n_j} \right)^{1/4}

    so that :math:`\Delta_j \propto n_j^{-1/4}` and the largest margin is ``max_margin``. A row of probabilities
    :math:`q` has the loss :math:`\sum_j q_j\, \ell(x, j)`, every class with its own margin.

    **The logits are already scaled.** The margins are for a cosine classifier, whose logits are
    :math:`f = s \cos` with s = ``scale``; then this is :math:`\operatorname{CE}(s (\cos - \Delta_y))`, the loss of the
    paper's code, which scales inside the loss. Here the head scales, so that its softmax gives probabilities and the
    loss of other criteria can be compared. ``scale`` must be the head's. On an ordinary linear head the loss is
    defined too, but the margin then means nothing fixed, since the logits may grow at will.

    A class without training samples has the margin of the smallest class that has some.

    Args:
        class_counts: training samples per class :math:`n_j`, C integers, at least one above 0.
        max_margin: :math:`\Delta_\text{max}` >= 0, finite, in units of the cosine; 0 is cross-entropy.
        scale: :math:`s` > 0, finite, the scale of the cosine head.

    Raises:
        SettingError: if a setting is out of its range, every count is 0, or (in ``forward``) the logits have
            another number of classes than ``class_counts``.

    Shapes:
        * logits: floating (N, C), any device that the module was moved to.
        * target: int64 class indices (N,), or floating probabilities (N, C), the rows of which sum to 1.
        * returns: losses >= 0 of shape (N,), float64 for float64 logits, else float32.

    Source:
        Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss*, NeurIPS 2019,
        arXiv 1906.07413, section 3.2; ``max_margin`` 0.5 and ``scale`` 30 are its code's.

    Example:
        >>> logits = 30 * torch.tensor([[0.9, 0.6], [0.5, 0.5]])
        >>> LDAM([160, 10])(logits, torch.tensor([0, 1]))  # margins 0.25 and 0.5
        tensor([ 0.2014, 15.0000])
    """

    class_counts: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int], max_margin: float = 0.5, scale: float = 30.0) -> None:
        super().__init__()
        self.max_margin = _finite("max_margin", max_margin, "0.5 is the paper's")
        self.scale = _finite("scale", scale, "30 is the paper's", above=True)
        self.register_buffer("class_counts", _some_counts(class_counts), persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each row, shape (N,)."""
        logits = _wide(logits)
        _check_shapes(logits, target, self.class_counts)
        counts = self.class_counts.to(logits.dtype)
        smallest = counts.masked_fill(counts == 0, math.inf).min()
        margins = self.max_margin * (smallest / counts.clamp(min=smallest)) ** 0.25
        return _of_target(_softplus(_log_odds_against(logits) + self.scale * margins), target)

    def extra_repr(self) -> str:
        """Settings for ``repr``."""
        return f"num_classes={self.class_counts.numel()}, max_margin={self.max_margin}, scale={self.scale}"


class VectorScaling(nn.Module):
    r"""Vector-scaling loss: cross-entropy of logits scaled and shifted by class.

    .. math::
        \ell_i = -\sum_j q_{ij}
        \log \frac{e^{\Delta_j f_j(x_i) + \iota_j}}{\sum_k e^{\Delta_k f_k(x_i) + \iota_k}}, \qquad
        \Delta_j = \left( \frac{n_j}{\max_k n_k} \right)^\gamma, \qquad
        \iota_j = \tau \log \frac{n_j}{\sum_k n_k}

    with targets :math:`q` (one-hot for class indices). The scaling moves the decision boundaries of a model that fits
    its training set, where a shift no longer does; the shift helps at the start. Scaling and shift belong to the loss
    alone: predict with the argmax of the raw logits. ``gamma=0`` is :class:`LogitAdjusted`, ``tau=0`` the
    class-dependent temperature loss (Ye et al., 2020, arXiv 2001.01385).

    A class without training samples counts as if it had one.

    Args:
        class_counts: training samples per class :math:`n_j`, C integers, at least one above 0.
        gamma: :math:`\gamma` >= 0, finite.
        tau: :math:`\tau` >= 0, finite.

    Raises:
        SettingError: if a setting is out of its range, every count is 0, or (in ``forward``) the logits have
            another number of classes than ``class_counts``.

    Shapes:
        * logits: floating (N, C), any device that the module was moved to.
        * target: int64 class indices (N,), or floating probabilities (N, C), the rows of which sum to 1.
        * returns: losses >= 0 of shape (N,), float64 for float64 logits, else float32.

    Source:
        Kini et al., *Label-Imbalanced and Group-Sensitive Classification under Overparameterization*, NeurIPS 2021,
        arXiv 2103.01550; how the two depend on n_j, and the defaults, are as in its code.

    Example:
        >>> logits = torch.tensor([[2.0, 2.0], [2.0, 2.0]])
        >>> VectorScaling([90, 10], gamma=0.3, tau=1.0)(logits, torch.tensor([0, 1]))
        tensor([0.0414, 3.2041])
    """

    class_counts: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int], gamma: float = 0.3, tau: float = 1.0) -> None:
        super().__init__()
        self.gamma = _finite("gamma", gamma, "0 is logit adjustment")
        self.tau = _finite("tau", tau, "0 shifts nothing")
        self.register_buffer("class_counts", _some_counts(class_counts), persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each row, shape (N,)."""
        logits = _wide(logits)
        _check_shapes(logits, target, self.class_counts)
        counts = self.class_counts.clamp(min=1).to(logits.dtype)
        scales, shifts = (counts / counts.max()) ** self.gamma, self.tau * (counts / counts.sum()).log()
        return _cross_entropy(scales * logits + shifts, target)

    def extra_repr(self) -> str:
        """Settings for ``repr``."""
        return f"num_classes={self.class_counts.numel()}, gamma={self.gamma}, tau={self.tau}"


def _smoothing(label_smoothing: float) -> float:
    if not 0.0 <= label_smoothing <= 1.0:
        raise SettingError(f"label_smoothing={label_smoothing} is outside [0, 1]; 0 is none, 0.1 is usual")
    return float(label_smoothing)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _finite(name: str, value: float, advice: str, above: bool = False) -> float:
    if not (math.isfinite(value) and (value > 0 if above else value >= 0)):
        raise SettingError(f"{name}={value} is not a finite number {'above 0' if above else 'of 0 or more'}; {advice}")
    return float(value)


def _some_counts(class_counts: Tensor | Sequence[int]) -> Tensor:
    """Counts, and not what is computed from them, are a loss's buffer: .half() and bf16-true training round floats."""
    counts = class_counts_tensor(class_counts)
    if not bool(counts.any()):
        raise SettingError(
            f"class_counts={counts.tolist()[:8]} has no training sample, so there is no prior; "
            "give the number of training samples of each class, at least one above 0"
        )
    return counts


def _check_shapes(logits: Tensor, target: Tensor, class_counts: Tensor | None = None) -> None:
    if logits.ndim != 2 or target.shape not in (logits.shape[:1], logits.shape):
        raise SettingError(
            f"logits of shape {tuple(logits.shape)} with target of shape {tuple(target.shape)}; "
            "give logits (N, C) with class indices (N,) or probabilities (N, C)"
        )
    if class_counts is not None and logits.shape[1] != class_counts.numel():
        raise SettingError(
            f"logits have {logits.shape[1]} classes and class_counts {class_counts.numel()}; "
            "give one count per class of the model"
        )


def _log_odds_against(logits: Tensor) -> Tensor:
    """log((1 - p_j) / p_j) for every class, (N, C), exact to rounding also where p_j is nearly 1."""
    top = logits.argmax(1, keepdim=True)
    # log sum of exp over the other classes: from p_j, and for the top class, where 1 - p_j cancels, summed anew
    others = logits.logsumexp(1, keepdim=True) + torch.log1p(-logits.softmax(1).scatter(1, top, 0.0))
    others = others.scatter(1, top, logits.scatter(1, top, -math.inf).logsumexp(1, keepdim=True))
    return others - logits


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, x.new_zeros(()))  # F.softplus is cut off at 20, which float64 sees


def _of_target(class_losses: Tensor, target: Tensor) -> Tensor:
    """The row's loss from those of all classes: its class's, or the expected one."""
    if target.is_floating_point():
        return (target.to(class_losses.dtype) * class_losses).sum(1)
    return F.nll_loss(-class_losses, target, reduction="none")


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    if target.is_floating_point():
        target = target.to(logits.dtype)
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
