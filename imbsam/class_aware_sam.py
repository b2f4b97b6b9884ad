"""Sharpness-aware minimization by class as a backward pass: call it instead of `loss.backward()`."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

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
from imbsam.extra_passes import AUTO_CONTEXT_ROWS, ContextRows, check_context_rows, normalises_over_rows
from imbsam.row_weights import class_vector
from imbsam.step import Step


class ClassAwareSAM(Capturable):
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

    It is not an optimizer and keeps nothing between calls, so any optimizer, scheduler, ``GradScaler``, clipping and
    checkpointing work as they do after ``loss.backward()``. :class:`SAM`, :class:`ImbSAM`, :class:`FocalSAM` and
    :class:`Plain` choose the sharpness weights; this class takes them from you.

    After a call, parameters are bit-identical to before it, and buffers and the random generators of torch, NumPy and
    Python are as one ordinary pass leaves them. After an exception or Ctrl-C inside a call, all of these and ``.grad``
    are as they were before it.

    Args:
        module: the model whose parameters are perturbed, wrapped or not. Frozen parameters are left out. Every
            trained parameter must be in it: one outside would accumulate the gradients of all three passes.
        class_counts: training samples per class, shape (C,). Needed if ``tail_weight`` is not 1.
        sharpness_weight: c for every class, shape (C,), or one number for all classes.
        rho: length of the perturbation e. May be changed between calls; 0 is plain training.
        eta: classes with fewer than eta training samples are tail classes.
        tail_classes: the tail classes, by index or as a mask of shape (C,), instead of eta.
        tail_weight: multiplies the loss weight of the tail classes. The published code uses 2 for ImbSAM alone; a fair
            comparison uses it for every method. It is multiplied into the attribute ``class_weight`` once: setting that
            attribute later replaces it.
        class_weight: loss weight a for every class, shape (C,). Default: 1. It also weights g_s, and so the direction
            of the perturbation. May be changed between calls (deferred re-weighting).
        adaptive: e = rho * w^2 g / ||w g|| (ASAM, Kwon et al., ICML 2021) instead of rho * g / ||g||.
        context_rows: the extra passes run on the sharp rows and this many other rows of the batch, whose losses do not
            count, so that BatchNorm sees a batch. ``0`` is exact for a network and loss that treat each row
            independently; ``"batch"`` is the published gradient, with the whole batch in every pass, and what a loss
            that couples rows needs; ``"auto"`` is 32 if the module has BatchNorm in training mode, else 0.
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
        counts = None if class_counts is None else class_counts_tensor(class_counts)
        if tail_weight != 1:
            self.class_weight = with_tail_weight(self.class_weight, tail_weight, counts, eta, tail_classes)
        self.adaptive = adaptive
        check_context_rows(context_rows)
        self.context_rows = context_rows
        if perturbation not in ("global", "per_rank"):
            raise SettingError(f'perturbation is {perturbation!r}: give "global" or "per_rank"')
        self.perturbation = perturbation
        ddp_no_sync, ddp_group = communication_of(module)
        self.no_sync = no_sync or ddp_no_sync
        self.process_group = ddp_group if process_group is None else process_group

    @property
    def rho(self) -> float:
        """Length of the perturbation e."""
        return self._rho

    @rho.setter
    def rho(self, rho: float) -> None:
        if isinstance(rho, str) or not 0 <= rho < math.inf:
            raise SettingError(f"rho is {rho!r}: give a finite number from 0 (0.05 is the literature's)")
        self._rho = float(rho)

    @property
    def class_weight(self) -> Tensor | None:
        """Loss weight a for every class, float64 (C,) on the CPU; None if all are 1."""
        return self._class_weight

    @class_weight.setter
    def class_weight(self, class_weight: Tensor | Sequence[float] | None) -> None:
        weight = None if class_weight is None else class_vector("class_weight", class_weight)
        classes = self.sharpness_weight
        if weight is not None and weight.dim() == classes.dim() == 1 and len(weight) != len(classes):
            raise SettingError(
                f"class_weight has {len(weight)} entries for {len(classes)} classes: give one weight for each class"
            )
        self._class_weight = weight

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
                rows, shape (R,). Its first call is for all rows in order, at w: keep predictions for metrics there.
                Or a list of ``(losses, targets)``: micro-batches that count as one batch.
            targets: class indices (B,), or probabilities (B, C) (c_i and a_i are then expectations). Best on the CPU:
                the sharp rows are chosen on the host, which has to wait for a GPU tensor.
            sharpness_weight: c_i for every row, shape (B,), instead of the one from ``targets`` (``targets`` is then
                needed only for ``class_weight``).
            backward: runs a backward pass; ``lambda loss, **kw: scaler.scale(loss).backward(**kw)`` for a
                ``GradScaler``. If the extra passes see the whole batch, it is called with ``retain_graph=True``.

        Returns:
            1/B * sum_i a_i l_i(w), detached.

        Raises:
            SettingError: if a label is outside the classes, or ``losses`` does not return one loss for each row.
        """
        modules = list(self.module.modules())  # walking them costs as much as a layer of a small net
        sharded = fsdp_modules(modules)

        def reshard() -> None:
            for m in sharded:
                m.reshard()

        reshard()  # after a forward without a backward (validation) the registered parameters are gathered copies
        # in the order of module.parameters(), tied ones once, without another walk of the modules
        trained = (p for m in modules for p in m._parameters.values() if p is not None and p.requires_grad)
        params = list({id(p): p for p in trained}.values())
        if not params:
            raise SettingError("module has no parameter that requires a gradient: unfreeze one")
        group = None if sharded else self.process_group
        check_modules(modules, self.perturbation, group)
        plan = self._plan(modules, own=sharpness_weight is not None, group=group)
        batches = plan.batches(losses, targets, sharpness_weight)
        step = Step(
            modules,
            params,
            batches,
            ascents=plan.ascents(batches),
            adaptive=self.adaptive,
            reduction=self._reduction(params, group, plan),
            run_backward=backward,
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

    def _reduction(self, params: Sequence[Tensor], group: Any, plan: Plan) -> Reduction:
        return reduction_over(group, params, self.perturbation, plan.perturbs)

    def _plan(self, modules: Sequence[nn.Module], *, own: bool, group: Any) -> Plan:
        perturbs = self.rho > 0 and (own or bool(self.sharpness_weight.numpy().any()))
        context_rows = self.context_rows
        if context_rows == "auto":
            context_rows = AUTO_CONTEXT_ROWS if perturbs and any(map(normalises_over_rows, modules)) else 0
        waits = forward_communicates(modules)
        return Plan(
            sharpness_weight=self.sharpness_weight,
            class_weight=self.class_weight,
            context_rows=None if context_rows == "batch" else context_rows,
            perturbs=perturbs,
            in_step=perturbs and (waits or (group is not None and context_rows == "batch")),
            may_be_empty=group is not None and not waits and context_rows != "batch",
            rho=self.rho,
        )
