"""What a model gave at w for every row of a batch, for metrics, whichever rows the passes were for."""

from torch import Tensor


class FirstOutputs:
    """Keeps the outputs at w in row order.

    The passes at w come before those at w + e and reach every row once, so they are over when every row has outputs.

    Args:
        size: number of rows of the batch.

    Example:
        >>> import torch
        >>> kept = FirstOutputs(3)
        >>> for rows, at in (([0, 2], 1.0), ([1], 1.0), ([1], 2.0)):  # the last at w + e
        ...     _ = kept(torch.tensor(rows), at * torch.tensor(rows).float())
        >>> kept.outputs
        tensor([0., 1., 2.])
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen = 0
        self._outputs: Tensor | None = None

    def __call__(self, rows: Tensor, outputs: Tensor) -> Tensor:
        """Keep the outputs of these rows, detached, where the pass is at w; and return them as they are.

        Args:
            rows: the row indices that ``losses`` was called with, int64 (R,).
            outputs: their outputs, (R, ...).
        """
        if self._seen < self._size:
            if self._outputs is None:
                self._outputs = outputs.new_empty((self._size, *outputs.shape[1:]), requires_grad=False)
            self._outputs[rows] = outputs.detach()
            self._seen += len(rows)
        return outputs

    @property
    def outputs(self) -> Tensor:
        """The outputs of all rows at w, (B, ...), detached."""
        assert self._outputs is not None, "outputs are there after the call of backward"
        return self._outputs
