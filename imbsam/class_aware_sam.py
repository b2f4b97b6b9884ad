"""Sharpness-aware minimization by class as a backward pass: call it instead of `loss.backward()`."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

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

    It is no optimizer and keeps nothing between calls, so any optimizer, scheduler, ``GradScaler``, clipping and
    checkpointing work as they do after ``loss.backward()``. :class:`SAM`, :class:`ImbSAM`, :class:`FocalSAM` and
    :class:`Plain` choose the sharpness weights; this class takes them from you.

    After a call (and after an exception or Ctrl-C inside it, then with ``.grad`` too) parameters are bit-identical to
    before it, buffers are as the one ordinary pass left them, and the random generators of torch, NumPy and Python
    stand where ``loss.backward()`` would have left them.

    Args:
        module: the model whose parameters are perturbed, wrapped or not. Frozen parameters are left out. Every
            trained parameter must be in it: one outside would gather the gradients of all three passes.
        class_counts: training samples per class, shape (C,). Needed where ``tail_weight`` is not 1.
        sharpness_weight: c for every class, shape (C,), or one number for all classes.
        rho: length of the perturbation e. May be changed between calls; 0 trains plainly.
        eta: classes with fewer than eta training samples are tail classes.
        tail_classes: the tail classes, by index or as a mask of shape (C,), in place of eta.
        tail_weight: multiplies the loss weight of the tail classes. The published code uses 2 for ImbSAM alone; a fair
            comparison has it for every method. It is in the attribute ``class_weight`` from then on: what is set there
            later replaces it.
        class_weight: loss weight a for every class, shape (C,). Default: 1. It weighs g_s too, and so the direction of
            the perturbation. May be changed between calls (deferred re-weighting).
        adaptive: e = rho * w^2 g / ||w g|| (ASAM, Kwon et al., ICML 2021) in place of rho * g / ||g||.
        context_rows: the extra passes run on the sharp rows and this many other rows of the batch, whose losses do not
            count; they are there so that BatchNorm sees a batch. ``0`` is exact where rows do not see each other;
            ``"batch"`` is the published gradient, with the whole batch in every pass, and what a loss that couples
            rows needs; ``"auto"`` is 32 where the module has BatchNorm in training mode, else 0.
        perturb: which parameters have an e; it is 0 for the others. ``"norm"``, those of the normalisation layers
            (SAM-ON, Mueller et al., NeurIPS 2023, whose rho is about ten times larger); ``"classifier"``, those of the
            last layer with an output for each class (CC-SAM's first stage); or the names of layers or parameters, as
            ``module.named_modules()`` has them.
        first_pass: ``"split"`` gives the sharp rows and the others first passes of their own, ``1 + t`` passes in place
            of ``1 + 2 t``, t being the share of the sharp rows, with the same gradient. ``losses`` is then called for
            the other rows, the sharp ones, and the sharp ones at w + e, and never for all rows in order
            (:class:`imbsam.first_outputs.FirstOutputs`). Only where no row sees another (no BatchNorm in training
            mode, no context rows) and every c is 0 or 1; elsewhere it is as ``"whole"``.
        perturbation: with several processes, ``"global"`` perturbs all of them along the mean of their g_s, as one
            process with the joint batch would; ``"per_rank"`` perturbs each along its own, which saves one of the two
            all-reduces a step.
        no_sync: context manager under which backward passes do not communicate. Default: the module's own where it is
            or wraps ``DistributedDataParallel``.
        process_group: average gradients over this group. Default: the module's own where it is or wraps
            ``DistributedDataParallel``, else none. A module under FSDP2 (``fully_shard``) needs neither.

    Raises:
        SettingError: where a setting cannot work.

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
        first_pass: Literal["whole", "split"] = "whole",
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
        known = counts if counts is not None else self.sharpness_weight
        self._num_classes = len(known) if known.dim() == 1 else None
        if tail_weight != 1:
            self.class_weight = with_tail_weight(self.class_weight, tail_weight, counts, eta, tail_classes)
        self.adaptive = adaptive
        check_context_rows(context_rows)
        self.context_rows = context_rows
        check_perturb(perturb)
        self.perturb = perturb
        if first_pass not in ("whole", "split"):
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
        """Add the gradient of the objective to ``.grad``, in place of ``loss.backward()``.

        Args:
            losses: a function from row indices (int64, shape (R,), on the parameters' device) to the losses of those
                rows, shape (R,). Its first call is for all rows in order, at w: keep predictions for metrics there.
                Or a list of ``(losses, targets)``: micro-batches that count as one batch.
            targets: class indices (B,), or probabilities (B, C) (c_i and a_i are then the expected ones). Best on the
                CPU: which rows are sharp is decided on the host, and a GPU tensor has to be waited for.
            sharpness_weight: c_i for every row, shape (B,), instead of the one from ``targets`` (``targets`` is then
                needed only for ``class_weight``).
            backward: what runs a backward pass; ``lambda loss, **kw: scaler.scale(loss).backward(**kw)`` for a
                ``GradScaler``. Where the extra passes see the whole batch it is called with ``retain_graph=True``.

        Returns:
            1/B * sum_i a_i l_i(w), detached.

        Raises:
            SettingError: for a label outside the classes, or losses that are not one for each row.
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

        The passes run without communication, and that ends DistributedDataParallel's own broadcast too.
        """
        if self.process_group is not None or fsdp_modules(list(self.module.modules())):
            broadcast_buffers(self.module, self.process_group)

    def _reduction(self, params: Sequence[Tensor], perturbed: Sequence[bool], group: Any, plan: Plan) -> Reduction:
        return reduction_over(group, params, self.perturbation, plan.perturbs, perturbed)

    def _plan(self, modules: Sequence[nn.Module], *, own: bool, group: Any) -> Plan:
        perturbs = self.rho > 0 and (own or bool(self.sharpness_weight.numpy().any()))
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
