"""Detectors of anomalies with a few labelled ones, by name."""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from imbsam.errors import SettingError
from lightning_modules.detectors.classifier import WeightedClassifier
from lightning_modules.detectors.deep_sad import DeepSAD
from lightning_modules.detectors.detector import Detector
from lightning_modules.detectors.devnet import DevNet
from lightning_modules.detectors.feawad import FEAWAD
from lightning_modules.detectors.prenet import PReNet

__all__ = ["DETECTORS", "FEAWAD", "DeepSAD", "Detector", "DevNet", "PReNet", "WeightedClassifier", "create_detector"]

DETECTORS: dict[str, type[Detector]] = {
    "devnet": DevNet,
    "deep_sad": DeepSAD,
    "prenet": PReNet,
    "feawad": FEAWAD,
    "classifier": WeightedClassifier,
}


def create_detector(name: str | type[Detector], input_shape: Sequence[int], **settings: Any) -> Detector:
    """Build a detector.

    Args:
        name: a key of ``DETECTORS``, or a subclass of :class:`Detector`.
        input_shape: the shape of one sample: (d,), or (channels, H, W).
        settings: further settings of the detector, such as ``hidden``.

    Raises:
        SettingError: for an unknown name or setting, or data that the detector cannot take.

    Example:
        >>> import torch
        >>> create_detector("devnet", (6,)).scores(torch.zeros(4, 6)).shape
        torch.Size([4])
    """
    if isinstance(name, str) and name not in DETECTORS:
        closest = difflib.get_close_matches(name.lower(), DETECTORS, n=1)
        hint = f"did you mean {closest[0]}?" if closest else f"choose one of {', '.join(DETECTORS)}"
        raise SettingError(f"detector is {name!r}: {hint}")
    kind = DETECTORS[name] if isinstance(name, str) else name
    known = [key for key in inspect.signature(kind).parameters if key != "input_shape"]
    for key in settings:
        if key not in known:
            raise SettingError(f"detector_args has {key}, which {kind.__name__} has not: it has {', '.join(known)}")
    return kind(input_shape, **settings)
