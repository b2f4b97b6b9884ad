"""ImbSAM for any PyTorch loop: a backward pass that flattens the loss of the rare classes.

The engine, and with it torch, is imported when it is first asked for, so that ``imbsam --version`` and
``imbsam report`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from imbsam.errors import SettingError

if TYPE_CHECKING:
    from imbsam.partitioned_sam import CCSAM, SSESAM, PartitionedSAM
    from imbsam.sam import SAM, ClassAwareSAM, FocalSAM, ImbSAM, Plain
else:

    def __getattr__(name):
        """The engine's classes, when they are first asked for (PEP 562)."""
        if name in __all__:
            with_groups = name in ("CCSAM", "SSESAM", "PartitionedSAM")
            module = import_module("imbsam.partitioned_sam") if with_groups else import_module("imbsam.sam")
            globals()[name] = value = getattr(module, name)
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})


__all__ = ["CCSAM", "SAM", "SSESAM", "ClassAwareSAM", "FocalSAM", "ImbSAM", "PartitionedSAM", "Plain", "SettingError"]
