"""A dispatch mode that stands in for a GPU's `set_sync_debug_mode("error")`."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class NoSynchronisation(TorchDispatchMode):
    """Fail on what would make the host wait for a GPU."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.FORBIDDEN), f"{func} waits for the GPU"
        return func(*args, **(kwargs or {}))
