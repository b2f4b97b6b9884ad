"""What an exported file says about itself, as plain data that JSON can hold."""

import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from torch import Tensor

from datamodules.base.pixels import PixelInput
from lightning_modules.callbacks.decisions import class_names


def describe(
    model: Any, data: Any, inputs: Tensor, pixels: PixelInput | None, calibration: Any, decisions: Any, checkpoint: str
) -> dict[str, Any]:
    """Labels, input, normalization, calibration and decisions.

    Args:
        model: the classifier or detector.
        data: the DataModule.
        inputs: inputs of the graph.
        pixels: their normalization, if they are pixels.
        calibration: the callback with its fit, or None.
        decisions: the callback with its fit, or None.
        checkpoint: its path.
    """
    shape = list(inputs.shape[1:])
    given: dict[str, Any] = {
        "name": "inputs",
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "shape": ["batch", *shape],
    }
    if pixels is None:
        given["values"] = "as the DataModule's evaluation batches"
        given["feature_names"] = getattr(data, "feature_names", None)
    else:
        given["values"] = "pixels"
        given["shorter_side"] = pixels.shorter_side
    found = None if calibration is None else calibration.fitted
    threshold = float(getattr(model, "threshold", math.nan))
    described: dict[str, Any] = plain(
        {
            "class_names": class_names(model),
            "input": given,
            "normalization": None if pixels is None else {"mean": pixels.mean, "std": pixels.std},
            "test_time": {name: model.hparams.get(name) for name in ("flip_tta", "crop_tta") if name in model.hparams},
            "calibration": None if found is None else {**found["settings"], "prior_of_probabilities": found["target"]},
            "decisions": None if decisions is None else decisions.fitted,
            "threshold": threshold,
            "checkpoint": checkpoint,
            "versions": {name: version(name) for name in ("imbsam", "torch")},
        }
    )
    return described


def plain(value: Any) -> Any:
    """Tensors as lists, mappings with keys of text, and None for what is not finite, which JSON lacks.

    Example:
        >>> plain({1: (float("inf"), "a")})
        {'1': [None, 'a']}
    """
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
