"""Lightning modules, backbones, detectors, callbacks and the command line."""

from lightning_modules.anomaly import AnomalyDetector
from lightning_modules.callbacks.early_stopping import RestoringEarlyStopping
from lightning_modules.callbacks.epochs_on_test_set import EpochsOnTestSet
from lightning_modules.callbacks.max_norm import MaxNorm
from lightning_modules.callbacks.schedules import DeferredReweighting, RhoSchedule, TailStage
from lightning_modules.callbacks.sharpness import GroupSharpness
from lightning_modules.classifier import LongTailedClassifier
from lightning_modules.cosine_to_end import CosineToEnd
from lightning_modules.multilabel import MultiLabelClassifier
from lightning_modules.second_stage import SecondStageClassifier
from lightning_modules.tuning import AdaptFormer, All, Bias, HeadOnly, LastBlocks, LoRA, Norm
from lightning_modules.tuning.head_init import ClassMeans, TextFeatures

__all__ = [
    "AdaptFormer",
    "All",
    "AnomalyDetector",
    "Bias",
    "ClassMeans",
    "CosineToEnd",
    "DeferredReweighting",
    "EpochsOnTestSet",
    "GroupSharpness",
    "HeadOnly",
    "LastBlocks",
    "LoRA",
    "LongTailedClassifier",
    "MaxNorm",
    "MultiLabelClassifier",
    "Norm",
    "RestoringEarlyStopping",
    "RhoSchedule",
    "SecondStageClassifier",
    "TailStage",
    "TextFeatures",
]
