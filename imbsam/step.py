"""One step: grad L(w) = g_rest(w) + g_s(w + e), with e along g_s(w); or a sum of several g_s, each at its own w + e."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imbsam.batch import Batch, SharpGradient, to_device
from imbsam.distributed import Reduction
from imbsam.errors import SettingError
from imbsam.gradients import Gradients, clones, copy_, local_shards
from imbsam.perturbation import Ascent, perturbation
from imbsam.reduce_overhead import begin_pass, outlive_pass
from imbsam.snapshot import Buffers, RandomState


class Step:
    """The passes of one call of `backward`, which can be undone at any point.

        g_rest = grad of 1/B sum a_i (1 - c_i) l_i        g_s = grad of 1/B sum a_i c_i l_i

    With several groups k of classes, c_i is the sum of their c_ik and g_s the sum of their g_k, each with its own e_k.

    Args:
        modules: the module's submodules, itself first.
        params: its trained parameters.
        batches: the micro-batches, which count as one batch of B rows.
        ascents: for each e, its length and the parts of the batches that give its g_s (``Plan.ascents``).
        adaptive: ASAM's e.
        reduction: averages over the ranks.
        run_backward: runs a backward pass: ``Tensor.backward``, or a scaler's.
        after_write: called after every change of the weights.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        params: Sequence[nn.Parameter],
        batches: Sequence[Batch],
        *,
        ascents: Sequence[tuple[float, Sequence[Batch]]],
        adaptive: bool,
        reduction: Reduction,
        run_backward: Callable[..., Any],
        after_write: Callable[[], None],
    ) -> None:
        self._module = modules[0]
        self._params = params
        self._batches = batches
        self._total = max(1, sum(batch.size for batch in batches))
        self._ascents = ascents
        self._adaptive = adaptive
        self._reduction = reduction
        self._run_backward = run_backward
        self._after_write = after_write
        # the state at entry
        self._grad_mode = torch.is_grad_enabled()
        self._grads = [p.grad for p in params]
        self._accumulated: list[Tensor] | None = None
        self._buffers = Buffers(modules)
        self._generators = RandomState({p.device for p in params})
        self._ascent: Ascent | None = None

    def run(self) -> Tensor:
        """Add the gradient to `.grad`, and return 1/B sum a_i l_i at w, detached."""
        loss, g_rest, g_s, buffers = self._first_passes()
        if self._reduction.waits or any(batch.takes_extra_passes for batch in self._batches):
            buffers, generators = buffers or self._buffers.now(), self._generators.now()
            for rho, parts in self._ascents:
                self._own_forwards(parts, g_rest, g_s)
                g_s = self._reduction.mean_g_s(g_s)
                with self._ascended(g_s, rho):
                    for part in parts:
                        g_rest = self._sharp_gradient(part, add_to=g_rest)  # grad L(w) = g_rest(w) + g_s(w + e)
                g_s = self._no_gradient()
            buffers.restore()
            generators.restore()
        self._add_to_grad(self._reduction.mean(g_rest))
        return loss

    def undo(self) -> None:
        """Restore `.grad`, parameters, generators and buffers to their state at entry."""
        for p, grad in zip(self._params, self._grads, strict=True):
            p.grad = grad
        if self._accumulated is not None:
            copy_(self._entries(), self._accumulated)
        if self._ascent is not None:
            self._ascent.restore()
        self._generators.restore()
        self._buffers.restore()
        torch.set_grad_enabled(self._grad_mode)  # an interruption may come between a no_grad block and its end

    def _first_passes(self) -> tuple[Tensor, Gradients, Gradients, Buffers | None]:
        """The ordinary forward of every micro-batch and what its graph gives.

        Returns:
            The loss; g_rest and g_s, or g_rest + g_s and 0 for a batch whose g_s needs its own forward; the buffers
            as one ordinary pass leaves them, if a second backward has changed them since.
        """
        loss = torch.zeros((), device=self._params[0].device)
        g_rest, g_s = self._no_gradient(), self._no_gradient()
        buffers: Buffers | None = None
        for i, batch in enumerate(self._batches):
            if batch.size == 0:
                continue
            if buffers is not None:
                buffers.restore()
            if batch.takes_extra_passes:  # the passes at w + e see what this one sees
                seen = self._buffers if i == 0 else self._buffers.now()
                drawn = self._generators if i == 0 else self._generators.now()
                for part in batch.parts or [batch]:
                    part.buffers, part.generators = seen, drawn
            losses = self._losses(batch, torch.arange(batch.size, device="cpu"))
            objective = batch.all(losses) / self._total
            loss = loss + objective.detach().to(loss.device)
            buffers = None
            if batch.source is SharpGradient.EVERY_ROW:
                g_s = self._gradient(objective, g_s)
                continue
            if batch.source is SharpGradient.SAME_GRAPH:
                increment = self._retained_gradient(batch.sharp(losses) / self._total)
                if increment is not None:
                    g_s += increment
                    buffers = self._buffers.now()  # activation checkpointing updates them again in the second backward
                    g_rest = self._gradient(batch.rest(losses) / self._total, g_rest)
                    continue
                batch.source = SharpGradient.OWN_FORWARD
            g_rest = self._gradient(objective, g_rest)
        self._check_reached(g_rest, g_s)
        return loss, g_rest, g_s, buffers

    def _own_forwards(self, parts: Sequence[Batch], g_rest: Gradients, g_s: Gradients) -> None:
        """g_s(w) by a forward on the sharp rows and their context; g_rest = g_all - g_s."""
        for part in parts:
            if part.source is SharpGradient.OWN_FORWARD:
                part.generators = self._generators.now()
                increment = self._sharp_gradient(part)
                g_rest -= increment
                g_s += increment

    @contextlib.contextmanager
    def _ascended(self, g_s: Gradients, rho: float) -> Iterator[None]:
        """Inside, the weights are w + e. Consumes `g_s`, or its memory would be held through the passes at w + e."""
        reached = [(p, g) for p, g in zip(self._params, g_s.tensors, strict=True) if g is not None]
        g_s.tensors = []
        if not reached:
            yield
            return
        params, along = zip(*reached, strict=True)
        del reached
        self._ascent = None  # or its copy of w would be held through the next ascent
        self._ascent = Ascent(params, self._after_write)
        e = perturbation(along, rho, weights=params if self._adaptive else None)
        del along
        self._ascent.ascend(e)
        del e
        try:
            yield
        finally:
            self._ascent.restore()

    def _sharp_gradient(self, batch: Batch, add_to: Gradients | None = None) -> Gradients:
        """g_s of one micro-batch at the current weights, w or w + e, with the same rows, buffers and masks."""
        assert batch.buffers is not None
        assert batch.generators is not None
        batch.buffers.restore()
        batch.generators.restore()
        losses = self._losses(batch, batch.rows)
        return self._gradient(batch.sharp(losses) / self._total, add_to)

    def _losses(self, batch: Batch, rows: Tensor) -> Tensor:
        begin_pass(self._params[0].device)
        losses = batch.losses(to_device(rows, self._params[0].device))
        if not isinstance(losses, Tensor) or losses.shape != (len(rows),):
            returned = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise SettingError(
                f"losses(rows) returned {returned} for {len(rows)} rows: return one loss for each row, "
                f'shape ({len(rows)},), for example with reduction="none"'
            )
        return losses

    def _gradient(self, loss: Tensor, add_to: Gradients | None = None, **options: Any) -> Gradients:
        """The gradient of `loss` added to `add_to`, as the backward pass accumulates it; `.grad` is None afterwards."""
        into = (self._no_gradient() if add_to is None else add_to).tensors
        for p, grad in zip(self._params, into, strict=True):
            p.grad = grad
        self._run_backward(loss, **options)
        gradients = Gradients(p.grad for p in self._params)
        if any(grad is not None and grad.is_sparse for grad in gradients.tensors):
            sparse = (n for n, p in self._module.named_parameters() if p.grad is not None and p.grad.is_sparse)
            raise SettingError(
                f"{next(sparse)} has a sparse gradient, which cannot be perturbed: build it with sparse=False"
            )
        for p in self._params:
            p.grad = None  # or it would keep g_s alive through the pass at w + e
        return outlive_pass(gradients, self._params[0].device) if add_to is None else gradients

    def _retained_gradient(self, loss: Tensor) -> Gradients | None:
        """The gradient of `loss` with its graph kept, or None if the graph does not allow that (torch.compile)."""
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
                "backward= does not take retain_graph: forward keyword arguments, "
                "as in lambda loss, **kw: scaler.scale(loss).backward(**kw)"
            ) from error

    def _check_reached(self, g_rest: Gradients, g_s: Gradients) -> None:
        reached = any(g is not None for g in (*g_rest.tensors, *g_s.tensors))
        if not reached and any(batch.size for batch in self._batches):
            raise SettingError(
                "no parameter of module got a gradient: losses(rows) must run the module that the engine was built "
                "with, not a copy of it"
            )

    @torch.no_grad()
    def _add_to_grad(self, g: Gradients) -> None:
        """As `backward()` does: in place if `.grad` is set, since it may be a view of a larger tensor."""
        pairs = zip(self._grads, g.tensors, strict=True)
        both = [(entry, grad) for entry, grad in pairs if entry is not None and grad is not None]
        self._accumulated = clones(self._entries())
        for p, entry, grad in zip(self._params, self._grads, g.tensors, strict=True):
            p.grad = grad if entry is None else entry
        if both:
            into, increments = zip(*both, strict=True)
            torch._foreach_add_(local_shards(into), local_shards(increments))

    def _no_gradient(self) -> Gradients:
        return Gradients([None] * len(self._params))

    def _entries(self) -> list[Tensor]:
        return local_shards([grad for grad in self._grads if grad is not None])
