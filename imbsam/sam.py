"""The methods: Plain, SAM, ImbSAM and Focal-SAM choose the sharpness weight c of every class.

Those with several perturbations a step, CC-SAM and SSE-SAM, come from :mod:`imbsam.partitioned_sam`.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from imbsam.batch import Plan
from imbsam.checks import check_numbers
from imbsam.class_aware_sam import ClassAwareSAM
from imbsam.class_groups import class_counts_tensor, focal_sharpness, tail_mask
from imbsam.distributed import Reduction
from imbsam.errors import SettingError
from imbsam.partitioned_sam import CCSAM, SSESAM, PartitionedSAM
from imbsam.surrogate_gap import SurrogateGap

__all__ = ["CCSAM", "GSAM", "SAM", "SSESAM", "ClassAwareSAM", "FocalSAM", "ImbSAM", "PartitionedSAM", "Plain"]


class Plain(ClassAwareSAM):
    """Plain training, "SGD" in the papers' tables: c = 0 for every class, and one pass per step.

    Args:
        module: as for :class:`ClassAwareSAM`.
        class_counts: as for :class:`ClassAwareSAM`.
        **settings: the settings of :class:`ClassAwareSAM` other than ``sharpness_weight`` and ``rho``.
    """

    def __init__(self, module: nn.Module, class_counts: Tensor | Sequence[int] | None = None, **settings: Any) -> None:
        super().__init__(module, class_counts, sharpness_weight=0.0, rho=0.0, **settings)


class SAM(ClassAwareSAM):
    """Sharpness-aware minimization (Foret et al., ICLR 2021, arXiv 2010.01412): c = 1 for every class.

    Args:
        module: as for :class:`ClassAwareSAM`.
        class_counts: as for :class:`ClassAwareSAM`.
        **settings: the settings of :class:`ClassAwareSAM` other than ``sharpness_weight``.
    """

    def __init__(self, module: nn.Module, class_counts: Tensor | Sequence[int] | None = None, **settings: Any) -> None:
        super().__init__(module, class_counts, sharpness_weight=1.0, **settings)


class GSAM(SAM):
    r"""Surrogate gap guided SAM (Zhuang et al., ICLR 2022, arXiv 2203.08065): SAM that also closes the surrogate gap.

    The gap is the loss at w + e minus the loss at w. With g the gradient at w + e, which SAM leaves in ``.grad``, and
    :math:`g(w)_\perp` the part of the gradient at w that is orthogonal to g, GSAM leaves

    .. math::
        g - \alpha\, g(w)_\perp

    A step along the second term raises the loss at w and, to first order, leaves the loss at w + e unchanged. SAM's two
    passes already compute both gradients; g(w) is kept through the second, one more copy of the parameters. With
    ``perturbation="per_rank"`` every rank subtracts its own part before the mean, as in the authors' code. Their rho
    falls with the learning rate: use :class:`lightning_modules.callbacks.schedules.RhoSchedule`.

    Args:
        module: as for :class:`ClassAwareSAM`.
        class_counts: as for :class:`ClassAwareSAM`.
        alpha: how much of the orthogonal part is subtracted, a finite number from 0; 0 is SAM.
        **settings: the settings of :class:`ClassAwareSAM` other than ``sharpness_weight``.

    Example:
        >>> GSAM(nn.Linear(4, 3), rho=0.1, alpha=0.4).alpha
        0.4
    """

    def __init__(
        self,
        module: nn.Module,
        class_counts: Tensor | Sequence[int] | None = None,
        *,
        alpha: float = 0.4,
        **settings: Any,
    ) -> None:
        check_numbers(alpha=alpha, hint="0 is SAM")
        super().__init__(module, class_counts, **settings)
        self.alpha = float(alpha)

    def _plan(self, modules: Sequence[nn.Module], *, own: bool, group: Any) -> Plan:
        if own:
            raise SettingError(
                "sharpness_weight= is per row, and GSAM's gap is that of the whole loss: give targets instead"
            )
        return super()._plan(modules, own=own, group=group)

    def _reduction(self, params: Sequence[Tensor], perturbed: Sequence[bool], group: Any, plan: Plan) -> Reduction:
        averaged = super()._reduction(params, [True] * len(params), group, plan)  # g(w) is more than a direction
        return SurrogateGap(averaged, self.alpha, copied=self.adaptive)


class ImbSAM(ClassAwareSAM):
    """Imbalanced SAM (Zhou et al., ICCV 2023, arXiv 2308.07815): c = 1 for tail classes, 0 for the others.

    Args:
        module: as for :class:`ClassAwareSAM`.
        class_counts: training samples per class, shape (C,); for multi-label targets (C, 2), see
            :class:`ClassAwareSAM`.
        eta: classes with fewer than eta training samples are tail classes.
        tail_classes: the tail classes, by index or as a mask of shape (C,), instead of eta.
        **settings: the other settings of :class:`ClassAwareSAM`.

    Warns:
        UserWarning: if no class is tail (plain training), or every class is (SAM).

    Example:
        >>> ImbSAM(nn.Linear(4, 3), class_counts=[500, 50, 5], eta=20).sharpness_weight
        tensor([0., 0., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        module: nn.Module,
        class_counts: Tensor | Sequence[int],
        *,
        eta: float = 20,
        tail_classes: Tensor | Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        counts = class_counts_tensor(class_counts, by_label=True)
        tail = tail_mask(counts, eta, tail_classes)
        super().__init__(module, counts, sharpness_weight=tail.double(), eta=eta, tail_classes=tail_classes, **settings)
        named = f"eta={eta}" if tail_classes is None else "tail_classes"
        smallest, largest = int(counts.min()), int(counts.max())
        more, fewer = f"set eta above {smallest}", f"set eta to at most {largest}"
        if tail_classes is not None:
            more, fewer = "name the tail classes", "name fewer"
        if not tail.any():
            warnings.warn(
                f"{named} leaves no tail class (the smallest class has {smallest} training samples): this is plain "
                f"training; {more}",
                stacklevel=2,
            )
        elif tail.all():
            warnings.warn(
                f"{named} makes every class a tail class (the largest has {largest} training samples): this is SAM; "
                f"{fewer}",
                stacklevel=2,
            )


class FocalSAM(ClassAwareSAM):
    """Focal-SAM (Li et al., ICML 2025, arXiv 2505.01660): c = focal_lambda * (1 - n_c / n) ** focal_gamma.

    Args:
        module: as for :class:`ClassAwareSAM`.
        class_counts: training samples per class, shape (C,); for multi-label targets (C, 2), see
            :class:`ClassAwareSAM`.
        focal_lambda: weight of the sharpness term (the authors use up to 1.1).
        focal_gamma: the larger, the less the common classes count.
        **settings: the settings of :class:`ClassAwareSAM` other than ``sharpness_weight``.
    """

    def __init__(
        self,
        module: nn.Module,
        class_counts: Tensor | Sequence[int],
        *,
        focal_lambda: float = 0.8,
        focal_gamma: float = 3.0,
        **settings: Any,
    ) -> None:
        weight = focal_sharpness(class_counts, focal_lambda, focal_gamma)
        super().__init__(module, class_counts, sharpness_weight=weight, **settings)
