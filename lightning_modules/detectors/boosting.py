"""Gradient boosting of labelled anomalies against everything else, by scikit-learn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor, nn

from imbsam.checks import check_interval, check_numbers, check_whole_numbers
from imbsam.errors import SettingError
from lightning_modules.detectors.detector import Detector, features_of


class Boosting(Detector):
    r"""scikit-learn's ``HistGradientBoostingClassifier`` of labelled anomalies against unlabelled samples.

    All trees are grown before the training, by one ``fit`` on the training samples, and copied into tensors: the
    checkpoint holds no scikit-learn object, so reading it runs no code and needs no version of scikit-learn, and the
    scores are computed by torch. A training step then takes one more tree into the score, which is the same as
    stopping the booster there; the training ends when all are in. So metrics by epoch, checkpoints and resuming work
    as for the other detectors. The score is the log-odds of the booster after that many trees.

    Its loss is the logistic one, with the booster's class weights:

    .. math::
        L = (1 - y)\, w_0 \log(1 + e^{s(x)}) + y\, w_1 \log(1 + e^{-s(x)})

    Args:
        input_shape: (d,).
        trees: number of boosting rounds (scikit-learn: ``max_iter``).
        learning_rate: shrinkage of every tree's values.
        max_leaf_nodes: leaves of a tree at most.
        min_samples_leaf: training samples of a leaf at least.
        l2_regularization: of the values.
        weighted: use inverse-frequency weights w_c = n / (2 n_c), scikit-learn's "balanced"; else w = 1.

    Raises:
        SettingError: a setting is out of its range.
    """

    sampling = "natural"
    uses_gradient = False
    feature: Tensor
    threshold: Tensor
    next_node: Tensor
    baseline: Tensor
    weight: Tensor
    random_state: Tensor
    used: Tensor

    def __init__(
        self,
        input_shape: Sequence[int],
        trees: int = 100,
        learning_rate: float = 0.1,
        max_leaf_nodes: int = 31,
        min_samples_leaf: int = 20,
        l2_regularization: float = 0.0,
        weighted: bool = False,
    ) -> None:
        super().__init__()
        self.features = features_of(type(self).__name__, input_shape)
        check_whole_numbers(trees=trees, min_samples_leaf=min_samples_leaf)
        check_whole_numbers(2, max_leaf_nodes=max_leaf_nodes)
        check_interval("(0, 1]", learning_rate=learning_rate)
        check_numbers(l2_regularization=l2_regularization)
        self.settings: dict[str, Any] = {
            "max_iter": trees,
            "learning_rate": learning_rate,
            "max_leaf_nodes": max_leaf_nodes,
            "min_samples_leaf": min_samples_leaf,
            "l2_regularization": l2_regularization,
        }
        self.weighted = weighted
        shape = (trees, 2 * max_leaf_nodes - 1)  # a tree's nodes, its root first; unused ones are 0
        self.register_buffer("feature", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros(shape))
        # the node to the left and to the right, by its place among the nodes of all trees; a leaf's are the leaf
        self.register_buffer("next_node", torch.zeros(*shape, 2, dtype=torch.int64))
        # a parameter, so that there is an optimizer, whose steps Lightning counts and saves checkpoints by
        self.value = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.register_buffer("baseline", torch.zeros(()))
        self.register_buffer("weight", torch.ones(2))
        self.register_buffer("random_state", torch.randint(2**31, ()))
        self.register_buffer("used", torch.zeros((), dtype=torch.int64))

    def prepare(self, x: Tensor, labels: Tensor) -> None:
        """Grow all trees."""
        counts = labels.bincount(minlength=2)
        if not counts.all():
            raise SettingError("the training part has no labelled anomaly: raise data.labelled_share")
        if self.weighted:
            self.weight.copy_(len(labels) / (2 * counts))
        booster = HistGradientBoostingClassifier(
            **self.settings,
            class_weight="balanced" if self.weighted else None,
            early_stopping=False,  # its own would hold out training samples
            random_state=int(self.random_state),
        )
        booster.fit(x.cpu().numpy(), labels.cpu().numpy())
        self._copy(booster)
        self._check(booster, x[:1000])

    def advance(self) -> None:
        """Take one more tree into the score."""
        self.used.add_(1).clamp_(max=len(self.value))

    @property
    def finished(self) -> bool:
        """Whether all trees are in the score."""
        return int(self.used) == len(self.value)

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """Weighted binary cross-entropy."""
        losses = F.binary_cross_entropy_with_logits(self.scores(x), labels.to(x.dtype), reduction="none")
        return self.weight[labels] * losses

    def scores(self, x: Tensor) -> Tensor:
        """Log-odds of the booster."""
        for tensor in (x, self.threshold):
            if tensor.dtype.itemsize < 4:
                raise SettingError(
                    f"trainer.precision rounds features or thresholds to {tensor.dtype}, too coarse for trees: set it "
                    "to 32-true"
                )
        roots = torch.arange(int(self.used), device=x.device) * self.value.shape[1]
        node = roots.expand(len(x), -1)
        while True:
            goes_right = x.gather(1, self.feature.take(node)) > self.threshold.take(node)
            below = self.next_node.take(2 * node + goes_right)
            if torch.equal(below, node):
                return self.baseline + self.value.take(node).sum(1)
            node = below

    def _copy(self, booster: HistGradientBoostingClassifier) -> None:
        """Take over the trees, which scikit-learn has no public name for; :meth:`_check` compares the scores."""
        try:
            trees = [predictor.nodes for (predictor,) in booster._predictors]
            baseline = float(booster._baseline_prediction.item())
            for index, nodes in enumerate(trees):
                self._copy_tree(index, nodes)
        except (AttributeError, ValueError, TypeError) as error:
            raise SettingError(_unknown_trees()) from error
        self.baseline.fill_(baseline)

    def _copy_tree(self, index: int, nodes: Any) -> None:
        own, leaf = np.arange(len(nodes)), nodes["is_leaf"].astype(bool)
        children = np.where(leaf, own, np.stack([nodes["left"], nodes["right"]])).T + index * self.value.shape[1]
        # x is float32, so x <= t holds for the same x if t is rounded down to float32
        threshold = nodes["num_threshold"].astype(np.float32)
        rounded_up = threshold > nodes["num_threshold"]
        threshold[rounded_up] = np.nextafter(threshold[rounded_up], np.float32(-np.inf))
        for tensor, values in (
            (self.feature, np.where(leaf, 0, nodes["feature_idx"])),
            (self.threshold, np.where(leaf, 0, threshold)),
            (self.next_node, children),
            (self.value, np.where(leaf, nodes["value"], 0)),
        ):
            tensor[index, : len(nodes)] = torch.as_tensor(values.astype(np.float64)).to(tensor)

    def _check(self, booster: HistGradientBoostingClassifier, x: Tensor) -> None:
        """Compare the scores after all trees with the booster's own."""
        self.used.fill_(len(self.value))
        found, wanted = self.scores(x).cpu().double(), torch.as_tensor(booster.decision_function(x.cpu().numpy()))
        self.used.zero_()
        if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-4):
            raise SettingError(_unknown_trees())


def _unknown_trees() -> str:
    return (
        f"detector is Boosting, and scikit-learn {sklearn.__version__} keeps its trees in a way that this version of "
        "imbsam does not know: install scikit-learn 1.6 to 1.9"
    )
