"""ImbSAM for any PyTorch loop: a backward pass that flattens the loss of the rare classes.

The engine, and with it torch, is imported on first use, so that ``imbsam --version`` and ``imbsam report`` need not
wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from imbsam.errors import SettingError

if TYPE_CHECKING:
    from imbsam.sam import CCSAM, GSAM, SAM, SSESAM, ClassAwareSAM, FocalSAM, ImbSAM, PartitionedSAM, Plain
else:

    def __getattr__(name):
        """The engine's classes, imported on first use (PEP 562)."""
        if name in __all__:
            globals()[name] = value = getattr(import_module("imbsam.sam"), name)
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})


__all__ = [
    "CCSAM",
    "GSAM",
    "SAM",
    "SSESAM",
    "ClassAwareSAM",
    "FocalSAM",
    "ImbSAM",
    "PartitionedSAM",
    "Plain",
    "SettingError",
]
