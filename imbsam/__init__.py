"""ImbSAM for any PyTorch loop: a backward pass that flattens the loss of the rare classes."""

from imbsam.backward import SAM, ClassAwareSAM, FocalSAM, ImbSAM
from imbsam.errors import SettingError

__all__ = ["SAM", "ClassAwareSAM", "FocalSAM", "ImbSAM", "SettingError"]
