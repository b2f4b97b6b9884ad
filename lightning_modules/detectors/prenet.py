"""PReNet: how anomalous is a pair of samples?"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imbsam.checks import check_whole_numbers
from imbsam.errors import SettingError
from lightning_modules.detectors.detector import Detector, features_of, mlp


class PReNet(Detector):
    r"""Pairwise relation prediction network (Pang, Shen, Jin, van den Hengel, KDD 2023, arXiv 1910.13601).

    A pair's ordinal target is 8 for two labelled anomalies, 4 for one, 0 for none, and

    .. math::
        L = |\, y_{ij} - \phi(x_i, x_j) \,|, \qquad \phi(x_i, x_j) = \eta\,[\psi(x_i); \psi(x_j)]

    with one feature network psi for both and a linear eta. A sample's score is its mean relation to E labelled
    anomalies and E unlabelled samples, drawn once before training:

    .. math::
        s(x) = \frac{1}{2E} \Big[ \sum_{i=1}^{E} \phi(a_i, x) + \sum_{j=1}^{E} \phi(x, u_j) \Big]

    Half of the pairs of every batch have no anomaly in them, a quarter one, a quarter two.

    Args:
        input_shape: (d,).
        hidden: sizes of psi's layers (the paper's has one of 20).
        targets: of pairs with no, one and two labelled anomalies.
        references: E.
    """

    sampling = "pairs"
    uses_pairs = True
    targets: Tensor
    anomalous_references: Tensor
    unlabelled_references: Tensor

    def __init__(
        self,
        input_shape: Sequence[int],
        hidden: Sequence[int] = (20,),
        targets: Sequence[float] = (0.0, 4.0, 8.0),
        references: int = 30,
    ) -> None:
        super().__init__()
        check_whole_numbers(hidden=hidden, references=references)
        if not hidden:
            raise SettingError("hidden is []: PReNet compares features, give at least one size")
        if len(targets) != 3:
            raise SettingError(f"targets is {list(targets)}: give three, for no, one and two anomalies in the pair")
        d = features_of("PReNet", input_shape)
        self.features: nn.Sequential = mlp([d, *hidden])
        self.relation = nn.Linear(2 * hidden[-1], 1)
        self.register_buffer("targets", torch.tensor(targets))
        self.register_buffer("anomalous_references", torch.zeros(references, d))
        self.register_buffer("unlabelled_references", torch.zeros(references, d))

    def prepare(self, x: Tensor, labels: Tensor) -> None:
        """Draw the samples that scores are relative to, with replacement."""
        for label, references in ((1, self.anomalous_references), (0, self.unlabelled_references)):
            candidates = (labels == label).nonzero().squeeze(1)
            if not len(candidates):
                raise SettingError(
                    f"PReNet has no training sample with label {label}: it needs labelled anomalies and unlabelled ones"
                )
            references.copy_(x[candidates[torch.randint(len(candidates), (len(references),), device=x.device)]])

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """Absolute error of the pairs' relations: equation (4) of the paper."""
        psi = self._psi(x.flatten(0, 1)).reshape(len(x), -1)  # the features of both, side by side
        losses: Tensor = (self.targets[labels.sum(dim=1)] - self.relation(psi).squeeze(1)).abs()
        return losses

    def scores(self, x: Tensor) -> Tensor:
        """Mean relation to the references; eta is linear, so their mean features stand for all of them."""
        psi = self._psi(x)
        anomalous = self._psi(self.anomalous_references).mean(dim=0).expand_as(psi)
        unlabelled = self._psi(self.unlabelled_references).mean(dim=0).expand_as(psi)
        both = self.relation(torch.cat([anomalous, psi], dim=1)) + self.relation(torch.cat([psi, unlabelled], dim=1))
        scores: Tensor = both.squeeze(1) / 2
        return scores

    def _psi(self, x: Tensor) -> Tensor:
        psi: Tensor = self.features(x).relu()
        return psi
