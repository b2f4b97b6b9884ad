"""Lightning modules, backbones, callbacks and the command line."""

from lightning_modules.classifier import LongTailedClassifier
from lightning_modules.sharpness import SharpnessOfGroups

__all__ = ["LongTailedClassifier", "SharpnessOfGroups"]
