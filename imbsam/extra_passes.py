"""Which rows of a batch the extra passes run on."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from imbsam.errors import SettingError

ContextRows = int | Literal["auto", "batch"]

AUTO_CONTEXT_ROWS = 32
"""Context rows of `"auto"` for a module with BatchNorm in training mode; docs/cost.md has the measurements."""


def check_context_rows(context_rows: ContextRows) -> None:
    """Refuse anything but a number of rows, ``"auto"`` or ``"batch"``."""
    a_number = isinstance(context_rows, int) and not isinstance(context_rows, bool) and context_rows >= 0
    if context_rows not in ("auto", "batch") and not a_number:
        raise SettingError(f'context_rows is {context_rows!r}: give "auto", "batch" or a number from 0')


def context_of(context_rows: ContextRows, modules: Sequence[nn.Module], perturbs: bool) -> tuple[int | None, bool]:
    """How many context rows the setting means for a module, and whether its rows are apart.

    Args:
        context_rows: the setting.
        modules: the module's submodules.
        perturbs: whether there may be extra passes; if not, nobody looks.

    Returns:
        The number, None for the whole batch; and whether no row of a pass sees another.
    """
    if context_rows == "batch":
        return None, False
    over_rows = perturbs and context_rows in ("auto", 0) and any(map(normalises_over_rows, modules))
    rows = (AUTO_CONTEXT_ROWS if over_rows else 0) if context_rows == "auto" else context_rows
    return rows, perturbs and rows == 0 and not over_rows


def normalises_over_rows(module: nn.Module) -> bool:
    """Whether it is BatchNorm in training mode; hand-written, scripted and exported ones are told by their buffers."""
    if not module.training:
        return False
    name = class_name(module)
    if isinstance(module, _InstanceNorm) or "InstanceNorm" in name or "Frozen" in name:
        return False
    return isinstance(module, _BatchNorm) or "BatchNorm" in name or averages_over_rows(module)


def class_name(module: nn.Module) -> str:
    """The name of its class; of a scripted module, of the class that was scripted."""
    kind = type(module)
    # asking every module for `original_name` takes as long as a pass of a small net
    return str(module.original_name) if hasattr(kind, "original_name") else kind.__name__


def averages_over_rows(module: nn.Module) -> bool:
    """Whether it keeps running statistics of the rows it sees, as InstanceNorm may."""
    return module.training and any(
        buffer.startswith(("running_", "moving_"))
        for buffer in module._buffers.keys()  # noqa: SIM118
    )


def extra_pass_rows(sharp: Sequence[int], batch_size: int, context_rows: int) -> list[int]:
    """The sharp rows, then at least `context_rows` other rows, evenly spaced over the rest of the batch.

    Nothing is random: the same batch gives the same rows. The number of rows is rounded up by `pass_size`, to at most
    the batch size; the padding is more of the evenly spaced rows.

    Args:
        sharp: indices of the rows with c_i > 0, ascending.
        batch_size: number of rows of the batch.
        context_rows: minimum number of non-sharp rows to add.

    Returns:
        Distinct row indices, the sharp ones first; only their losses count.

    >>> extra_pass_rows([2, 5], batch_size=8, context_rows=3)
    [2, 5, 0, 1, 4, 6]
    """
    fill = min(batch_size, pass_size(len(sharp) + context_rows)) - len(sharp)
    if fill == 0:
        return list(sharp)
    is_other = np.ones(batch_size, dtype=bool)
    is_other[list(sharp)] = False
    others = np.flatnonzero(is_other)
    return [*sharp, *others[np.arange(fill) * len(others) // fill].tolist()]


def pass_size(rows: int) -> int:
    """Round a number of rows up to one of few sizes: 2, 4, 6, ..., 32, 36, 40, ..., 64, 72, ...

    Even up to 32, then eight sizes per octave, so that compilers and CUDA graphs see few shapes and at most a ninth
    of a larger pass is padding. Never below 2: BatchNorm in training mode refuses a batch of one.

    >>> [pass_size(n) for n in (1, 3, 9, 17, 33, 100)]
    [2, 4, 10, 18, 36, 104]
    """
    step = max(2, 1 << max(0, (rows - 1).bit_length() - 4))
    return -(-rows // step) * step
