"""A step of the engine as CUDA graphs: captured once for each shape of its passes, replayed from then on."""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from imbsam.batch import to_device
from imbsam.capture.checks import (
    Captured,
    Losses,
    check_batches,
    check_compiled,
    check_method,
    check_module,
    check_one_loss_a_row,
    check_rows,
    check_signature,
)
from imbsam.capture.graphs import CaptureError, Graphs, graphs_on
from imbsam.capture.pass_sizes import graph_sizes
from imbsam.capture.static_step import StaticStep
from imbsam.capture.static_tensors import check_outputs
from imbsam.errors import SettingError
from imbsam.first_outputs import FirstOutputs
from imbsam.parameters import trained_parameters

if TYPE_CHECKING:
    from imbsam.class_aware_sam import ClassAwareSAM


class CapturedStep:
    """What :meth:`Capturable.capture` returns: ``loss = step(x, y)`` in place of ``sam.backward(losses, y)``.

    It owns static tensors and graphs; the engine, whose settings it follows from step to step, keeps nothing.

    Args:
        sam: the engine.
        losses_of: as for `capture`.
        example: as for `capture`.
        graphs: what records the passes; None to run the eager engine.
        fall_back: train eagerly, with a warning, from a capture that fails on.
        scaler: as for `capture`.
        pass_sizes: as for `capture`.
    """

    def __init__(
        self,
        sam: "ClassAwareSAM",
        losses_of: Losses,
        example: Sequence[Tensor],
        *,
        graphs: Graphs | None,
        fall_back: bool = False,
        scaler: Any = None,
        pass_sizes: Sequence[int] | None = None,
    ) -> None:
        check_signature(losses_of, example)
        self._eager_outputs: list[FirstOutputs] | None = None
        self._micro_batches = 0
        self._sam = sam
        self._losses_of = losses_of
        self._example = [torch.empty_like(t, device="meta") for t in example]
        self._fall_back = fall_back
        self._scaler = scaler
        modules = list(sam.module.modules())
        self._captured = Captured(modules)
        self._params = self._captured.params
        sizes = graph_sizes(len(example[0]), pass_sizes)
        self._static: StaticStep | None = None
        if graphs is not None:
            try:
                check_method(sam)
                check_module(sam, modules, self._params)
                check_compiled(modules, losses_of)
                self._static = StaticStep(sam, losses_of, self._example, self._params, graphs, scaler, sizes)
            except (CaptureError, torch.OutOfMemoryError) as error:
                self._fall_back_or_raise(error)

    def __call__(self, *batch: Any, targets: Any = None, sharpness_weight: Any = None) -> Tensor:
        """Add the gradient of the objective to ``.grad``, in place of :meth:`ClassAwareSAM.backward`.

        Args:
            *batch: the tensors that `losses_of` takes, of B rows each; or one list of such tuples, micro-batches that
                count as one batch. Batches with fewer rows than the example's run eagerly.
            targets: as for ``backward``, one a micro-batch in a list; default: the last tensor of the batch. Best on
                the CPU: a GPU tensor has to be waited for.
            sharpness_weight: as for ``backward``.

        Returns:
            1/B * sum_i a_i l_i(w), detached.

        Raises:
            SettingError: for a batch unlike the example, a module that has changed since, or passes that cannot be
                captured; everything is as it was before the call then.
        """
        several = len(batch) == 1 and isinstance(batch[0], list)
        micro = [tuple(one) for one in batch[0]] if several else [batch]
        whole = check_batches(micro, self._example)
        self._micro_batches = len(micro)
        own = sharpness_weight is not None
        if several and own:
            raise SettingError("sharpness_weight goes with one batch: micro-batches bring their own targets")
        if targets is None:
            targets = [None if own else one[-1] for one in micro]
        elif not several:
            targets = [targets]
        elif len(targets) != len(micro):
            raise SettingError(f"targets has {len(targets)} entries for {len(micro)} micro-batches: give one for each")
        for one, target in zip(micro, targets, strict=True):
            check_rows("targets", target, one)
            check_rows("sharpness_weight", sharpness_weight, one)
        if self._static is not None and whole:
            modules = list(self._sam.module.modules())
            self._captured.check(modules)
            plan = self._sam._plan(modules, own=own, group=self._sam.process_group)
            decided = [b for t in targets for b in plan.batches(self._losses_of, t, sharpness_weight)]
            self._eager_outputs = None
            try:
                check_one_loss_a_row(decided)
                return self._static.run(modules, plan, micro, decided)
            except (CaptureError, torch.OutOfMemoryError) as error:
                self._fall_back_or_raise(error)
        return self._eager(micro, targets, sharpness_weight)

    @property
    def outputs(self) -> list[Tensor]:
        """What `losses_of` returned beside the losses of the first pass, for each micro-batch."""
        if self._eager_outputs is None and self._static is not None:
            return self._static.outputs[: self._micro_batches]
        return [kept.outputs for kept in self._eager_outputs or []]

    def _fall_back_or_raise(self, error: CaptureError | torch.OutOfMemoryError) -> None:
        """A capture that failed ends in one line, or with "auto" in eager steps from there on."""
        if isinstance(error, torch.OutOfMemoryError):  # the passes of an eager step share their memory
            reason = CaptureError("the GPU is out of memory, of which graphs take more than an eager step")
            reason.__cause__ = error
            error = reason
        if not self._fall_back:
            raise SettingError(
                f"capture is True, and the step cannot be captured: {error}; set capture=False, or capture="
                '"auto", which then trains eagerly'
            ) from error
        warnings.warn(f'capture is "auto", and the steps run eagerly: {error}', stacklevel=3)
        self._static = None

    def _eager(self, micro: Sequence[Any], targets: Sequence[Any], sharpness_weight: Any) -> Tensor:
        outputs: list[FirstOutputs] = []
        self._eager_outputs = outputs
        device = self._params[0].device
        functions = [self._of_rows([_moved(t, device) for t in inputs], outputs, i) for i, inputs in enumerate(micro)]
        several = len(functions) > 1
        return self._sam.backward(
            list(zip(functions, targets, strict=True)) if several else functions[0],
            None if several else targets[0],
            sharpness_weight=sharpness_weight,
            backward=Tensor.backward if self._scaler is None else self._scaled_backward,
        )

    def _of_rows(self, inputs: Sequence[Tensor], outputs: list[FirstOutputs], i: int) -> Callable[[Tensor], Any]:
        """`losses_of` as the engine takes it: from row indices."""
        kept = FirstOutputs(len(inputs[0]))

        def losses(rows: Tensor) -> Any:
            found = self._losses_of(*(t[rows] for t in inputs))
            if not isinstance(found, tuple):
                return found
            check_outputs(found[1], len(rows))
            kept(rows, found[1])
            if len(outputs) == i:
                outputs.append(kept)
            return found[0]

        return losses

    def _scaled_backward(self, loss: Tensor, **options: Any) -> None:
        self._scaler.scale(loss).backward(**options)


def _moved(t: Tensor, device: torch.device) -> Tensor:
    return to_device(t, device) if t.device.type == "cpu" else t.to(device)


class Capturable:
    """Gives :class:`ClassAwareSAM` its method `capture`."""

    def capture(
        self,
        losses_of: Losses,
        example: Sequence[Tensor],
        *,
        capture: bool | Literal["auto"] = True,
        scaler: Any = None,
        pass_sizes: Sequence[int] | None = None,
    ) -> CapturedStep:
        """Make a step that replays CUDA graphs, for ``loss = step(x, y)`` in place of :meth:`ClassAwareSAM.backward`.

        A GPU waits for the launches of a step's many small kernels; a graph launches all of them at once. The passes,
        the perturbation and the way back are captured when a shape of them is first met; which rows are sharp, all
        weights, rho and the scale are data. ``.grad``, weights and buffers are as after ``backward``; the optimizer,
        clipping and scheduler follow as ever. Where ``.grad`` was None it is a tensor of the step's own, which the
        next step overwrites: clone what you keep.

        Args:
            losses_of: a function from the tensors of a batch to the losses of its rows, ``losses_of(x, y)`` of shape
                (R,), or to these losses and one tensor to keep of the first pass (predictions), then in
                ``step.outputs``. It is called at the captures only, with rows of any step: what it does on the host
                happens then. Autocast belongs inside it or around the step.
            example: the tensors of one full batch, such as ``(x, y)``; their values do not count.
            capture: True; ``"auto"`` to run eagerly where there is no GPU or a capture fails (with a warning); or
                False, to run eagerly.
            scaler: a ``GradScaler``, by which the loss is multiplied.
            pass_sizes: the numbers of rows that an extra pass may have. Default: multiples of 8, and four an octave
                from 64 on. The next larger one is taken; the whole batch is always among them.

        Raises:
            SettingError: where a setting cannot work, or there is no GPU.

        Example:
            >>> import torch
            >>> from imbsam import SAM
            >>> model = torch.nn.Linear(4, 3)
            >>> x, y = torch.randn(8, 4), torch.arange(8) % 3
            >>> def losses_of(x, y):
            ...     return torch.nn.functional.cross_entropy(model(x), y, reduction="none")
            >>> step = SAM(model).capture(losses_of, (x, y), capture="auto")
            >>> step(x, y).shape, model.weight.grad.shape
            (torch.Size([]), torch.Size([3, 4]))
        """
        sam = cast("ClassAwareSAM", self)
        if not isinstance(capture, bool) and capture != "auto":
            raise SettingError(f'capture is {capture!r}: give True, False or "auto"')
        device = trained_parameters(list(sam.module.modules()))[0].device
        graphs = graphs_on(device) if capture else None
        if capture is True and graphs is None:
            raise SettingError(
                f"capture is True and module is on {device}: CUDA graphs need a GPU; move it there first, or set "
                'capture="auto", which runs eagerly here'
            )
        return CapturedStep(
            sam,
            losses_of,
            example,
            graphs=graphs,
            fall_back=capture == "auto",
            scaler=scaler,
            pass_sizes=pass_sizes,
        )
