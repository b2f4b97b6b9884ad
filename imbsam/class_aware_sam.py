"""Sharpness-aware minimization by class as a backward pass: call it instead of `loss.backward()`."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from imbsam.backward_pass import BackwardPass
from imbsam.batch import Losses, Plan
from imbsam.capture.captured_step import Capturable
from imbsam.class_groups import class_counts_tensor
from imbsam.class_weights import with_tail_weight
from imbsam.distributed import (
    Reduction,
    broadcast_buffers,
    check_modules,
    communication_of,
    forward_communicates,
    fsdp_modules,
    reduction_over,
)
from imbsam.errors import SettingError
from imbsam.extra_passes import ContextRows, averages_over_rows, check_context_rows, context_of
from imbsam.parameters import Perturb, check_perturb, perturbed_parameters, trained_parameters
from imbsam.row_weights import class_vector
from imbsam.scheduled import Scheduled
from imbsam.step import Step


class ClassAwareSAM(Scheduled, Capturable):
    r"""Sharpness-aware minimization with a sharpness weight for every class, as a backward pass.

    With per-sample losses :math:`l_i(w)`, sharpness weights :math:`c_i \ge 0` and loss weights :math:`a_i \ge 0` that
    the rows take from their classes, :meth:`backward` leaves in ``.grad`` the gradient of

    .. math::
        L(w) = \frac1B \sum_i a_i \left[ (1 - c_i)\, l_i(w) + c_i\, l_i(w + e) \right]

    .. math::
        e = \rho \frac{g_s(w)}{\|g_s(w)\|}, \qquad g_s(w) = \nabla_w \frac1B \sum_i a_i c_i\, l_i(w)

    with e held fixed, which is

    .. math::
        \nabla L(w) = g_\text{rest}(w) + g_s(w + e), \qquad
        g_\text{rest}(w) = \nabla_w \frac1B \sum_i a_i (1 - c_i)\, l_i(w)

    :math:`g_s` needs only the *sharp rows*, those with :math:`c_i > 0`, so the extra passes run on them alone.
    :func:`imbsam.reference.backward` is the same method in thirty plain lines.

    **Multi-label targets**, integers 0 and 1 of shape (B, C): every pair (i, j) of a row and a class has its own loss
    :math:`l_{ij}`, ``losses(rows)`` returns them as (R, C), and all the above holds with the pairs in place of the rows
    and BC in place of B. A pair takes :math:`c_{ij}` and :math:`a_{ij}` from the class j and its label
    :math:`y_{ij}`: settings of shape (C, 2) have a column for 0 and one for 1, settings of shape (C,) are for both. So
    multi-label classification counts as C binary problems, each of two classes, "without" and "with". A row is sharp
    if any of its pairs is. With class counts (C, 2) :class:`ImbSAM` makes a rare class sharp in the rows that have it.

    It is not an optimizer and keeps nothing between calls, so any optimizer, scheduler, ``GradScaler``, clipping and
    checkpointing work as they do after ``loss.backward()``. :class:`SAM`, :class:`ImbSAM`, :class:`FocalSAM` and
    :class:`Plain` choose the sharpness weights; this class takes them from you.

    After a call, parameters are bit-identical to before it, and buffers and the random generators of torch, NumPy and
    Python are as one ordinary pass leaves them. After an exception or Ctrl-C inside a call, all of these and ``.grad``
    are as they were before it.

    Args:
        module: the model whose parameters are perturbed, wrapped or not. Frozen parameters are left out. Every
            trained parameter must be in it: one outside would accumulate the gradients of all three passes.
        class_counts: training samples per class, shape (C,). Needed if ``tail_weight`` is not 1. For multi-label
            targets (C, 2): of every class the samples without it, and those with it.
        sharpness_weight: c for every class, shape (C,), or one number for all classes; or (C, 2), see above.
        rho: length of the perturbation e. May be changed between calls; 0 is plain training.
        eta: classes with fewer than eta training samples are tail classes.
        tail_classes: the tail classes, by index or as a mask of shape (C,), instead of eta.
        tail_weight: multiplies the loss weight of the tail classes. The published code uses 2 for ImbSAM alone; a fair
            comparison uses it for every method. It is multiplied into the attribute ``class_weight`` once: setting that
            attribute later replaces it.
        class_weight: loss weight a for every class, shape (C,) or (C, 2). Default: 1. It also weights g_s, and so the
            direction of the perturbation. May be changed between calls (deferred re-weighting).
        adaptive: e = rho * w^2 g / ||w g|| (ASAM, Kwon et al., ICML 2021) instead of rho * g / ||g||.
        context_rows: the extra passes run on the sharp rows and this many other rows of the batch, whose losses do not
            count, so that BatchNorm sees a batch. ``0`` is exact for a network and loss that treat each row
            independently; ``"batch"`` is the published gradient, with the whole batch in every pass, and what a loss
            that couples rows needs; ``"auto"`` is 32 if the module has BatchNorm in training mode, else 0.
        perturb: the parameters to perturb; e is 0 for the others. ``"norm"``: the normalisation layers' (SAM-ON,
            Mueller et al., NeurIPS 2023; rho about ten times larger). ``"classifier"``: the last layer's with one
            output per class (CC-SAM's first stage). Or a list of names of layers or parameters, as in
            ``module.named_modules()``.
        first_pass: ``"split"`` runs the first pass on the sharp rows and on the others separately, ``1 + t`` passes
            instead of ``1 + 2 t`` for a share t of sharp rows, with the same gradient. ``losses`` is then called for
            the other rows, for the sharp ones, and for the sharp ones at w + e, never for all rows in order
            (:class:`imbsam.first_outputs.FirstOutputs` keeps predictions). It applies if rows are independent (no
            BatchNorm in training mode, no context rows), every c is 0 or 1 and the targets are not multi-label;
            otherwise it is ``"whole"``. Default: ``"whole"`` in a loop of your own, ``"split"`` in the
            LightningModules.
        perturbation: with several processes, ``"global"`` perturbs all of them along the mean of their g_s, as one
            process with the joint batch would; ``"per_rank"`` perturbs each along its own, which saves one of the two
            all-reduces per step.
        no_sync: context manager under which backward passes do not communicate. Default: the module's own if it is
            or wraps ``DistributedDataParallel``.
        process_group: average gradients over this group. Default: the module's own if it is or wraps
            ``DistributedDataParallel``, else none. A module under FSDP2 (``fully_shard``) needs neither.

    Raises:
        SettingError: if a setting cannot work.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> model = nn.Linear(4, 3)
        >>> x, y = torch.randn(8, 4), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
        >>> sam = ClassAwareSAM(model, sharpness_weight=[0.0, 0.5, 1.0], rho=0.05)
        >>> loss = sam.backward(lambda rows: F.cross_entropy(model(x[rows]), y[rows], reduction="none"), y)
        >>> loss.shape, model.weight.grad.shape
        (torch.Size([]), torch.Size([3, 4]))
    """

    def __init__(
        self,
        module: nn.Module,
        class_counts: Tensor | Sequence[int] | None = None,
        *,
        sharpness_weight: Tensor | Sequence[float] | float,
        rho: float = 0.05,
        eta: float = 20,
        tail_classes: Tensor | Sequence[int] | None = None,
        tail_weight: float = 1.0,
        class_weight: Tensor | Sequence[float] | None = None,
        adaptive: bool = False,
        context_rows: ContextRows = "auto",
        perturb: Perturb = "all",
        first_pass: Literal["whole", "split"] | None = None,
        perturbation: Literal["global", "per_rank"] = "global",
        no_sync: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
        process_group: Any = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise SettingError(f"module is a {type(module).__name__}: give the model itself, not its parameters")
        self.module = module
        self.rho = rho
        self.sharpness_weight = class_vector("sharpness_weight", sharpness_weight)
        self.class_weight = class_weight
        counts = None if class_counts is None else class_counts_tensor(class_counts, by_label=True)
        known = counts if counts is not None else self.sharpness_weight
        self._num_classes = len(known) if known.dim() else None
        if tail_weight != 1:
            self.class_weight = with_tail_weight(self.class_weight, tail_weight, counts, eta, tail_classes)
        self.adaptive = adaptive
        check_context_rows(context_rows)
        self.context_rows = context_rows
        check_perturb(perturb)
        self.perturb = perturb
        if first_pass not in ("whole", "split", None):
            raise SettingError(f'first_pass is {first_pass!r}: give "whole" or "split"')
        self.first_pass = first_pass
        if perturbation not in ("global", "per_rank"):
            raise SettingError(f'perturbation is {perturbation!r}: give "global" or "per_rank"')
        self.perturbation = perturbation
        ddp_no_sync, ddp_group = communication_of(module)
        self.no_sync = no_sync or ddp_no_sync
        self.process_group = ddp_group if process_group is None else process_group

    def backward(
        self,
        losses: Losses | Sequence[tuple[Losses, Any]],
        targets: Any = None,
        *,
        sharpness_weight: Any = None,
        backward: Callable[..., Any] = Tensor.backward,
    ) -> Tensor:
        """Add the gradient of the objective to ``.grad``; replaces ``loss.backward()``.

        Args:
            losses: a function from row indices (int64, shape (R,), on the parameters' device) to the losses of those
                rows, shape (R,), or (R, C) for multi-label targets. Its first call is for all rows in order, at w:
                keep predictions for metrics there.
                Or a list of ``(losses, targets)``: micro-batches that count as one batch.
            targets: class indices (B,), probabilities (B, C) (c_i and a_i are then expectations), or multi-label
                integers 0 and 1, (B, C). Best on the CPU: the sharp rows are chosen on the host, which has to wait for
                a GPU tensor.
            sharpness_weight: c_i for every row, shape (B,), or c_ij for every pair, (B, C), instead of those from
                ``targets`` (``targets`` is then needed only for ``class_weight``).
            backward: runs a backward pass; ``lambda loss, **kw: scaler.scale(loss).backward(**kw)`` for a
                ``GradScaler``. If the extra passes see the whole batch, it is called with ``retain_graph=True``.

        Returns:
            1/B * sum_i a_i l_i(w), detached; for multi-label targets 1/(BC) * sum_ij a_ij l_ij(w).

        Raises:
            SettingError: if a label is outside the classes, or ``losses`` does not return one loss for each row, or
                for each pair.
        """
        modules = list(self.module.modules())  # walking them costs as much as a layer of a small net
        sharded = fsdp_modules(modules)

        def reshard() -> None:
            for m in sharded:
                m.reshard()

        reshard()  # after a forward without a backward (validation) the registered parameters are gathered copies
        params = trained_parameters(modules)
        group = None if sharded else self.process_group
        check_modules(modules, self.perturbation, group)
        plan = self._plan(modules, own=sharpness_weight is not None, group=group)
        batches = plan.batches(losses, targets, sharpness_weight)
        perturbed = perturbed_parameters(self.perturb, modules, params, self._num_classes)
        reduction = self._reduction(params, perturbed, group, plan)
        whole = all(perturbed) or reduction.keeps_g_s or bool(sharded)  # FSDP2 runs the backward on other tensors
        step = Step(
            modules,
            params,
            perturbed,
            batches,
            ascents=plan.ascents(batches),
            adaptive=self.adaptive,
            reduction=reduction,
            backward_pass=BackwardPass(self.module, params, backward),
            along_only=None if whole else [p for p, chosen in zip(params, perturbed, strict=True) if chosen],
            after_write=reshard,
        )
        try:
            with self.no_sync():
                return step.run()
        except BaseException:
            try:
                step.undo()
            except BaseException:  # a second Ctrl-C
                step.undo()
                raise
            raise

    def broadcast_buffers(self) -> None:
        """Copy rank 0's buffers (BatchNorm's running statistics) to all ranks, before evaluating or saving.

        The passes run without communication, and so without DistributedDataParallel's own broadcast.
        """
        if self.process_group is not None or fsdp_modules(list(self.module.modules())):
            broadcast_buffers(self.module, self.process_group)

    def _reduction(self, params: Sequence[Tensor], perturbed: Sequence[bool], group: Any, plan: Plan) -> Reduction:
        return reduction_over(group, params, self.perturbation, plan.perturbs, perturbed)

    def _plan(self, modules: Sequence[nn.Module], *, own: bool, group: Any) -> Plan:
        perturbs = self.rho > 0 and (own or bool(np.count_nonzero(self.sharpness_weight.numpy())))
        context_rows, apart = context_of(self.context_rows, modules, perturbs)
        waits = forward_communicates(modules)
        apart = apart and not waits
        return Plan(
            sharpness_weight=self.sharpness_weight,
            class_weight=self.class_weight,
            context_rows=context_rows,
            perturbs=perturbs,
            in_step=perturbs and (waits or (group is not None and context_rows is None)),
            may_be_empty=group is not None and not waits and context_rows is not None,
            rho=self.rho,
            splits=apart and self.first_pass == "split" and not any(map(averages_over_rows, modules)),
            along_only=apart and self.perturb != "all",
        )
