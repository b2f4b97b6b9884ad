"""Few numbers of rows for the extra passes of a captured step, each of which takes a graph of its own."""

from collections.abc import Sequence

from imbsam.checks import check_whole_numbers
from imbsam.extra_passes import pass_size


def graph_sizes(batch_size: int, sizes: Sequence[int] | None = None) -> list[int]:
    """The numbers of rows that an extra pass may have, ascending; the whole batch is the last.

    Multiples of 8 up to 64, then four an octave: coarser than :func:`~imbsam.extra_passes.pass_size`, since a row more
    costs a GPU next to nothing and a graph more memory and a second to capture. A graph is captured when its size is
    first met, and most steps of a training meet one or two.

    Args:
        batch_size: number of rows of a batch.
        sizes: other numbers of rows, each rounded up by `pass_size`.

    >>> graph_sizes(100)
    [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]
    >>> graph_sizes(128, [40])
    [40, 128]
    """
    if sizes is None:
        sizes = [n for n in range(8, batch_size, 8) if n <= 64 or n % (1 << ((n - 1).bit_length() - 3)) == 0]
    check_whole_numbers(pass_sizes=sizes)
    return sorted({min(batch_size, pass_size(n)) for n in [*sizes, batch_size]})
