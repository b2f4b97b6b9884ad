"""Decisions by a matrix of costs, with the option to have a sample looked at by somebody."""

from collections.abc import Sequence

import torch
from torch import Tensor

from imbsam.checks import check_numbers
from imbsam.errors import SettingError

__all__ = ["cheapest_decision", "check_costs", "realised_costs"]


def check_costs(costs: Tensor | Sequence[Sequence[float]], num_classes: int) -> Tensor:
    """Validate a matrix of costs.

    Args:
        costs: row j, column k: what it costs to decide for class k where class j is true. Gains are negative.
        num_classes: C.

    Returns:
        float64 tensor (C, C).

    Raises:
        SettingError: it is not C rows of C finite numbers.

    Example:
        >>> check_costs([[0, 1]], 2)
        Traceback (most recent call last):
        imbsam.errors.SettingError: costs is [[0, 1]]: give 2 rows (true class) of 2 finite numbers (decision)
    """
    try:
        matrix = torch.as_tensor(costs, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError):
        matrix = torch.empty(0)
    if matrix.shape != (num_classes, num_classes) or not bool(matrix.isfinite().all()):
        shown = " ".join(str(costs.tolist() if isinstance(costs, Tensor) else costs).split())
        raise SettingError(
            f"costs is {shown if len(shown) < 80 else shown[:77] + '...'}: give {num_classes} rows (true class) of "
            f"{num_classes} finite numbers (decision)"
        )
    return matrix


def cheapest_decision(
    probabilities: Tensor, costs: Tensor | Sequence[Sequence[float]], look_cost: float | None = None
) -> Tensor:
    r"""Decide for the class of the least expected cost, :math:`\arg\min_k \sum_j p_j(x) C_{jk}`.

    With two classes this is a threshold on :math:`p_1`: decide for 1 from
    :math:`(C_{01} - C_{00}) / (C_{01} - C_{00} + C_{10} - C_{11})` up. It is as good as the probabilities: calibrate
    them.

    Args:
        probabilities: (N, C).
        costs: (C, C), see :func:`check_costs`.
        look_cost: what it costs to have a sample looked at, after which the truth is known, from 0; a sample whose
            cheapest decision is expected to cost more is to be looked at. None: nobody looks.

    Returns:
        int64 (N,): the class, the first of equally cheap ones, or C for a look.

    Raises:
        SettingError: the costs are no matrix of the classes, or ``look_cost`` is negative.

    Source:
        Elkan, *The Foundations of Cost-Sensitive Learning*, IJCAI 2001, equations 1 and 2; Chow, *On Optimum
        Recognition Error and Reject Tradeoff*, IEEE Transactions on Information Theory 16(1), 1970, for the look.

    Example:
        >>> probabilities = torch.tensor([[0.99, 0.01], [0.9, 0.1], [0.3, 0.7]])
        >>> cheapest_decision(probabilities, [[0, 1], [20, 0]], look_cost=0.5)
        tensor([0, 2, 1])
    """
    matrix = check_costs(costs, probabilities.shape[1])
    expected = probabilities.double() @ matrix.to(probabilities.device)
    least, decision = expected.min(dim=1)
    if look_cost is None:
        return decision
    check_numbers(look_cost=look_cost)
    return decision.where(least <= look_cost, probabilities.shape[1])


def realised_costs(
    decisions: Tensor, labels: Tensor, costs: Tensor | Sequence[Sequence[float]], look_cost: float | None = None
) -> Tensor:
    """What each decision cost, float64 (N,).

    Args:
        decisions: int64 (N,), as :func:`cheapest_decision` gives them.
        labels: the true classes, int64 (N,).
        costs: (C, C).
        look_cost: the cost of a look.

    Example:
        >>> realised_costs(torch.tensor([0, 1, 2]), torch.tensor([1, 1, 0]), [[0, 1], [20, 0]], look_cost=0.5)
        tensor([20.0000,  0.0000,  0.5000], dtype=torch.float64)
    """
    matrix = torch.as_tensor(costs, dtype=torch.float64).to(labels.device)
    looks = torch.full((len(matrix), 1), 0.0 if look_cost is None else float(look_cost), dtype=torch.float64)
    return torch.cat([matrix, looks.to(matrix)], dim=1)[labels, decisions]
