"""Lightning modules, backbones, detectors, callbacks and the command line."""

from lightning_modules.anomaly import AnomalyDetector
from lightning_modules.classifier import LongTailedClassifier
from lightning_modules.early_stopping import RestoringEarlyStopping
from lightning_modules.max_norm import MaxNorm
from lightning_modules.second_stage import SecondStageClassifier
from lightning_modules.sharpness import SharpnessOfGroups

__all__ = [
    "AnomalyDetector",
    "LongTailedClassifier",
    "MaxNorm",
    "RestoringEarlyStopping",
    "SecondStageClassifier",
    "SharpnessOfGroups",
]
