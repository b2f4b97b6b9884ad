"""The tensors of a captured step that keep their addresses: what it reads, and what it leaves."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imbsam.errors import SettingError
from imbsam.gradients import Gradients, copy_


class Slot:
    """One micro-batch: its tensors, and what varies with it from step to step.

    Args:
        example: tensors of B rows, whose shapes, dtypes and memory formats count.
        device: where they go.
    """

    def __init__(self, example: Sequence[Tensor], device: torch.device) -> None:
        self.inputs = tuple(torch.zeros_like(t, device=device, requires_grad=False) for t in example)
        self.numbers = torch.zeros(4, len(example[0]), dtype=torch.float64, device=device)
        """a, c, the rows of the extra passes and of a split first pass; one tensor, which takes one copy."""

    def fill(
        self,
        inputs: Sequence[Tensor],
        a: Tensor | None,
        c: Tensor,
        rows: Sequence[int],
        first_rows: Sequence[int],
    ) -> None:
        """Bring in a micro-batch, without waiting for the device.

        Args:
            inputs: its tensors, on any device.
            a: loss weight of each row, float64 (B,) on the CPU; None where all are 1.
            c: sharpness weight of each row, float64 (B,) on the CPU.
            rows: rows of the extra passes, the sharp ones first.
            first_rows: rows of the first pass where that is split, those that are not sharp first.
        """
        for static, t in zip(self.inputs, inputs, strict=True):
            static.copy_(_pinned(t, static.device), non_blocking=True)
        numbers = torch.zeros(self.numbers.shape, dtype=torch.float64, device="cpu")
        numbers[0] = 1 if a is None else a
        numbers[1] = c
        numbers[2, : len(rows)] = torch.tensor(rows, dtype=torch.float64, device="cpu")
        numbers[3, : len(first_rows)] = torch.tensor(first_rows, dtype=torch.float64, device="cpu")
        self.numbers.copy_(_pinned(numbers, self.numbers.device), non_blocking=True)

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.numbers.shape[1]

    @property
    def a(self) -> Tensor:
        """Loss weight of each row, (B,)."""
        return self.numbers[0]

    @property
    def c(self) -> Tensor:
        """Sharpness weight of each row, (B,)."""
        return self.numbers[1]

    def rows(self, count: int) -> Tensor:
        """The first `count` rows of the extra passes, int64."""
        return self.numbers[2, :count].long()

    def first_rows(self, count: int) -> Tensor:
        """The first `count` rows of a split first pass, int64."""
        return self.numbers[3, :count].long()

    def taken(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Those rows of the inputs, in the inputs' memory format."""
        return tuple(_like(t[rows], t) for t in self.inputs)


class Results:
    """What a captured step leaves, whichever of its graphs ran: graphs share memory, these tensors lie outside of it.

    Args:
        params: the trained parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self.loss: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}
        """Of each micro-batch, (B + 1, ...): the last row takes what does not count."""
        self._tensors: dict[tuple[str, int], Tensor] = {}

    def keep_loss(self, loss: Tensor) -> None:
        """Copy the loss in."""
        if self.loss is None:
            self.loss = torch.empty_like(loss)
        self.loss.copy_(loss)

    @property
    def outputs(self) -> list[Tensor]:
        """What `losses_of` returned beside the losses of the first pass, of each micro-batch, (B, ...)."""
        return [self._outputs[slot][:-1] for slot in sorted(self._outputs)]

    def keep_outputs(self, slot: int, outputs: Tensor, size: int, rows: Tensor | None = None) -> None:
        """Copy the outputs of a micro-batch in.

        Args:
            slot: its number.
            outputs: of all its rows, or of some of them.
            size: number of rows of the micro-batch.
            rows: which they are, `size` for one that does not count; None for all of them.
        """
        outputs = outputs.detach()
        if slot not in self._outputs:
            self._outputs[slot] = outputs.new_zeros((size + 1, *outputs.shape[1:]))
        kept = self._outputs[slot]
        if rows is None:
            kept[:-1].copy_(outputs)
        else:
            kept.index_copy_(0, rows, outputs.to(kept.dtype))

    def keep(self, kind: str, gradients: Gradients) -> list[bool]:
        """Copy gradients in, and say which parameters have one."""
        reached = [g is not None for g in gradients.tensors]
        pairs = [(self._tensor(kind, i), g) for i, g in enumerate(gradients.tensors) if g is not None]
        if pairs:
            into, values = zip(*pairs, strict=True)
            copy_(into, values)
        return reached

    def kept(self, kind: str, reached: Sequence[bool]) -> Gradients:
        """The gradients at their fixed addresses, None for a parameter without one."""
        return Gradients(self._tensor(kind, i) if r else None for i, r in enumerate(reached))

    def _tensor(self, kind: str, i: int) -> Tensor:
        """Made when first met, in a pass that is run and not captured."""
        if (kind, i) not in self._tensors:
            self._tensors[kind, i] = torch.zeros_like(self._params[i], requires_grad=False)
        return self._tensors[kind, i]


def check_outputs(outputs: Any, rows: int) -> None:
    """Refuse what `losses_of` returned beside the losses if it is not one tensor with an entry a row."""
    if not isinstance(outputs, Tensor) or outputs.dim() == 0 or len(outputs) != rows:
        found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise SettingError(
            f"losses_of(x, y) returned {found} beside the losses of {rows} rows: return one tensor with an entry for "
            "each row, such as the logits"
        )


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Sum of w_i l_i.

    A loss of weight 0 has the gradient 0, also an infinite one. What follows is not quite as if its row were taken out:
    where the loss's own derivative is infinite (log or square root at 0), 0 times that is nan, as in the eager engine's
    passes, whose context rows have that gradient too.
    """
    return (losses * weights.to(losses.dtype)).sum()


def _pinned(t: Tensor, device: torch.device) -> Tensor:
    return t.pin_memory() if device.type == "cuda" and t.device.type == "cpu" and not t.is_pinned() else t


def _like(taken: Tensor, whole: Tensor) -> Tensor:
    if whole.dim() == 4 and whole.is_contiguous(memory_format=torch.channels_last) and not whole.is_contiguous():
        return taken.contiguous(memory_format=torch.channels_last)
    return taken
