"""What `imbsam predict` computes of a batch, as one module that torch.export traces."""

from typing import Any

import torch
from torch import Tensor, nn

from datamodules.base.pixels import PixelInput
from lightning_modules.callbacks.calibration import Calibration


class PredictionGraph(nn.Module):
    """From the pixels of images, or from features, to what the model predicts.

    Args:
        model: a classifier (``backbone`` and ``test_views``) or a detector (``detector``), with its weights.
        pixels: the normalization of the images; None for inputs that are as the data give them.
        calibration: with its fit; None for none.

    Attributes:
        outputs: the names of the outputs: "logits" and "probabilities", or "scores" and, if they are calibrated,
            "probabilities".
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, model: Any, pixels: PixelInput | None, calibration: Calibration | None) -> None:
        super().__init__()
        self.classifies = hasattr(model, "backbone")
        self.network: Any = model.backbone if self.classifies else model.detector
        self._views = getattr(model, "test_views", None)
        self._probabilities = getattr(model, "probabilities", None)
        self._calibrate = None if calibration is None else calibration.apply
        for name in ("mean", "std"):
            values = None if pixels is None else torch.tensor(getattr(pixels, name)).view(-1, 1, 1)
            self.register_buffer(name, values)
        probabilities = ["probabilities"] if self.classifies or self._calibrate is not None else []
        self.outputs = ["logits" if self.classifies else "scores", *probabilities]
        self.eval()

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, float32.

        Args:
            inputs: pixels, uint8 or float32 (B, channels, H, W), or what the data give, float32 (B, ...).
        """
        x = inputs if self.mean is None or self.std is None else (inputs.float() - self.mean) / self.std
        if not self.classifies:
            scores = self.network.scores(x)
            return (scores,) if self._calibrate is None else (scores, self._calibrate(scores).float())
        assert self._views is not None
        logits = torch.stack([self.network(view) for view in self._views(x)]).mean(dim=0).float()
        assert self._probabilities is not None
        probabilities = self._probabilities(logits)
        return logits, probabilities if self._calibrate is None else self._calibrate(probabilities).float()
