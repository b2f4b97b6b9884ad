"""Lightning modules, backbones, callbacks and the command line."""

from lightning_modules.classifier import LongTailedClassifier

__all__ = ["LongTailedClassifier"]
