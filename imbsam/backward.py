"""ImbSAM and its relatives as a backward pass: call it instead of `loss.backward()`."""

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from imbsam.class_groups import class_counts_tensor, focal_sharpness, tail_mask
from imbsam.distributed import Agreement, broadcast_buffers, check_module, forward_communicates, fully_sharded, mean
from imbsam.errors import SettingError
from imbsam.gradients import Gradients, add_
from imbsam.perturbation import Perturbation
from imbsam.rows import Batch, Losses, class_vector, extra_pass_rows, per_row, to_device
from imbsam.snapshot import Buffers, RandomState

ContextRows = int | Literal["auto", "batch"]

AUTO_CONTEXT_ROWS = 32
"""Context rows of `"auto"` for a module with BatchNorm in training mode; docs/cost.md has the measurements."""


class ClassAwareSAM:
    r"""Sharpness-aware minimization with a sharpness weight for every class, as a backward pass.

    With per-sample losses :math:`l_i(w)`, sharpness weights :math:`c_i \ge 0` and loss weights :math:`a_i \ge 0` that
    the rows take from their classes, :meth:`backward` leaves in ``.grad`` the gradient of

    .. math::
        L(w) = \frac1B \sum_i a_i \left[ (1 - c_i)\, l_i(w) + c_i\, l_i(w + e) \right], \qquad
        e = \rho \frac{g_s(w)}{\|g_s(w)\|}, \qquad
        g_s(w) = \nabla_w \frac1B \sum_i a_i c_i\, l_i(w)

    with e held fixed, computed as the plain gradient of the batch plus a correction that needs only the *sharp rows*,
    those with :math:`c_i > 0`:

    .. math::
        g = g_\text{all}(w) + \left[ g_s(w + e) - g_s(w) \right]

    It is no optimizer and keeps nothing between calls, so any optimizer, scheduler, ``GradScaler``, clipping and
    checkpointing work as they do after ``loss.backward()``. :class:`SAM`, :class:`ImbSAM` and :class:`FocalSAM` choose
    the sharpness weights; this class takes them from you.

    After a call (and after an exception or Ctrl-C inside it, then with ``.grad`` too) parameters are bit-identical to
    before it, buffers are as the one ordinary pass left them, and torch's generators stand where ``loss.backward()``
    would have left them.

    Args:
        module: the model whose parameters are perturbed, wrapped or not. Frozen parameters are left out. Every
            trained parameter must be in it: one outside would gather the gradients of all three passes.
        sharpness: c for every class, shape (C,), or one number for all classes.
        rho: length of the perturbation e. May be changed between calls; 0 trains plainly.
        class_weight: loss weight a for every class, shape (C,). Default: 1. It weighs g_s too, and so the direction of
            the perturbation. May be changed between calls (deferred re-weighting).
        adaptive: e = rho * w^2 g / ||w g|| (ASAM, Kwon et al., ICML 2021) in place of rho * g / ||g||.
        context_rows: the extra passes run on the sharp rows and this many other rows of the batch, whose losses do not
            count; they are there so that BatchNorm sees a batch. ``0`` is exact where rows do not see each other;
            ``"batch"`` is the published gradient, with the whole batch in every pass, and what a loss that couples
            rows needs; ``"auto"`` is 32 where the module has BatchNorm in training mode, else 0.
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
        >>> import torch.nn.functional as F
        >>> model = nn.Linear(4, 3)
        >>> x, y = torch.randn(8, 4), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
        >>> sam = ClassAwareSAM(model, sharpness=[0.0, 0.5, 1.0], rho=0.05)
        >>> loss = sam.backward(lambda rows: F.cross_entropy(model(x[rows]), y[rows], reduction="none"), y)
        >>> loss.shape, model.weight.grad.shape
        (torch.Size([]), torch.Size([3, 4]))
    """

    def __init__(
        self,
        module: nn.Module,
        sharpness: Tensor | Sequence[float] | float,
        rho: float = 0.05,
        *,
        class_weight: Tensor | Sequence[float] | None = None,
        adaptive: bool = False,
        context_rows: ContextRows = "auto",
        perturbation: Literal["global", "per_rank"] = "global",
        no_sync: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        process_group: Any = None,
    ) -> None:
        self.module = module
        self.rho = rho
        self.sharpness = class_vector("sharpness", sharpness)
        self.class_weight = class_weight
        self.adaptive = adaptive
        a_number = isinstance(context_rows, int) and not isinstance(context_rows, bool) and context_rows >= 0
        if context_rows not in ("auto", "batch") and not a_number:
            raise SettingError(f'context_rows is {context_rows!r}: give "auto", "batch" or a number from 0')
        self.context_rows = context_rows
        if perturbation not in ("global", "per_rank"):
            raise SettingError(f'perturbation is {perturbation!r}: give "global" or "per_rank"')
        self.perturbation = perturbation
        # wrapped by Fabric or torch.compile, it may lie deeper
        ddp = next((m for m in module.modules() if isinstance(m, nn.parallel.DistributedDataParallel)), None)
        if ddp is not None:
            no_sync = ddp.no_sync if no_sync is contextlib.nullcontext else no_sync
            process_group = ddp.process_group if process_group is None else process_group
        self.no_sync = no_sync
        self.process_group = process_group

    @property
    def rho(self) -> float:
        """Length of the perturbation e."""
        return self._rho

    @rho.setter
    def rho(self, rho: float) -> None:
        if not 0 <= rho < math.inf:
            raise SettingError(f"rho is {rho}: give a finite number from 0 (0.05 is the literature's)")
        self._rho = float(rho)

    @property
    def class_weight(self) -> Tensor | None:
        """Loss weight a for every class, float64 (C,) on the CPU; None where all are 1."""
        return self._class_weight

    @class_weight.setter
    def class_weight(self, class_weight: Tensor | Sequence[float] | None) -> None:
        weight = None if class_weight is None else class_vector("class_weight", class_weight)
        if weight is not None and weight.dim() == self.sharpness.dim() == 1 and len(weight) != len(self.sharpness):
            raise SettingError(
                f"class_weight has {len(weight)} entries for {len(self.sharpness)} classes: "
                "give one weight for each class"
            )
        self._class_weight = weight

    def backward(
        self,
        losses: Losses | Sequence[tuple[Losses, Tensor]],
        targets: Tensor | None = None,
        *,
        sharpness: Tensor | None = None,
        backward: Callable[..., Any] = Tensor.backward,
    ) -> Tensor:
        """Add the gradient of the objective to ``.grad``, in place of ``loss.backward()``.

        Args:
            losses: a function from row indices (int64, shape (R,), on the parameters' device) to the losses of those
                rows, shape (R,). Its first call is for all rows in order, at w: keep predictions for metrics there.
                Or a list of ``(losses, targets)``: micro-batches that count as one batch.
            targets: class indices (B,), or probabilities (B, C) (c_i and a_i are then the expected ones). Best on the
                CPU: which rows are sharp is decided on the host, and a GPU tensor has to be waited for.
            sharpness: c_i for every row, shape (B,), instead of the one from ``targets`` (``targets`` is then
                needed only for ``class_weight``).
            backward: what runs a backward pass; ``lambda loss, **kw: scaler.scale(loss).backward(**kw)`` for a
                ``GradScaler``. Where the extra passes see the whole batch it is called with ``retain_graph=True``.

        Returns:
            1/B * sum_i a_i l_i(w), detached.

        Raises:
            SettingError: for a label outside the classes, or losses that are not one for each row.
        """
        if isinstance(losses, Tensor):
            raise SettingError("losses is a tensor: give a function from row indices to the losses of those rows")
        agreed = self._agreement(sharpness)
        if callable(losses):
            batches = [self._batch(losses, targets, sharpness, agreed)]
        elif targets is None and sharpness is None:
            batches = [self._batch(*micro_batch, None, agreed) for micro_batch in losses]
        else:
            raise SettingError(
                "targets and sharpness go with one batch: a list of micro-batches brings its own targets"
            )
        if not batches:
            raise SettingError("losses is an empty list: give at least one micro-batch")
        step = _Step(self, batches, backward, agreed)
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
        if self.process_group is not None or fully_sharded(self.module):
            broadcast_buffers(self.module, self.process_group)

    def _agreement(self, sharpness: Tensor | None) -> Agreement:
        perturbs = self.rho > 0 and (sharpness is not None or bool(self.sharpness.numpy().any()))
        sharded = fully_sharded(self.module)
        waits = forward_communicates(self.module)
        return Agreement(
            perturbs=perturbs,
            every_pass=perturbs and (waits or (self.process_group is not None and self.context_rows == "batch")),
            all_sharp=sharpness is None and bool((self.sharpness.numpy() == 1).all()),
            one_graph=self.context_rows == "batch",
            group=None if sharded else self.process_group,
        )

    def _batch(self, losses: Losses, targets: Tensor | None, sharpness: Tensor | None, agreed: Agreement) -> Batch:
        """Decide on the host what each row counts for and which rows the extra passes see."""
        if targets is None and (sharpness is None or self.class_weight is not None):
            raise SettingError(
                "targets is None: give the labels, or the rows' own sharpness= where no class_weight is set"
            )
        weight = None
        if targets is not None:
            targets = targets.detach().cpu()
            if self.class_weight is not None:
                weight = per_row("class_weight", self.class_weight, targets)
        if sharpness is None:
            assert targets is not None
            sharpness = per_row("sharpness", self.sharpness, targets)
        else:
            sharpness = sharpness.detach().cpu().double()
            if sharpness.dim() != 1 or (targets is not None and len(sharpness) != len(targets)):
                raise SettingError(f"sharpness= has shape {tuple(sharpness.shape)}: give one number for each row")
            given = sharpness.numpy()
            if not ((given >= 0) & (given < math.inf)).all():
                raise SettingError("sharpness= holds a negative or non-finite number: every row needs one from 0")
        size = len(sharpness)
        if size == 0:
            raise SettingError("the batch has no rows: leave it out")
        sharp = np.flatnonzero(sharpness.numpy()).tolist() if agreed.perturbs else []
        rows: list[int] = []
        if sharp or agreed.every_pass:
            rows = extra_pass_rows(sharp, size, max(self._context_rows(size), not sharp))
        whole = len(rows) == size
        if whole:
            rows.sort()  # the batch in its own order, so that the first forward may serve g_s(w) too
        all_sharp, one_graph = whole and bool((sharpness.numpy() == 1).all()), whole
        if agreed.every_pass:
            all_sharp, one_graph = agreed.all_sharp, agreed.one_graph
        return Batch(losses, size, weight, sharpness, torch.tensor(rows, dtype=torch.int64), all_sharp, one_graph)

    def _context_rows(self, batch_size: int) -> int:
        if self.context_rows == "batch":
            return batch_size
        if self.context_rows != "auto":
            return self.context_rows
        batch_norm = any(isinstance(m, _BatchNorm) and m.training for m in self.module.modules())
        return AUTO_CONTEXT_ROWS if batch_norm else 0


class SAM(ClassAwareSAM):
    """Sharpness-aware minimization (Foret et al., ICLR 2021, arXiv 2010.01412): c = 1 for every class.

    Args:
        module: as for :class:`ClassAwareSAM`.
        rho: as for :class:`ClassAwareSAM`.
        **settings: the other settings of :class:`ClassAwareSAM`.
    """

    def __init__(self, module: nn.Module, rho: float = 0.05, **settings: Any) -> None:
        super().__init__(module, 1.0, rho, **settings)


class ImbSAM(ClassAwareSAM):
    """Imbalanced SAM (Zhou et al., ICCV 2023, arXiv 2308.07815): c = 1 for tail classes, 0 for the others.

    Args:
        module: as for :class:`ClassAwareSAM`.
        class_counts: training samples per class, shape (C,).
        eta: classes with fewer than eta training samples are tail classes.
        tail_classes: the tail classes by index, in place of eta.
        rho: as for :class:`ClassAwareSAM`.
        tail_weight: multiplies the loss weight of the tail classes. The published code uses 2 for ImbSAM alone. It
            is in the attribute ``class_weight`` from then on: what is set there later replaces it.
        class_weight: as for :class:`ClassAwareSAM`.
        **settings: the other settings of :class:`ClassAwareSAM`.

    Warns:
        UserWarning: where no class is tail (plain training), or every class is (SAM).

    Example:
        >>> ImbSAM(nn.Linear(4, 3), class_counts=[500, 50, 5], eta=20).sharpness
        tensor([0., 0., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        module: nn.Module,
        class_counts: Tensor | Sequence[int],
        eta: float = 20,
        tail_classes: Sequence[int] | None = None,
        rho: float = 0.05,
        tail_weight: float = 1.0,
        class_weight: Tensor | Sequence[float] | None = None,
        **settings: Any,
    ) -> None:
        counts = class_counts_tensor(class_counts)
        tail = tail_mask(counts, eta, tail_classes)
        if not 0 <= tail_weight < math.inf:
            raise SettingError(
                f"tail_weight is {tail_weight}: give a finite number from 0 (1 leaves the loss as it is)"
            )
        super().__init__(module, tail.double(), rho, class_weight=class_weight, **settings)
        if tail_weight != 1:
            weight = torch.ones_like(self.sharpness) if self.class_weight is None else self.class_weight
            self.class_weight = torch.where(tail, tail_weight * weight, weight)
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
        class_counts: training samples per class, shape (C,).
        rho: as for :class:`ClassAwareSAM`.
        focal_lambda: weight of the sharpness term (its authors use up to 1.1).
        focal_gamma: how much less the common classes count.
        **settings: the other settings of :class:`ClassAwareSAM`.
    """

    def __init__(
        self,
        module: nn.Module,
        class_counts: Tensor | Sequence[int],
        rho: float = 0.05,
        focal_lambda: float = 0.8,
        focal_gamma: float = 3.0,
        **settings: Any,
    ) -> None:
        super().__init__(module, focal_sharpness(class_counts, focal_lambda, focal_gamma), rho, **settings)


class _Step:
    """One call of `backward`: the passes, and the way back to the start from anywhere inside them."""

    def __init__(
        self, settings: ClassAwareSAM, batches: list[Batch], backward: Callable[..., Any], agreed: Agreement
    ) -> None:
        self._settings = settings
        self._batches = batches
        self._run_backward = backward
        self._agreed = agreed
        self._modules = list(settings.module.modules())  # walking them costs as much as a layer of a small net
        self._params = [p for p in settings.module.parameters() if p.requires_grad]
        if not self._params:
            raise SettingError("module has no parameter that requires a gradient: unfreeze one")
        check_module(settings.module, settings.perturbation)
        self._devices = {p.device for p in self._params}
        self._total = sum(batch.size for batch in batches)
        # the state at entry
        self._grads: Gradients = [p.grad for p in self._params]
        self._buffers = Buffers(self._modules)
        self._random_state = RandomState(self._devices)
        self._perturbation: Perturbation | None = None

    def run(self) -> Tensor:
        """All first passes, one climb, all passes at w + e; the gradient is added to `.grad`."""
        group = self._agreed.group
        mean_g_s = group is not None and self._agreed.perturbs and self._settings.perturbation == "global"
        loss, g, g_s, remaining = self._first_passes()
        if mean_g_s or any(len(batch.rows) for batch in self._batches):
            buffers, random_state = Buffers(self._modules), RandomState(self._devices)
            for batch in remaining:
                batch.random_state = RandomState(self._devices)
                sub = self._sharp_gradient(batch)
                add_(g, sub, alpha=-1)  # g = g_all(w) - g_s(w)
                add_(g_s, sub)
                del sub
            if mean_g_s:
                g_s = mean(g_s, self._params, group)
            self._climb(g_s)
            del g_s
            for batch in self._batches:
                if batch.random_state is not None:
                    batch.random_state.restore()
                    g = self._sharp_gradient(batch, add_to=g)  # g = g_all(w) - g_s(w) + g_s(w + e)
            if self._perturbation is not None:
                self._perturbation.come_back()
            buffers.restore()
            random_state.restore()
        if group is not None:
            g = mean(g, self._params, group, keep_none=True)
        for p, entry, grad in zip(self._params, self._grads, g, strict=True):
            # a new tensor, so that the one at entry is still whole if we are interrupted
            p.grad = grad if entry is None else entry if grad is None else entry + grad
        return loss

    def undo(self) -> None:
        """Put parameters, buffers, generators and `.grad` back to where they were at entry."""
        if self._perturbation is not None:
            self._perturbation.come_back()
        self._buffers.restore()
        self._random_state.restore()
        for p, grad in zip(self._params, self._grads, strict=True):
            p.grad = grad

    def _first_passes(self) -> tuple[Tensor, Gradients, Gradients, list[Batch]]:
        """The ordinary forward and backward of every micro-batch.

        Returns:
            The loss; g_all(w), less g_s(w) where the same graph could give that; g_s(w) as far as it could; and the
            micro-batches whose g_s(w) remains to be computed.
        """
        loss = torch.zeros((), device=self._params[0].device)
        g: Gradients = [None] * len(self._params)
        g_s: Gradients = [None] * len(self._params)
        remaining = []
        for batch in self._batches:
            random_state = RandomState(self._devices) if len(batch.rows) else None
            losses = self._losses(batch, torch.arange(batch.size))
            objective = batch.objective(losses) / self._total
            loss = loss + objective.detach()
            if batch.all_sharp:  # SAM: g_s is g_all
                g_s = self._gradient(objective, g_s)
                batch.random_state = random_state
                continue
            sub = None
            if batch.one_graph:
                sub = self._retained_gradient(batch.objective(losses, batch.sharpness) / self._total)
            if sub is not None:
                add_(g_s, sub)
                g = self._gradient(batch.objective(losses, 1 - batch.sharpness) / self._total, g)
                batch.random_state = random_state
            else:
                g = self._gradient(objective, g)
                remaining += [batch] if len(batch.rows) else []
        return loss, g, g_s, remaining

    def _sharp_gradient(self, batch: Batch, add_to: Gradients | None = None) -> Gradients:
        """g_s of one micro-batch at the weights as they are, added to `add_to`."""
        losses = self._losses(batch, batch.rows)
        return self._gradient(batch.objective(losses, batch.sharpness) / self._total, add_to)

    def _losses(self, batch: Batch, rows: Tensor) -> Tensor:
        losses = batch.losses(to_device(rows, self._params[0].device))
        if not isinstance(losses, Tensor) or losses.shape != (len(rows),):
            found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise SettingError(
                f"losses(rows) returned {found} for {len(rows)} rows: return one loss for each row, "
                f'shape ({len(rows)},), for example with reduction="none"'
            )
        return losses

    def _gradient(self, loss: Tensor, add_to: Gradients | None = None, **options: Any) -> Gradients:
        """The gradient of `loss` added to `add_to`, as the backward pass accumulates it; `.grad` is None afterwards."""
        for p, grad in zip(self._params, add_to or [None] * len(self._params), strict=True):
            p.grad = grad
        self._run_backward(loss, **options)
        grads = [p.grad for p in self._params]
        if any(grad is not None and grad.is_sparse for grad in grads):
            sparse = (n for n, p in self._settings.module.named_parameters() if p.grad is not None and p.grad.is_sparse)
            raise SettingError(
                f"{next(sparse)} has a sparse gradient, which cannot be perturbed: build it with sparse=False"
            )
        for p in self._params:
            p.grad = None  # or it would keep g_s alive through the pass at w + e
        return grads

    def _retained_gradient(self, loss: Tensor) -> Gradients | None:
        """The gradient of `loss` with its graph kept, or None where the graph refuses that (torch.compile)."""
        try:
            return self._gradient(loss, retain_graph=True)
        except RuntimeError as error:
            if "donated buffer" not in str(error):
                raise
            return None
        except TypeError as error:
            if "retain_graph" not in str(error):
                raise
            raise SettingError(
                "backward= does not take retain_graph: pass keyword arguments on, "
                "as in lambda loss, **kw: scaler.scale(loss).backward(**kw)"
            ) from error

    def _climb(self, g_s: Gradients) -> None:
        reached = [(p, grad) for p, grad in zip(self._params, g_s, strict=True) if grad is not None]
        if reached:
            params, grads = zip(*reached, strict=True)
            self._perturbation = Perturbation(params)
            self._perturbation.climb(grads, self._settings.rho, adaptive=self._settings.adaptive)
