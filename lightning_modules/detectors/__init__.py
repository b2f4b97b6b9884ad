"""Anomaly detectors that learn from a few labelled anomalies."""

from lightning_modules.detectors.boosting import Boosting
from lightning_modules.detectors.classifier import WeightedClassifier
from lightning_modules.detectors.deep_sad import DeepSAD
from lightning_modules.detectors.detector import Detector
from lightning_modules.detectors.devnet import DevNet
from lightning_modules.detectors.feawad import FEAWAD
from lightning_modules.detectors.prenet import PReNet

__all__ = ["FEAWAD", "Boosting", "DeepSAD", "Detector", "DevNet", "PReNet", "WeightedClassifier"]
