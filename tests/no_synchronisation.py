"""A dispatch mode that stands in for a GPU's `set_sync_debug_mode("error")`, as far as a CPU can."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class NoSynchronisation(TorchDispatchMode):
    """Fail on operations whose result the host reads (`.item()`, `float()`, `if`) or whose shape depends on values.

    Other waits leave no trace on a CPU, where host and device are one: `.cpu()`, `.tolist()` and `.numpy()` of a tensor
    of the device, and a copy there from memory that is not pinned, such as `torch.tensor(x, device=...)`. The engine
    rightly does all of these to tensors of the host. Only a GPU can tell them apart: the tests marked `gpu`.
    """

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.FORBIDDEN), f"{func} waits for the GPU"
        return func(*args, **(kwargs or {}))
