"""One step: grad L(w) = g_rest(w) + g_s(w + e), with e along g_s(w); or a sum of several g_s, each at its own w + e."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from imbsam.backward_pass import BackwardPass
from imbsam.batch import Batch, SharpGradient, to_device
from imbsam.distributed import Reduction
from imbsam.errors import SettingError
from imbsam.gradients import Gradients, clones, copy_, local_shards
from imbsam.perturbation import Ascent, perturbation
from imbsam.reduce_overhead import begin_pass
from imbsam.snapshot import Buffers, RandomState


class Step:
    """The passes of one call of `backward`, which can be undone at any point.

        g_rest = grad of 1/B sum a_i (1 - c_i) l_i        g_s = grad of 1/B sum a_i c_i l_i

    With several groups k of classes, c_i is the sum of their c_ik and g_s the sum of their g_k, each with its own e_k.

    Args:
        modules: the module's submodules, itself first.
        params: its trained parameters.
        perturbed: whether each of them is perturbed; e is 0 for the others.
        batches: the micro-batches, which count as one batch of B rows.
        ascents: for each e, its length and the parts of the batches that give its g_s (``Plan.ascents``).
        adaptive: ASAM's e.
        reduction: averages over the ranks.
        backward_pass: runs the backward passes.
        along_only: the parameters whose g_s to compute where it only directs e; None for all.
        after_write: called after every change of the weights.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        params: Sequence[nn.Parameter],
        perturbed: Sequence[bool],
        batches: Sequence[Batch],
        *,
        ascents: Sequence[tuple[float, Sequence[Batch]]],
        adaptive: bool,
        reduction: Reduction,
        backward_pass: BackwardPass,
        along_only: Sequence[nn.Parameter] | None,
        after_write: Callable[[], None],
    ) -> None:
        self._module = modules[0]
        self._params = params
        self._perturbed = perturbed
        self._batches = batches
        self._total = max(1, sum(batch.c.numel() for batch in batches))  # B; B times C for multi-label targets
        self._ascents = ascents
        self._adaptive = adaptive
        self._reduction = reduction
        self._gradient = backward_pass.gradient
        self._retained_gradient = backward_pass.retained_gradient
        self._along_only = along_only
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
            drawn: RandomState | None = generators  # nothing has been drawn since
            for rho, parts in self._ascents:
                self._own_forwards(parts, g_rest, g_s, drawn)
                drawn = None
                g_s = self._reduction.mean_g_s(g_s)
                with self._ascended(g_s, rho):
                    for part in parts:  # grad L(w) = g_rest(w) + g_s(w + e)
                        g_rest = self._gradient(self._sharp_objective(part), g_rest)
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
            losses = self._losses(batch, batch.first_rows)
            objective = batch.all(losses) / self._total
            loss = loss + objective.detach().to(loss.device)
            buffers = None
            if batch.source is SharpGradient.EVERY_ROW:
                g_s = self._gradient(objective, g_s, inputs=self._along_only)
                del losses, objective  # of a graph that the backward pass has not gone through nothing is freed by it
                continue
            if batch.source is SharpGradient.SAME_GRAPH:
                increment = self._retained_gradient(batch.sharp(losses) / self._total, inputs=self._along_only)
                if increment is not None:
                    g_s += increment
                    buffers = self._buffers.now()  # activation checkpointing updates them again in the second backward
                    g_rest = self._gradient(batch.rest(losses) / self._total, g_rest)
                    continue
                batch.source = SharpGradient.OWN_FORWARD
            if batch.gives_rest:
                objective = batch.rest(losses) / self._total
            g_rest = self._gradient(objective, g_rest)
            if batch.source is SharpGradient.FIRST_PASS:
                buffers, batch.generators = self._buffers.now(), self._generators.now()
                objective = self._sharp_objective(batch)
                loss = loss + objective.detach().to(loss.device)
                g_s = self._gradient(objective, g_s, inputs=self._along_only)
                del losses, objective
        self._check_reached(g_rest, g_s)
        return loss, g_rest, g_s, buffers

    def _own_forwards(
        self, parts: Sequence[Batch], g_rest: Gradients, g_s: Gradients, drawn: RandomState | None
    ) -> None:
        """g_s(w) by a forward on the sharp rows and their context; g_rest = g_all - g_s, where it is not there yet.

        `drawn` is the state of the generators now, if known.
        """
        for part in parts:
            if part.source in (SharpGradient.OWN_FORWARD, SharpGradient.DIRECTION):
                part.generators, drawn = drawn or self._generators.now(), None
                subtracted = part.source is SharpGradient.OWN_FORWARD
                along = None if subtracted else self._along_only
                increment = self._gradient(self._sharp_objective(part), inputs=along)
                if subtracted:
                    g_rest -= increment
                g_s += increment

    @contextlib.contextmanager
    def _ascended(self, g_s: Gradients, rho: float) -> Iterator[None]:
        """Inside, the weights are w + e. Consumes `g_s`, or its memory would be held through the passes at w + e."""
        found = zip(self._params, g_s.tensors, self._perturbed, strict=True)
        reached = [(p, g) for p, g, perturbed in found if perturbed and g is not None]
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

    def _sharp_objective(self, batch: Batch) -> Tensor:
        """What g_s is the gradient of, at the current weights: w and w + e see the same rows, buffers and masks."""
        assert batch.buffers is not None
        assert batch.generators is not None
        batch.buffers.restore()
        batch.generators.restore()
        return batch.sharp(self._losses(batch, batch.rows)) / self._total

    def _losses(self, batch: Batch, rows: Tensor) -> Tensor:
        begin_pass(self._params[0].device)
        losses = batch.losses(to_device(rows, self._params[0].device))
        wanted = (len(rows), *batch.c.shape[1:])
        if not isinstance(losses, Tensor) or losses.shape != wanted:
            returned = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            pairs = isinstance(losses, Tensor) and losses.dim() == 2 and len(wanted) == 1
            each = "row and class" if len(wanted) == 2 else "row"
            raise SettingError(
                f"losses(rows) returned {returned} for {len(rows)} rows: return one loss for each {each}, "
                f'shape {wanted}, for example with reduction="none"'
                + ("; for multi-label targets give them as integers 0 and 1, (B, C)" if pairs else "")
            )
        return losses

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
        return Gradients.none(len(self._params))

    def _entries(self) -> list[Tensor]:
        return local_shards([grad for grad in self._grads if grad is not None])
