"""One call of a captured step: bring the batch in, run the graphs of its shape, hand the gradient out."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from imbsam.backward_pass import BackwardPass
from imbsam.batch import Batch, Plan, SharpGradient
from imbsam.capture.checks import check_compiled, check_module
from imbsam.capture.graphs import Graphs, Recording
from imbsam.capture.scratch_buffers import ScratchBuffers
from imbsam.capture.static_passes import StaticPasses
from imbsam.capture.static_tensors import Results, Slot
from imbsam.distributed import Reduction, reduction_over
from imbsam.extra_passes import extra_pass_rows
from imbsam.gradients import Gradients, clones, copy_
from imbsam.parameters import perturbed_parameters

if TYPE_CHECKING:
    from imbsam.class_aware_sam import ClassAwareSAM

Shape = tuple[Any, ...]
"""Number of micro-batches, where g_s(w) comes from, rows of the passes, and what else a graph holds fast."""


class StaticStep:
    """The static tensors of a step, and a recording for each shape, made when it is first met.

    Args:
        sam: the engine whose settings it follows.
        losses_of: from the tensors of a batch to its losses.
        example: a full batch, on any device; shapes, dtypes and memory formats count.
        params: the trained parameters.
        graphs: what records the passes.
        scaler: a GradScaler, or None.
        sizes: the numbers of rows that an extra pass may have, ascending up to the whole batch.
    """

    def __init__(
        self,
        sam: "ClassAwareSAM",
        losses_of: Callable[..., Any],
        example: Sequence[Tensor],
        params: Sequence[nn.Parameter],
        graphs: Graphs,
        scaler: Any,
        sizes: Sequence[int],
    ) -> None:
        self._sam = sam
        self._losses_of = losses_of
        self._example = example
        self._params = params
        self._device = params[0].device
        self._graphs = graphs
        self._scaler = scaler
        self._sizes = sizes
        self._buffers = ScratchBuffers(list(sam.module.modules()))
        self._results = Results(params)
        self._slots: list[Slot] = []
        self._rho = torch.zeros((), dtype=torch.float64, device=self._device)
        self._one = torch.ones((), device=self._device)
        self._scale = None if scaler is None else torch.ones((), device=self._device)
        self._backward_pass = BackwardPass(sam.module, params, functools.partial(_backward, self._scale))
        self._perturbed_by: dict[str | tuple[str, ...], tuple[bool, ...]] = {}
        """For each setting `perturb`."""
        self._recordings: dict[Shape, Recording] = {}

    @property
    def outputs(self) -> list[Tensor]:
        """What `losses_of` returned beside the losses of the first pass, of each micro-batch."""
        return self._results.outputs

    def run(self, modules: Sequence[nn.Module], plan: Plan, micro: Sequence[Any], decided: Sequence[Batch]) -> Tensor:
        """Add the gradient to `.grad`, or leave everything as it was.

        Args:
            modules: the module's submodules.
            plan: what is decided from the settings.
            micro: the tensors of each micro-batch.
            decided: the loss and sharpness weights of each.

        Returns:
            1/B * sum_i a_i l_i(w), detached.

        Raises:
            CaptureError: where the passes cannot be captured.
        """
        grad_mode, cached_casts = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
        grads = [p.grad for p in self._params]
        present = [grad for grad in grads if grad is not None]
        before: list[Tensor] = []
        kept = False
        undo_passes: Callable[[], None] | None = None

        def undo() -> None:
            for p, grad in zip(self._params, grads, strict=True):
                p.grad = grad
            if before:
                copy_(present, before)
            if undo_passes is not None:
                undo_passes()
            if kept:
                self._buffers.undo()
            torch.set_grad_enabled(grad_mode)  # an interruption may come where a block that sets them begins or ends
            torch.set_autocast_cache_enabled(cached_casts)

        try:
            before = clones(present)
            self._buffers.keep()
            kept = True
            source, rows, first_rows = self._passes_of(plan, decided)
            self._fill(micro, decided, rows, first_rows)
            with self._sam.no_sync():
                sam = self._sam
                perturbed = self._perturbed(modules)
                reduction = reduction_over(sam.process_group, self._params, sam.perturbation, plan.perturbs, perturbed)
                recording = self._recording(
                    modules, len(micro), source, rows, first_rows, perturbed, split=reduction.waits
                )
                undo_passes = recording.begin()
                gradients = self._replay(recording, reduction)
                recording.end()
            self._add_to_grad(grads, before, gradients)
            assert self._results.loss is not None
            return self._results.loss.clone()
        except BaseException:
            try:
                undo()
            except BaseException:  # a second Ctrl-C
                undo()
                raise
            raise

    def _replay(self, recording: Recording, reduction: Reduction) -> Gradients:
        """The graphs; they are split where the ranks average g_s, and no all-reduce is part of one.

        Ranks meet their shapes at different steps, so that one would capture, and warm up, while the others replay.
        """
        passes = recording.passes
        recording.replay(0)
        if reduction.waits:
            reached = passes.g_s_reached if passes.perturbs else [False] * len(self._params)
            g_s = reduction.mean_g_s(self._results.kept("g_s", reached))
            if passes.perturbs:
                self._results.keep("g_s", g_s)
                recording.replay(1)
        return reduction.mean(self._results.kept("g", passes.g_reached))

    @torch.no_grad()
    def _add_to_grad(self, grads: Sequence[Tensor | None], before: Sequence[Tensor], gradients: Gradients) -> None:
        """As `backward()` does; an entry may be the very tensor that the passes have just overwritten."""
        earlier = iter(before)
        into: list[Tensor] = []
        increments: list[Tensor] = []
        for p, entry, g in zip(self._params, grads, gradients.tensors, strict=True):
            p.grad = g if entry is None else entry
            if entry is not None:
                old = next(earlier)
                if g is not None:
                    into.append(entry)
                    increments.append(old if entry is g else g)
        if into:
            torch._foreach_add_(into, increments)

    def _perturbed(self, modules: Sequence[nn.Module]) -> tuple[bool, ...]:
        """Whether each parameter is perturbed; asked of the modules once, since they are those that were captured."""
        perturb = self._sam.perturb
        setting = perturb if isinstance(perturb, str) else tuple(perturb)
        if setting not in self._perturbed_by:
            found = perturbed_parameters(perturb, modules, self._params, self._sam._num_classes)
            self._perturbed_by[setting] = tuple(found)
        return self._perturbed_by[setting]

    def _passes_of(self, plan: Plan, decided: Sequence[Batch]) -> tuple[SharpGradient, int, int]:
        """Where g_s(w) comes from, and the rows of an extra pass and of the first; alike for all micro-batches.

        A split first pass leaves out the sharp rows, as many as the size below theirs: so it has one size for each of
        theirs, and there are no more graphs than without it.
        """
        size = decided[0].size
        if all(batch.source is SharpGradient.NONE for batch in decided):
            return SharpGradient.NONE, 0, size
        if all(batch.source is SharpGradient.EVERY_ROW for batch in decided):
            return SharpGradient.EVERY_ROW, size, size
        if plan.context_rows is None:
            return SharpGradient.SAME_GRAPH, size, size
        sharp = [np.count_nonzero(batch.c.numpy()) for batch in decided]
        rows = next(n for n in self._sizes if n >= min(size, max(sharp) + plan.context_rows))
        if rows == size:
            return SharpGradient.SAME_GRAPH, size, size
        left_out = max((n for n in self._sizes if n < min(sharp)), default=0)
        if left_out and all(batch.source is SharpGradient.FIRST_PASS for batch in decided):
            return SharpGradient.FIRST_PASS, rows, size - left_out
        return plan.own_forward, rows, size

    def _fill(self, micro: Sequence[Any], decided: Sequence[Batch], rows: int, first_rows: int) -> None:
        while len(self._slots) < len(micro):
            self._slots.append(Slot(self._example, self._device))
        for slot, inputs, batch in zip(self._slots, micro, decided, strict=False):
            taken: Sequence[int] = range(rows)
            first: list[int] = []
            if 0 < rows < batch.size:
                sharp = np.flatnonzero(batch.c.numpy()).tolist()
                taken = extra_pass_rows(sharp, batch.size, rows - len(sharp))
                if first_rows < batch.size:
                    others = np.flatnonzero(batch.c.numpy() == 0).tolist()
                    first = [*others, *sharp[: first_rows - len(others)]]
            slot.fill(inputs, batch.a, batch.c, taken, first)
        self._rho.fill_(self._sam.rho)
        if self._scale is not None:
            self._scale.copy_(self._scaler.scale(self._one))

    def _recording(
        self,
        modules: Sequence[nn.Module],
        micro: int,
        source: SharpGradient,
        rows: int,
        first_rows: int,
        perturbed: tuple[bool, ...],
        *,
        split: bool,
    ) -> Recording:
        device, adaptive = self._device.type, self._sam.adaptive
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        training = tuple(m.training for m in modules)
        shape = micro, source, rows, first_rows, perturbed, split, adaptive, autocast, training
        if shape not in self._recordings:
            check_module(self._sam, modules, self._params)
            check_compiled(modules, self._losses_of)
            passes = StaticPasses(
                self._params,
                self._losses_of,
                self._slots[:micro],
                source,
                rows,
                first_rows,
                perturbed=perturbed,
                rho=self._rho,
                adaptive=adaptive,
                backward_pass=self._backward_pass,
                buffers=self._buffers,
                results=self._results,
                split=split,
            )
            self._buffers.detach_computed()
            self._recordings[shape] = self._graphs.record(passes)
        return self._recordings[shape]


def _backward(scale: Tensor | None, loss: Tensor, **options: Any) -> None:
    torch.autograd.backward(loss if scale is None else loss * scale, **options)
