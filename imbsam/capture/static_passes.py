"""The passes of a step on static tensors: nothing in them depends on the host once they have been captured."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imbsam.backward_pass import BackwardPass
from imbsam.batch import SharpGradient
from imbsam.capture.philox import Generators, Moment
from imbsam.capture.scratch_buffers import ScratchBuffers, Start
from imbsam.capture.static_tensors import Results, Slot, check_outputs, weighted_sum
from imbsam.errors import SettingError
from imbsam.gradients import Gradients
from imbsam.perturbation import Ascent, perturbation


class StaticPasses:
    """The passes of :class:`imbsam.step.Step`, in its order, for one shape; which rows and weights is data.

    Args:
        params: the trained parameters.
        losses_of: from the tensors of a batch to its losses (R,), or to these and a tensor to keep of the first pass.
        slots: the micro-batches.
        source: where g_s(w) comes from, for all of them alike.
        rows: number of rows of an extra pass.
        first_rows: number of rows of the first pass; fewer than the batch has where it is split.
        perturbed: whether each parameter is perturbed; e is 0 for the others.
        rho: length of e, a float64 scalar.
        adaptive: ASAM's e.
        backward_pass: runs the backward passes.
        buffers: the module's.
        results: where loss and gradients go.
        split: into what runs before and after the all-reduce of g_s(w).
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        losses_of: Callable[..., Any],
        slots: Sequence[Slot],
        source: SharpGradient,
        rows: int,
        first_rows: int,
        *,
        perturbed: Sequence[bool],
        rho: Tensor,
        adaptive: bool,
        backward_pass: BackwardPass,
        buffers: ScratchBuffers,
        results: Results,
        split: bool,
    ) -> None:
        self.params = params
        self.buffers = buffers
        self.source = source
        self.generators: Generators | None = None
        self.branch: torch.cuda.Stream | None = None
        """Where g_s(w) is computed beside g_all(w); None for one after the other."""
        self.ascent: Ascent | None = None
        self.g_reached: list[bool] = []
        self.g_s_reached: list[bool] = []
        self._losses_of = losses_of
        self._slots = slots
        self._total = sum(slot.size for slot in slots)
        self._rows = rows
        self._first_rows = first_rows
        self._perturbed = perturbed
        self._along_only = None if all(perturbed) else [p for p, one in zip(params, perturbed, strict=True) if one]
        self._rho = rho
        self._adaptive = adaptive
        self._gradient = backward_pass.gradient
        self._retained_gradient = backward_pass.retained_gradient
        self._results = results
        self._starts: list[tuple[Start, Moment]] = []
        self._after: Moment | None = None
        self._split = split

    @property
    def programs(self) -> list[Callable[[], None]]:
        """What to run, or to capture, in this order."""
        return [self._at_w, self._at_w_plus_e] if self._split and self.perturbs else [self._whole]

    @property
    def perturbs(self) -> bool:
        """Whether it has extra passes."""
        return self.source is not SharpGradient.NONE

    @property
    def can_branch(self) -> bool:
        """Whether g_s(w) takes a pass that depends on no other: several micro-batches follow one another."""
        return self._own_pass and len(self._slots) == 1

    @property
    def _own_pass(self) -> bool:
        """Whether g_s(w) has a forward of its own."""
        return self.source in (SharpGradient.OWN_FORWARD, SharpGradient.DIRECTION, SharpGradient.FIRST_PASS)

    def _whole(self) -> None:
        g_rest, g_s = self._gradients_at_w()
        if self.perturbs:
            g_rest = self._ascended_gradient(g_rest, g_s)
        self.g_reached = self._results.keep("g", g_rest)

    def _at_w(self) -> None:
        g_rest, g_s = self._gradients_at_w()
        along = (g if one else None for g, one in zip(g_s.tensors, self._perturbed, strict=True))
        self.g_s_reached = self._results.keep("g_s", Gradients(along))
        self.g_reached = self._results.keep("g", g_rest)
        self._end()

    def _at_w_plus_e(self) -> None:
        """Along the mean g_s of all ranks, which the all-reduce has brought into the same tensors."""
        g_rest = self._results.kept("g", self.g_reached)
        g_s = self._results.kept("g_s", self._perturbed)
        self.g_reached = self._results.keep("g", self._ascended_gradient(g_rest, g_s))

    def _gradients_at_w(self) -> tuple[Gradients, Gradients]:
        """g_rest and g_s; what follows writes to scratch buffers, until :meth:`_end`."""
        assert self.generators is not None
        self._starts = []
        fork = None
        if self.branch is not None:
            fork = torch.cuda.Event()  # type: ignore[no-untyped-call]
            fork.record()
        loss, g_rest, g_s = self._first_passes()
        split = self.source is SharpGradient.FIRST_PASS
        if not split:
            self._after = self.generators.now()
        if self._own_pass:
            for i, slot in enumerate(self._slots):
                with self._on_branch(fork):
                    found, sharp = self._own_forward(i, slot)
                if split:
                    loss = loss + sharp
                if self.source is SharpGradient.OWN_FORWARD:
                    g_rest -= found
                g_s += found
        if split:
            self._after = self.generators.now()
        self._results.keep_loss(loss)
        if not self.perturbs:
            self._end()
        return g_rest, g_s

    def _first_passes(self) -> tuple[Tensor, Gradients, Gradients]:
        assert self.generators is not None
        loss = torch.zeros((), device=self.params[0].device)
        g_rest, g_s = self._no_gradient(), self._no_gradient()
        for i, slot in enumerate(self._slots):
            self.buffers.put_back()
            if self.perturbs:
                self._starts.append((self.buffers.start(first=i == 0), self.generators.now()))
            if self.source is SharpGradient.FIRST_PASS:
                rows = slot.first_rows(self._first_rows)
                losses, a, c = self._losses_of_rows(slot, rows, keep=i, counted=slot.c[rows] == 0)
                self.buffers.settle()
                objective = weighted_sum(losses, a * (1 - c)) / self._total
                loss = loss + objective.detach()
                g_rest = self._gradient(objective, g_rest)
                continue
            losses = self._losses(slot.inputs, slot.size, keep=i)
            self.buffers.settle()
            objective = weighted_sum(losses, slot.a) / self._total
            loss = loss + objective.detach()
            if self.source is SharpGradient.EVERY_ROW:
                g_s = self._gradient(objective, g_s, inputs=self._along_only)
                continue
            if self.source is SharpGradient.SAME_GRAPH:
                sharp = weighted_sum(losses, slot.a * slot.c) / self._total
                found = self._retained_gradient(sharp, inputs=self._along_only)
                if found is not None:
                    g_s += found
                    self.buffers.set_aside()  # activation checkpointing moves them again in the second backward
                    g_rest = self._gradient(weighted_sum(losses, slot.a * (1 - slot.c)) / self._total, g_rest)
                    continue
                self.source = SharpGradient.OWN_FORWARD
            if self.source is SharpGradient.DIRECTION:
                objective = weighted_sum(losses, slot.a * (1 - slot.c)) / self._total
            g_rest = self._gradient(objective, g_rest)
        if all(g is None for g in (*g_rest.tensors, *g_s.tensors)):
            raise SettingError("no parameter of module got a gradient: losses_of(x, y) must run the module itself")
        return loss, g_rest, g_s

    def _own_forward(self, i: int, slot: Slot) -> tuple[Gradients, Tensor]:
        """g_s(w) of one micro-batch by a forward on the sharp rows and their context, and its objective."""
        assert self.generators is not None
        start, _ = self._starts[i]
        self._starts[i] = (start, self.generators.now())
        along = None if self.source is SharpGradient.OWN_FORWARD else self._along_only
        keep = i if self.source is SharpGradient.FIRST_PASS else None
        return self._sharp_gradient(slot, start, keep=keep, inputs=along)

    @contextlib.contextmanager
    def _on_branch(self, fork: "torch.cuda.Event | None") -> Iterator[None]:
        """Inside, work goes to the branch, which waits for what was before the first pass and not for the pass."""
        if self.branch is None or fork is None:
            yield
            return
        try:
            with torch.cuda.stream(self.branch):
                self.branch.wait_event(fork)
                yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # in a capture that has failed; what failed says why
                torch.cuda.current_stream().wait_stream(self.branch)
            raise
        torch.cuda.current_stream().wait_stream(self.branch)

    def _ascended_gradient(self, g_rest: Gradients, g_s: Gradients) -> Gradients:
        """The gradient of L: g_rest(w) + g_s(w + e)."""
        self._ascend(g_s)
        try:
            for slot, (start, moment) in zip(self._slots, self._starts, strict=True):
                moment.restore()
                g_rest, _ = self._sharp_gradient(slot, start, add_to=g_rest)
        finally:
            if self.ascent is not None:
                self.ascent.restore()
        self._end()
        return g_rest

    def _ascend(self, g_s: Gradients) -> None:
        """To w + e, which is w where no parameter that is perturbed has a gradient. Consumes `g_s` for its memory."""
        self.ascent = None
        found = zip(self.params, g_s.tensors, self._perturbed, strict=True)
        reached = [(p, g) for p, g, one in found if one and g is not None]
        g_s.tensors = []
        if not reached:
            return
        params, along = zip(*reached, strict=True)
        del reached
        self.ascent = Ascent(params)
        e = perturbation(along, self._rho, weights=params if self._adaptive else None)
        del along
        self.ascent.ascend(e)

    def _end(self) -> None:
        """Buffers and generators are where one ordinary pass leaves them."""
        self.buffers.put_back()
        if self.perturbs and self._after is not None:
            self._after.restore()

    def _sharp_gradient(
        self, slot: Slot, start: Start, add_to: Gradients | None = None, *, keep: int | None = None, **options: Any
    ) -> tuple[Gradients, Tensor]:
        """g_s of one micro-batch at the weights as they are, and what it is the gradient of, detached."""
        start.restore()
        if self._rows == slot.size:
            losses, a, c = self._losses(slot.inputs, slot.size), slot.a, slot.c
        else:
            rows = slot.rows(self._rows)
            losses, a, c = self._losses_of_rows(slot, rows, keep=keep, counted=slot.c[rows] > 0)
        objective = weighted_sum(losses, a * c) / self._total
        return self._gradient(objective, add_to, **options), objective.detach()

    def _losses_of_rows(
        self, slot: Slot, rows: Tensor, *, keep: int | None, counted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of some rows, their a and c; keeps the outputs of those that are counted."""
        into = rows.masked_fill(~counted, slot.size)
        return self._losses(slot.taken(rows), len(rows), keep=keep, into=into), slot.a[rows], slot.c[rows]

    def _losses(
        self, inputs: tuple[Tensor, ...], size: int, keep: int | None = None, into: Tensor | None = None
    ) -> Tensor:
        losses = self._losses_of(*inputs)
        if isinstance(losses, tuple) and len(losses) == 2:
            losses, outputs = losses
            check_outputs(outputs, size)
            if keep is not None:
                self._results.keep_outputs(keep, outputs, self._slots[keep].size, into)
        if not isinstance(losses, Tensor) or losses.shape != (size,):
            found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise SettingError(
                f"losses_of(x, y) returned {found} for {size} rows: return one loss for each row, shape ({size},), "
                'for example with reduction="none"'
            )
        return losses

    def _no_gradient(self) -> Gradients:
        return Gradients.none(len(self.params))
