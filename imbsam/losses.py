"""Per-sample classification losses that may know the class prior.

Each returns one loss per row, shape (N,), because class-aware sharpness weighs the rows itself. Reduce with
``.mean()`` for plain training. Logits of 16 bits are raised to float32 first, so that the losses are the
same inside and outside autocast.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbsam.class_groups import class_counts_tensor
from imbsam.errors import SettingError

__all__ = ["CrossEntropy", "LogitAdjusted"]


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
        counts = class_counts_tensor(class_counts)
        if not bool(counts.any()):
            raise SettingError(
                f"class_counts={counts.tolist()[:8]} has no training sample, so there is no prior; "
                "give the number of training samples of each class, at least one above 0"
            )
        if not (math.isfinite(tau) and tau >= 0):
            raise SettingError(f"tau={tau} is not a finite number of 0 or more; 1 is balanced softmax")
        self.tau = float(tau)
        self.label_smoothing = _smoothing(label_smoothing)
        # Counts and not their logarithm: .half() and bf16-true training cast floating buffers, which would
        # round the prior, and leave integers alone.
        self.register_buffer("class_counts", counts, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each row, shape (N,)."""
        logits = _wide(logits)
        if logits.ndim == 2 and logits.shape[1] != self.class_counts.numel():
            raise SettingError(
                f"logits have {logits.shape[1]} classes and class_counts {self.class_counts.numel()}; "
                "give one count per class of the model"
            )
        counts = self.class_counts.clamp(min=1).to(logits.dtype)
        return _cross_entropy(logits + self.tau * (counts / counts.sum()).log(), target, self.label_smoothing)

    def extra_repr(self) -> str:
        """Settings for ``repr``."""
        classes = self.class_counts.numel()
        return f"num_classes={classes}, tau={self.tau}, label_smoothing={self.label_smoothing}"


def _smoothing(label_smoothing: float) -> float:
    if not 0.0 <= label_smoothing <= 1.0:
        raise SettingError(f"label_smoothing={label_smoothing} is outside [0, 1]; 0 is none, 0.1 is usual")
    return float(label_smoothing)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    if logits.ndim != 2 or target.shape not in (logits.shape[:1], logits.shape):
        raise SettingError(
            f"logits of shape {tuple(logits.shape)} with target of shape {tuple(target.shape)}; "
            "give logits (N, C) with class indices (N,) or probabilities (N, C)"
        )
    if target.is_floating_point():
        target = target.to(logits.dtype)
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
