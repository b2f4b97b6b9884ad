"""Methods with several perturbations a step, one for each group of classes: the general case, CC-SAM and SSE-SAM."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from imbsam.batch import Plan
from imbsam.checks import check_numbers
from imbsam.class_aware_sam import ClassAwareSAM
from imbsam.class_groups import class_counts_tensor, tail_mask
from imbsam.distributed import union
from imbsam.errors import SettingError
from imbsam.partition import PartitionedPlan, class_partition
from imbsam.row_weights import class_vector


class PartitionedSAM(ClassAwareSAM):
    r"""Sharpness-aware minimization with one perturbation for each of several groups of classes.

    :class:`ClassAwareSAM` has one e along the gradient of all sharp rows; here every group k of classes has its own.
    With :math:`c_{ik} = c_i` if row i belongs to group k and 0 otherwise (targets that are probabilities spread it
    over the groups), :meth:`backward` leaves in ``.grad`` the gradient of

    .. math::
        L(w) = \frac1B \sum_i a_i \Big[ (1 - c_i)\, l_i(w) + \sum_k c_{ik}\, l_i(w + e_k) \Big]

    .. math::
        e_k = \rho\, r_k \frac{g_k(w)}{\|g_k(w)\|}, \qquad g_k(w) = \nabla_w \frac1B \sum_i a_i c_{ik}\, l_i(w)

    with every e held fixed, :math:`g_\text{rest}(w) + \sum_k g_k(w + e_k)`. With one group it is
    :class:`ClassAwareSAM`, and so SAM if c = 1 for all classes; a group of radius 0 counts at w alone, so two groups,
    the head with radius 0, are ImbSAM. Both are bit-identical to those methods, at the same cost.

    A group costs two passes on its rows of the batch and their context: ``1 + 2 K`` passes per step with K groups in
    the batch. Without BatchNorm they add up to the rows of ``1 + 2 t`` batches, t being the share of sharp rows. On
    several processes the ranks first agree on the groups in the joint batch, for which the host waits, and all-reduce
    one gradient for each of them.

    Args:
        module: as for :class:`ClassAwareSAM`.
        class_counts: as for :class:`ClassAwareSAM`.
        partition: the group of each class, numbered from 0, shape (C,).
        radius: :math:`r_k` of every group, shape (K,): the length of its e, relative to rho. May be changed between
            calls.
        sharpness_weight: c for every class, shape (C,), or one number for all classes.
        **settings: the other settings of :class:`ClassAwareSAM`.

    Raises:
        SettingError: if a setting cannot work.

    Example:
        >>> sam = PartitionedSAM(nn.Linear(4, 3), partition=[0, 0, 1], radius=[0.5, 1.0], rho=0.1)
        >>> sam.radius
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        module: nn.Module,
        class_counts: Tensor | Sequence[int] | None = None,
        *,
        partition: Tensor | Sequence[int],
        radius: Tensor | Sequence[float] | float = 1.0,
        sharpness_weight: Tensor | Sequence[float] | float = 1.0,
        **settings: Any,
    ) -> None:
        self.partition = class_partition(partition)
        classes, weight = len(self.partition), class_vector("sharpness_weight", sharpness_weight)
        given = classes if class_counts is None else len(class_counts_tensor(class_counts))
        if given != classes or (weight.dim() == 1 and len(weight) != classes):
            wrong = given if given != classes else len(weight)
            raise SettingError(f"partition has {classes} entries for {wrong} classes: give one group for each class")
        super().__init__(module, class_counts, sharpness_weight=weight.expand(classes), **settings)
        self.radius = radius

    @property
    def radius(self) -> Tensor:
        """Length of each group's perturbation, relative to rho, float64 (K,) on the CPU."""
        return self._radius

    @radius.setter
    def radius(self, radius: Tensor | Sequence[float] | float) -> None:
        groups = int(self.partition.max()) + 1
        vector = class_vector("radius", radius, of="group")
        if vector.dim() == 1 and len(vector) != groups:
            raise SettingError(f"radius is {radius!r}: give one number for each of the {groups} groups")
        self._radius = vector.expand(groups)

    def _plan(self, modules: Sequence[nn.Module], *, own: bool, group: Any) -> Plan:
        weight = torch.where(self.radius[self.partition] > 0, self.sharpness_weight, 0.0)
        sharp = set(self.partition.numpy()[weight.numpy() > 0].tolist())
        plan = super()._plan(modules, own=own, group=group)
        perturbs = plan.perturbs and bool(sharp)
        rhos = {k: self.rho * r for k, r in enumerate(self.radius.tolist()) if k in sharp}
        plan = replace(
            plan,
            sharpness_weight=weight,
            perturbs=perturbs,
            in_step=plan.in_step and perturbs,
            rho=max(rhos.values(), default=0.0),
        )
        if not perturbs or len(sharp) == 1:
            return plan
        together = plan.in_step or (group is not None and self.perturbation == "global")
        device = next(self.module.parameters()).device

        def agree(present: set[int]) -> set[int]:
            return union(present, device, len(self.radius), group) if together else present

        return PartitionedPlan(**vars(plan), partition=self.partition, rhos=rhos, agree=agree)


class CCSAM(PartitionedSAM):
    r"""Class-conditional SAM (Zhou et al., CVPR 2023): every class has its own e, longer where it has fewer samples.

    A :class:`PartitionedSAM` whose groups are the classes, with c = ``flat_ratio`` for all of them and

    .. math::
        \rho_j = \rho \left( \frac{n_\text{max}}{n_j} \right)^{p}, \qquad p = \frac14,

    so that ``rho`` is the length of the largest class's e; at ratio 100 the smallest class's is 3.2 times as long.
    Every class in the batch takes two passes; see docs/cost.md.

    Source:
        Zhou, Li, Zhao, Heng and Gong, *Class-Conditional Sharpness-Aware Minimization for Deep Long-Tailed
        Recognition*, CVPR 2023: its first stage. Based on the abstract, the authors' released code and the account
        in Li et al., *Focal-SAM*, ICML 2025; we could not read the paper itself, so no equation is cited. The released
        code differs from this class in three ways: it perturbs only the classifier's parameters, each tensor
        separately; its radius has :math:`n_j - 1` for :math:`n_j` and a factor :math:`\sqrt{\|w\| / \|g_j\|}`,
        :math:`g_j` being the gradient of the class's mean loss; and it trains with mixup. Its second stage is
        classifier re-training on balanced classes (:class:`lightning_modules.SecondStageClassifier`) with adversarial
        features, which are not implemented.

    Args:
        module: as for :class:`ClassAwareSAM`.
        class_counts: training samples per class, shape (C,); a class without samples counts as if it had one.
        radius_power: p, a finite number from 0; 0 gives every class an e of length rho.
        flat_ratio: share of the loss taken at w + e; the released code has 0.5 for CIFAR-100, 0.3 for CIFAR-10.
        **settings: the other settings of :class:`ClassAwareSAM`.

    Raises:
        SettingError: where a setting cannot work.

    Example:
        >>> CCSAM(nn.Linear(4, 3), class_counts=[1600, 100, 1]).radius
        tensor([1.0000, 2.0000, 6.3246], dtype=torch.float64)
    """

    def __init__(
        self,
        module: nn.Module,
        class_counts: Tensor | Sequence[int],
        *,
        radius_power: float = 0.25,
        flat_ratio: float = 0.5,
        **settings: Any,
    ) -> None:
        counts = class_counts_tensor(class_counts)
        check_numbers(radius_power=radius_power, flat_ratio=flat_ratio)
        n = counts.double().clamp(min=1)
        super().__init__(
            module,
            counts,
            partition=torch.arange(len(n), device="cpu"),
            radius=(n.max() / n) ** radius_power,
            sharpness_weight=flat_ratio,
            **settings,
        )


class SSESAM(PartitionedSAM):
    r"""Stage-wise saddle-escaping SAM (Lyu et al., AAAI 2025): an e each for head and tail, later for the tail alone.

    A :class:`PartitionedSAM` of two groups with c = 1:

    .. math::
        L(w) = \frac1B \sum_{i \in \text{head}} a_i\, l_i(w + e_\text{head})
             + \frac1B \sum_{i \in \text{tail}} a_i\, l_i(w + e_\text{tail})

    The second stage is ImbSAM: after a share ``gamma`` of the epochs, :math:`\rho_\text{head}` is 0. Use the callback
    :class:`lightning_modules.callbacks.schedules.TailStage`, or set ``sam.radius = [0, 1]`` in your own loop.

    Source:
        Lyu, Xu, Yang, Lyu and Huang, *SSE-SAM: Balancing Head and Tail Classes Gradually through Stage-Wise SAM*,
        AAAI 2025, arXiv 2412.13715. Based on the abstract and the authors' released code, whose example for
        CIFAR-100-LT has the defaults here (eta 100, 0.05 and 0.1, gamma 0.7); no equation of the paper is cited.

    Args:
        module: as for :class:`ClassAwareSAM`.
        class_counts: training samples per class, shape (C,).
        eta: classes with fewer than eta training samples are tail classes.
        tail_classes: the tail classes, by index or as a mask of shape (C,), instead of eta.
        rho: length of the tail's e, the paper's :math:`\rho_\text{tail}`; 0 is plain training.
        head_rho: length of the head's e; if ``rho`` is changed later, it changes in proportion.
        **settings: the other settings of :class:`ClassAwareSAM`.

    Raises:
        SettingError: if a setting cannot work, or leaves no head or no tail class.

    Example:
        >>> sam = SSESAM(nn.Linear(4, 3), class_counts=[500, 120, 5], rho=0.1, head_rho=0.05)
        >>> sam.partition, sam.radius
        (tensor([0, 0, 1]), tensor([0.5000, 1.0000], dtype=torch.float64))
    """

    def __init__(
        self,
        module: nn.Module,
        class_counts: Tensor | Sequence[int],
        *,
        eta: float = 100,
        tail_classes: Tensor | Sequence[int] | None = None,
        rho: float = 0.1,
        head_rho: float = 0.05,
        **settings: Any,
    ) -> None:
        counts = class_counts_tensor(class_counts)
        tail = tail_mask(counts, eta, tail_classes)
        if tail.all() or not tail.any():
            named = f"eta is {eta}" if tail_classes is None else f"tail_classes is {tail_classes!r}"
            smallest, largest = int(counts.min()), int(counts.max())
            fix = f"set eta above {smallest} and to at most {largest}" if tail_classes is None else "name some classes"
            missing = "head" if tail.all() else "tail"
            raise SettingError(f"{named}, which leaves SSE-SAM no {missing} class: {fix}")
        check_numbers(head_rho=head_rho)
        super().__init__(module, counts, partition=tail.long(), rho=rho, eta=eta, tail_classes=tail_classes, **settings)
        self.radius = [head_rho / self.rho if self.rho > 0 else 0.0, 1.0]
