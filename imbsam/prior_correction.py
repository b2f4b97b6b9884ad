r"""Class priors of probabilities: undo what weights, sampling and a loss's shift did to them, or choose another prior.

Let :math:`s_j` be the share of class j among the drawn training samples, :math:`a_j` its loss weight and
:math:`\delta_j` what the loss adds to its logit (:math:`\tau \log \pi_j` under logit adjustment, else 0). Training
minimizes :math:`-\mathbb{E}[a_y \log \operatorname{softmax}(f(x) + \delta)_y]` over samples drawn with these shares. At
a given x this is a cross-entropy with targets proportional to :math:`a_j s_j\, p(x \mid j)`, least where

.. math::
    f_j(x) + \delta_j = \log a_j s_j\, p(x \mid j) + \text{const}(x)

Under another class prior q the posterior is :math:`p_q(j \mid x) \propto q_j\, p(x \mid j)`, and so

.. math::
    p_q(j \mid x) = \operatorname{softmax}_j\bigl(f(x) + \text{shift}\bigr), \qquad
    \text{shift}_j = \delta_j + \log q_j - \log a_j - \log s_j

Cases: plain training (:math:`s = \pi`) needs nothing for :math:`q = \pi` and :math:`-\log \pi_j` for the uniform prior;
balanced sampling :math:`\log \pi_j` for :math:`q = \pi`; logit adjustment at :math:`\tau = 1` :math:`\log \pi_j` too,
and nothing for the uniform prior. It is exact for the minimizer over all functions. A network that fits its training
set perfectly is not there (weights no longer matter to it), which is what a fitted calibration is for.

Source:
    Elkan, *The Foundations of Cost-Sensitive Learning*, IJCAI 2001, theorem 2; Saerens et al., *Adjusting the Outputs
    of a Classifier to New a Priori Probabilities*, Neural Computation 14(1), 2002, equation 2.4; Menon et al., ICLR
    2021, arXiv 2007.07314, for the loss's shift.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from imbsam.class_groups import nonzero_class_counts
from imbsam.errors import SettingError

__all__ = ["class_prior", "move_prior", "prior_shift"]


def class_prior(prior: str | Tensor | Sequence[float], class_counts: Tensor | Sequence[int]) -> Tensor:
    """The prior that probabilities are to be for.

    Args:
        prior: "training" (shares of the class counts, a class without samples counted as one), "balanced", or C shares
            above 0, which are scaled to sum to 1.
        class_counts: training samples per class (C,).

    Returns:
        float64 tensor (C,) with sum 1.

    Raises:
        SettingError: it is none of these.

    Example:
        >>> class_prior("training", [90, 10])
        tensor([0.9000, 0.1000], dtype=torch.float64)
    """
    counts = nonzero_class_counts(class_counts)
    if isinstance(prior, str):
        if prior not in ("training", "balanced"):
            raise SettingError(f"prior is {prior!r}: give training, balanced, or a share for each class")
        shares = counts.clamp(min=1).double() if prior == "training" else torch.ones(len(counts), dtype=torch.float64)
        return shares / shares.sum()
    return _positive("prior", prior, len(counts), "a share above 0 for each class")


def prior_shift(
    class_counts: Tensor | Sequence[int],
    prior: str | Tensor | Sequence[float] = "training",
    *,
    drawn_shares: Tensor | Sequence[float] | None = None,
    class_weight: Tensor | Sequence[float] | None = None,
    tau: float = 0.0,
) -> Tensor:
    r"""What to add to the logits for probabilities under a prior q: :math:`\delta + \log q - \log a - \log s`.

    Args:
        class_counts: training samples per class (C,); :math:`\pi` are their shares, a class without samples counted as
            one.
        prior: the wanted prior q, see :func:`class_prior`.
        drawn_shares: share of each class in the drawn training samples s (C,); default :math:`\pi`. A class that is
            never drawn has the share of :math:`\pi`.
        class_weight: loss weight of each class a (C,), above 0; default 1.
        tau: of logit adjustment, where the loss had it.

    Returns:
        float64 tensor (C,).

    Raises:
        SettingError: a vector is not of C numbers, or a loss weight or a share of the prior is not above 0.

    Example:
        >>> prior_shift([90, 10], drawn_shares=[0.5, 0.5]).exp()  # balanced sampling, natural prior
        tensor([1.8000, 0.2000], dtype=torch.float64)
    """
    natural, wanted = class_prior("training", class_counts), class_prior(prior, class_counts)
    shift = wanted.log() + tau * natural.log()
    if class_weight is not None:
        shift = shift - _positive("class_weight", class_weight, len(natural), "a number above 0 for each class").log()
    drawn = natural
    if drawn_shares is not None:
        drawn = torch.as_tensor(drawn_shares, dtype=torch.float64).cpu()
        drawn = torch.where(drawn > 0, drawn, natural)
    return shift - drawn.log()


def move_prior(log_probabilities: Tensor, source: Tensor, target: Tensor) -> Tensor:
    r"""Move probabilities from one class prior to another: :math:`p'_j \propto p_j\, q'_j / q_j`.

    Args:
        log_probabilities: (N, C).
        source: the prior q that they are for (C,), above 0.
        target: the wanted prior q' (C,), above 0.

    Returns:
        Log-probabilities (N, C), normalized.

    Example:
        >>> move_prior(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])).exp()
        tensor([[0.1000, 0.9000]])
    """
    moved: Tensor = (log_probabilities + (target / source).log().to(log_probabilities)).log_softmax(dim=1)
    return moved


def _positive(name: str, values: Tensor | Sequence[float], classes: int, what: str) -> Tensor:
    """C numbers above 0 as shares of their sum, which is a constant in a softmax."""
    vector = torch.as_tensor(values, dtype=torch.float64).cpu()
    if vector.shape != (classes,) or not bool((vector.isfinite() & (vector > 0)).all()):
        raise SettingError(f"{name} is {vector.tolist()}: give {what} ({classes})")
    return vector / vector.sum()
