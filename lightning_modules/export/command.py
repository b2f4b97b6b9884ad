"""`imbsam export`: a checkpoint as ONNX or torch.export, checked against the checkpoint's predictions."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.base.pixels import PixelInput
from imbsam.errors import SettingError
from lightning_modules.export.description import describe
from lightning_modules.export.files import largest_difference, runner, trace, write
from lightning_modules.export.prediction_graph import PredictionGraph

Part = Literal["val", "test"]

NEAR_WHOLE = 0.01
"""Pixels that differ by less from whole numbers are whole numbers before normalization."""


def export_files(
    model: Any,
    data: Any,
    paths: Sequence[Path],
    checkpoint: str,
    part: Part,
    samples: int,
    tolerance: float,
    calibration: Any,
    decisions: Any,
) -> None:
    """Write the files, and compare each with the checkpoint's predictions.

    Args:
        model: with the checkpoint's weights.
        data: the DataModule, set up.
        paths: the files, each with the suffix of its format.
        checkpoint: its path, for the description.
        part: whose samples are compared.
        samples: how many of them at most, >= 2.
        tolerance: the largest difference allowed.
        calibration: the callback with its fit, or None.
        decisions: the callback with its fit, or None.

    Raises:
        SettingError: the network cannot be exported, or a file predicts something else; it is deleted.
    """
    _refuse_detectors_without_network(getattr(model, "detector", None))
    batch = _first_samples(_loader(data, part), samples)
    model.eval()
    with torch.no_grad():
        expected = _predictions(model, batch, calibration)
    inputs, pixels = _pixels(batch, getattr(data, "pixels", None))
    graph = PredictionGraph(model, pixels, calibration)
    program = trace(graph, inputs)
    description = describe(model, data, inputs, pixels, calibration, decisions, checkpoint)
    for path in paths:
        write(program, path, graph, description)
        difference = largest_difference(runner(path), inputs, expected)
        compared = f"{len(inputs):,} {'validation' if part == 'val' else 'test'} samples"
        if not difference <= tolerance:
            path.unlink()
            raise SettingError(
                f"path is {path}: its {' and '.join(graph.outputs)} differ by up to {difference:.2g} from the "
                f"checkpoint's on {compared}, more than tolerance {tolerance:g}: the file is deleted"
            )
        kind = f"{inputs.dtype} (batch, {', '.join(map(str, inputs.shape[1:]))})".removeprefix("torch.")
        print(f"{path}: {kind} to {', '.join(graph.outputs)}; {path.stat().st_size / 1e6:,.1f} MB")
        print(f"largest difference from the checkpoint's predictions on {compared}: {difference:.2g}")


def _refuse_detectors_without_network(detector: Any) -> None:
    if not getattr(detector, "uses_gradient", True):
        raise SettingError(
            f"the detector is {type(detector).__name__}, which has no network to export: score with imbsam predict, or "
            "train a detector with a network, such as DevNet"
        )


def _loader(data: Any, part: Part) -> Iterable[Any]:
    loader = getattr(data, f"{part}_dataloader")()
    if isinstance(loader, (list, tuple)):
        if not loader:
            raise SettingError("split is val and there is no validation part: set it to test, or data.val_share")
        return loader[0]  # type: ignore[no-any-return]
    return loader  # type: ignore[no-any-return]


def _first_samples(loader: Iterable[Any], samples: int) -> Tensor:
    found: list[Tensor] = []
    for batch in loader:
        found.append(batch[0])
        if sum(map(len, found)) >= samples:
            break
    inputs = torch.cat(found)[:samples] if found else torch.empty(0)
    if len(inputs) < 2:
        raise SettingError(f"split has {len(inputs)} samples: comparing takes 2 at least")
    return inputs


def _predictions(model: Any, inputs: Tensor, calibration: Any) -> list[Tensor]:
    """What the model says of inputs as the data give them, by its own methods, in the order of the graph's outputs."""
    predicted = model.predict_step((inputs, None), 0)
    calibrated = predicted if calibration is None else calibration.apply(predicted).float()
    if predicted.ndim == 1:
        return [predicted] if calibration is None else [predicted, calibrated]
    return [model.test_logits(inputs).float(), calibrated]


def _pixels(inputs: Tensor, pixels: PixelInput | None) -> tuple[Tensor, PixelInput | None]:
    """The pixels that were normalized: uint8 if they were whole numbers, otherwise float32."""
    if pixels is None or inputs.dim() != 4:
        return inputs.float(), None
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (pixels.mean, pixels.std))
    raw = inputs * std + mean
    whole = raw.round()
    if bool(((raw - whole).abs() < NEAR_WHOLE).all()) and whole.min() >= 0 and whole.max() <= 255:
        return whole.to(torch.uint8), pixels
    return raw, pixels
