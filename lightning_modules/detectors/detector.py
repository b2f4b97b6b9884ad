"""The base class of the anomaly detectors."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from imbsam.checks import check_whole_numbers
from imbsam.errors import SettingError


class Detector(nn.Module, ABC):
    """A network, or a model without a gradient, with the per-sample loss and the anomaly score of its method.

    Labels are 0 for unlabelled samples (most of them normal) and 1 for labelled anomalies, the tail.

    Attributes:
        sampling: the sampling of its paper: natural, balanced or pairs.
        uses_pairs: whether :meth:`losses` takes pairs of samples.
        uses_gradient: whether it is trained by the gradient of :meth:`losses`. One that is not learns in
            :meth:`prepare` and :meth:`advance`, and trains until it is :attr:`finished`. It has at least one
            parameter, with ``requires_grad=False``, for the optimizer by which Lightning counts the steps.
    """

    sampling: ClassVar[str]
    uses_pairs: ClassVar[bool] = False
    uses_gradient: ClassVar[bool] = True

    @abstractmethod
    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """The loss of every sample, shape (B,).

        Args:
            x: samples (B, d), images (B, channels, H, W), or pairs (B, 2, d) if ``uses_pairs``.
            labels: int64 (B,), or (B, 2) for pairs.
        """

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """Anomaly scores (B,), higher is more anomalous, of samples (B, d) or images (B, channels, H, W)."""

    def prepare(self, x: Tensor, labels: Tensor) -> None:
        """Called once before training: pretrain, or keep the training samples that the scores need.

        Args:
            x: all training samples (N, d) or images (N, channels, H, W).
            labels: int64 (N,).
        """

    def advance(self) -> None:
        """Make a training step, of a detector without a gradient."""

    @property
    def finished(self) -> bool:
        """Whether a detector without a gradient has no further step to make."""
        return False


class ScoreNetwork(Detector):
    """A detector of tables whose score phi(x) is the output of a multilayer perceptron, ``net``.

    Args:
        input_shape: (d,).
        hidden: sizes of the hidden layers.
    """

    def __init__(self, input_shape: Sequence[int], hidden: Sequence[int]) -> None:
        super().__init__()
        check_whole_numbers(hidden=hidden)
        self.net: nn.Sequential = mlp([features_of(type(self).__name__, input_shape), *hidden, 1])

    def scores(self, x: Tensor) -> Tensor:
        """phi(x)."""
        scores: Tensor = self.net(x).squeeze(1)
        return scores


def mlp(sizes: Sequence[int], *, bias: bool = True, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these sizes with the activation between them, and none after the last."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def features_of(name: str, input_shape: Sequence[int]) -> int:
    """The number of features of a table; refuses images."""
    if len(input_shape) != 1:
        raise SettingError(
            f"detector is {name}, which takes tables, and the data has samples of shape {tuple(input_shape)}: choose "
            "DeepSAD"
        )
    return int(input_shape[0])
