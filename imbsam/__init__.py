"""ImbSAM for any PyTorch loop: a backward pass that flattens the loss of the rare classes."""

from imbsam.errors import SettingError
from imbsam.sam import SAM, ClassAwareSAM, FocalSAM, ImbSAM, Plain

__all__ = ["SAM", "ClassAwareSAM", "FocalSAM", "ImbSAM", "Plain", "SettingError"]
