"""scikit-learn estimators for tabular data with a rare class: a small network trained by `imbsam`'s backward pass."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, OutlierMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_array, check_consistent_length, check_random_state, compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from imbsam import deep_sad
from imbsam.checks import check_numbers, check_whole_numbers
from imbsam.class_groups import tail_mask
from imbsam.errors import SettingError
from imbsam.losses import CrossEntropy, LogitAdjusted
from imbsam.sam import SAM, ClassAwareSAM, ImbSAM, Plain

__all__ = ["ImbSAMClassifier", "ImbSAMOutlierDetector"]

Method = Literal["sgd", "sam", "imbsam"]
Array = NDArray[Any]

MIN_SAMPLES = 5
"""Fewer are refused: nothing can be learned from so few, and a slicing mistake is more likely."""

CHUNK = 65536
"""Samples predicted at once, so that a long table needs little memory."""


class _NetworkEstimator(BaseEstimator):  # type: ignore[misc]
    """Shared by both estimators: data checks, standardised columns, the training loop."""

    def _table(self, X: Any, y: Any = "no_validation", **checks: Any) -> Any:
        """X as float64 (N, F), with y if given, by scikit-learn's own checks."""
        try:
            return validate_data(self, X, y, dtype=np.float64, **checks)
        except ValueError as error:
            if "could not convert string to float" not in str(error):
                raise
            text = X.select_dtypes(exclude=["number", "bool"]).columns.tolist() if hasattr(X, "select_dtypes") else []
            where = f"columns {text}" if text else str(error).splitlines()[0]
            raise SettingError(
                f"X holds text ({where}): encode it first, for example by OneHotEncoder in a ColumnTransformer"
            ) from error

    def _check_settings(self) -> list[int]:
        """The layers' widths; refuses what cannot work, at fit, since scikit-learn sets parameters one by one."""
        _one_of("method", self.method, "sgd", "sam", "imbsam")
        check_numbers(above=True, learning_rate=self.learning_rate)
        check_numbers(weight_decay=self.weight_decay)
        if isinstance(self.hidden_layer_sizes, str) or not isinstance(self.hidden_layer_sizes, Sequence | np.ndarray):
            raise SettingError(f"hidden_layer_sizes is {self.hidden_layer_sizes!r}: give a tuple, such as (64, 32)")
        sizes = tuple(self.hidden_layer_sizes)
        check_whole_numbers(max_epochs=self.max_epochs, batch_size=self.batch_size, hidden_layer_sizes=sizes)
        return [int(size) for size in sizes]

    def _build(
        self, table: Array, outputs: Sequence[int], bias: bool, activation: type[nn.Module] = nn.ReLU
    ) -> tuple[nn.Sequential, Tensor, torch.Generator]:
        """An untrained perceptron and its standardised inputs, both on the device, and the generator that shuffles."""
        # our own generator: the global ones are neither read nor advanced
        generator = torch.Generator().manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
        self.scaler_ = StandardScaler().fit(table)
        layers: list[nn.Module] = []
        for width, size in zip([table.shape[1], *outputs], outputs, strict=False):
            linear = nn.utils.skip_init(nn.Linear, width, size, bias=bias, dtype=torch.float32)  # type: ignore[no-untyped-call]
            layers += [linear, activation()]
        network = nn.Sequential(*layers[:-1])
        deep_sad.initialise(network, generator)
        inputs = torch.from_numpy(self.scaler_.transform(table)).float()
        try:
            return network.to(self.device), inputs.to(self.device), generator
        except (RuntimeError, AssertionError, TypeError) as error:  # torch has no one exception for it
            reason = str(error).splitlines()[0]
            raise SettingError(f"device is {self.device!r}: torch cannot use it here ({reason}); give cpu") from error

    def _train(
        self,
        engine: ClassAwareSAM,
        losses: Callable[[Tensor], Tensor],
        targets: Tensor,
        generator: torch.Generator,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        """Run the epochs; `losses` maps indices of training samples to their losses, `targets` stays on the CPU."""
        network: Any = engine.module
        device = next(network.parameters()).device
        self.loss_curve_: list[float] = []
        for epoch in range(1, self.max_epochs + 1):
            total = torch.zeros((), device=device)
            for batch in torch.split(torch.randperm(len(targets), generator=generator), self.batch_size):
                index = batch.to(device)

                def batch_losses(rows: Tensor, index: Tensor = index) -> Tensor:
                    return losses(index[rows])

                total += len(batch) * engine.backward(batch_losses, targets[batch])
                optimizer.step()
                optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
            self.loss_curve_.append(float(total) / len(targets))
            if not math.isfinite(self.loss_curve_[-1]):
                raise SettingError(
                    f"learning_rate is {self.learning_rate}: the training loss became {self.loss_curve_[-1]} in epoch "
                    f"{epoch}; give a smaller one"
                )
            if self.verbose:
                print(f"epoch {epoch}/{self.max_epochs}: training loss {self.loss_curve_[-1]:.4f}")
        # float64 on the CPU: a prediction does not depend on the batch, and a pickle needs no GPU
        self.network_ = network.cpu().double().requires_grad_(False)

    def _checked(self, X: ArrayLike) -> Array:
        """A table to predict, once the estimator is fitted."""
        check_is_fitted(self)
        table: Array = self._table(X, reset=False)
        return table

    def _outputs(self, table: Array) -> Tensor:
        """The network's outputs for a checked table, float64."""
        inputs = torch.from_numpy(self.scaler_.transform(table))
        return torch.cat([self.network_(rows) for rows in torch.split(inputs, CHUNK)])


class ImbSAMClassifier(ClassifierMixin, _NetworkEstimator):  # type: ignore[misc]
    r"""Multilayer perceptron for tabular data with rare classes, perturbed along the gradient of the tail alone.

    Columns are standardised by the training samples' mean and standard deviation. Training is SGD with momentum 0.9 and
    a cosine schedule over all ``max_epochs``, without early stopping: ImbSAM counters the overfitting of rare classes,
    which shows only once the training loss is near 0 (``loss_curve_``). Predictions are computed in float64 on the CPU.

    Args:
        method: how the gradient is computed: sgd (plain training), sam (Foret et al., ICLR 2021) or imbsam (Zhou et
            al., ICCV 2023).
        rho: length of the perturbation, from 0.
        eta: classes with fewer than eta training samples are tail classes. None: those smaller than the mean class
            size, which is the rare class of two. Used only by imbsam.
        hidden_layer_sizes: width of each hidden layer; ``()`` is logistic regression.
        loss: cross_entropy, or logit_adjusted (Menon et al., ICLR 2021, tau 1), whose probabilities are those for
            equally frequent classes.
        class_weight: weight of each class's loss: ``{label: weight}``, balanced (inversely proportional to the
            class's samples) or None. Together with ``sample_weight`` the weights are scaled to mean 1 over the training
            samples, so that ``learning_rate`` keeps its meaning.
        learning_rate: initial learning rate of SGD, above 0.
        weight_decay: L2 penalty, from 0.
        max_epochs: passes over the training samples.
        batch_size: samples per step.
        random_state: seed of the initial weights and of the order of the samples.
        device: where the training runs: cpu, cuda, ...
        verbose: print the training loss after every epoch.

    Attributes:
        classes_: labels, sorted, shape (C,).
        class_counts_: training samples of each class, int64 (C,).
        tail_classes_: labels of the tail classes.
        loss_curve_: mean training loss of each epoch, at the unperturbed weights.
        network_: the trained ``torch.nn.Sequential``; takes standardised inputs.
        scaler_: the ``StandardScaler`` of the columns.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

    Example:
        >>> X, y = np.random.default_rng(0).normal(size=(60, 3)), np.repeat(["common", "rare"], [54, 6])
        >>> X[y == "rare"] += 2
        >>> model = ImbSAMClassifier(max_epochs=5, random_state=0).fit(X, y)
        >>> model.tail_classes_, model.predict_proba(X).shape
        (array(['rare'], dtype='<U6'), (60, 2))
    """

    def __init__(
        self,
        method: Method = "imbsam",
        rho: float = 0.05,
        eta: float | None = None,
        hidden_layer_sizes: Sequence[int] = (64,),
        loss: Literal["cross_entropy", "logit_adjusted"] = "cross_entropy",
        class_weight: Literal["balanced"] | Mapping[Any, float] | None = None,
        learning_rate: float = 0.05,
        weight_decay: float = 1e-4,
        max_epochs: int = 100,
        batch_size: int = 64,
        random_state: Any = None,
        device: str | torch.device = "cpu",
        verbose: bool = False,
    ) -> None:
        self.method = method
        self.rho = rho
        self.eta = eta
        self.hidden_layer_sizes = hidden_layer_sizes
        self.loss = loss
        self.class_weight = class_weight
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> "ImbSAMClassifier":
        """Train on a table.

        Args:
            X: finite numbers, shape (N, F), N at least 5.
            y: labels, shape (N,), of at least two classes.
            sample_weight: weight of each sample's loss, shape (N,), from 0. A sample of weight 0 is left out.

        Returns:
            The estimator itself.

        Raises:
            ValueError: for a table that scikit-learn refuses (nan, infinity, text, shapes).
            SettingError: a ValueError, for a setting that cannot work, or a single class.

        Warns:
            UserWarning: if imbsam has no tail class, or only tail classes.
        """
        hidden = self._check_settings()
        _one_of("loss", self.loss, "cross_entropy", "logit_adjusted")
        table, labels = self._table(X, y, ensure_min_samples=MIN_SAMPLES)
        check_classification_targets(labels)
        weight = np.ones(len(table)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        weight = check_array(np.full(len(table), weight) if weight.ndim == 0 else weight, ensure_2d=False)
        if weight.ndim != 1:
            raise SettingError(f"sample_weight has shape {weight.shape}: give one number per sample")
        check_consistent_length(table, weight)
        if (weight < 0).any():
            raise SettingError(f"sample_weight has {weight.min()}: give numbers from 0")
        if not weight.any():
            raise SettingError("sample_weight is zero for every sample: give at least two classes some weight")
        table, labels, weight = table[weight > 0], labels[weight > 0], weight[weight > 0]
        self.classes_, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
        if len(self.classes_) < 2:
            only = self.classes_.tolist()[0]
            raise SettingError(f"y has a single class, {only!r}: give samples of at least two classes")
        weight = weight * compute_class_weight(self.class_weight, classes=self.classes_, y=labels)[codes]
        weight = weight / weight.mean()
        eta = float(counts.mean()) if self.eta is None else self.eta
        self.class_counts_ = counts
        self.tail_classes_ = self.classes_[tail_mask(counts.tolist(), eta).numpy()]

        network, inputs, generator = self._build(table, [*hidden, len(self.classes_)], bias=True)
        engine: ClassAwareSAM
        if self.method == "imbsam":
            engine = ImbSAM(network, counts.tolist(), eta=eta, rho=self.rho)
        else:
            engine = SAM(network, rho=self.rho) if self.method == "sam" else Plain(network)
        targets = torch.from_numpy(codes)
        classes, weights = targets.to(self.device), torch.from_numpy(weight).float().to(self.device)
        loss = CrossEntropy() if self.loss == "cross_entropy" else LogitAdjusted(counts.tolist()).to(self.device)

        def losses(index: Tensor) -> Tensor:
            row_losses: Tensor = weights[index] * loss(network(inputs[index]), classes[index])
            return row_losses

        optimizer = torch.optim.SGD(
            network.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.max_epochs)
        self._train(engine, losses, targets, generator, optimizer, schedule)
        return self

    def predict_proba(self, X: ArrayLike) -> Array:
        """Probabilities of the classes in the order of ``classes_``, float64 (N, C)."""
        probabilities: Array = self._outputs(self._checked(X)).softmax(dim=1).numpy()
        return probabilities

    def predict(self, X: ArrayLike) -> Array:
        """The most probable label of each sample, shape (N,)."""
        best = self.predict_proba(X).argmax(axis=1)  # first: it raises where the estimator is not fitted
        labels: Array = self.classes_[best]
        return labels


class ImbSAMOutlierDetector(OutlierMixin, _NetworkEstimator):  # type: ignore[misc]
    r"""Semi-supervised outlier detection: DeepSAD, with the labelled anomalies as the tail.

    A network without biases pulls the samples towards a centre and pushes the few labelled anomalies away, by
    :class:`imbsam.deep_sad.DeepSADObjective`. Network, objective, scaling, optimizer (Adam) and budget are those of
    ``configs/detector/deep_sad.yaml`` without a validation set. Without labelled anomalies it is one-class Deep
    SVDD (Ruff et al., ICML 2018), where imbsam has nothing to perturb; a warning says so. Columns are standardised by
    the training samples.

    Args:
        method: sgd (plain training), sam, or imbsam (only the labelled anomalies are sharp).
        rho: length of the perturbation, from 0.
        anomaly_weight: weight of a labelled anomaly's loss, above 0.
        contamination: fraction of the training samples, labelled anomalies included, that ``predict`` calls outliers,
            in (0, 0.5]. It sets ``offset_`` and nothing else.
        hidden_layer_sizes: width of each layer; the last is the output's.
        learning_rate: learning rate of Adam, above 0.
        weight_decay: L2 penalty, from 0.
        max_epochs: passes over the training samples.
        batch_size: samples per step.
        random_state: seed of the initial weights and of the order of the samples.
        device: where the training runs: cpu, cuda, ...
        verbose: print the training loss after every epoch.

    Attributes:
        offset_: ``decision_function`` is ``score_samples`` minus this.
        n_anomalies_: number of labelled anomalies.
        objective_: the fitted :class:`imbsam.deep_sad.DeepSADObjective`, with centre and spread.
        loss_curve_, network_, scaler_, n_features_in_, feature_names_in_: as in :class:`ImbSAMClassifier`.

    Source:
        Ruff et al., *Deep Semi-Supervised Anomaly Detection*, ICLR 2020, arXiv 1906.02694: the Deep SAD objective.

    Example:
        >>> X, y = np.random.default_rng(0).normal(size=(60, 3)), np.repeat([1, -1], [54, 6])
        >>> X[y == -1] += 4
        >>> model = ImbSAMOutlierDetector(max_epochs=5, random_state=0).fit(X, y)
        >>> model.n_anomalies_, model.predict(X).shape
        (6, (60,))
    """

    def __init__(
        self,
        method: Method = "imbsam",
        rho: float = 0.05,
        anomaly_weight: float = 1.0,
        contamination: float = 0.1,
        hidden_layer_sizes: Sequence[int] = (*deep_sad.HIDDEN, deep_sad.CODE_SIZE),
        learning_rate: float = deep_sad.LEARNING_RATE,
        weight_decay: float = deep_sad.WEIGHT_DECAY,
        max_epochs: int = deep_sad.PASSES,
        batch_size: int = deep_sad.BATCH_SIZE,
        random_state: Any = None,
        device: str | torch.device = "cpu",
        verbose: bool = False,
    ) -> None:
        self.method = method
        self.rho = rho
        self.anomaly_weight = anomaly_weight
        self.contamination = contamination
        self.hidden_layer_sizes = hidden_layer_sizes
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: ArrayLike | None = None) -> "ImbSAMOutlierDetector":
        """Train on a table.

        Args:
            X: finite numbers, shape (N, F), N at least 5.
            y: -1 for a known anomaly, any other number for an unlabelled or normal sample, shape (N,). None: no
                sample is labelled.

        Returns:
            The estimator itself.

        Raises:
            ValueError: for a table that scikit-learn refuses (nan, infinity, text, shapes).
            SettingError: a ValueError, for a setting that cannot work, or if all samples are anomalies.

        Warns:
            UserWarning: if no sample is labelled as an anomaly.
        """
        hidden = self._check_settings()
        if not hidden:
            raise SettingError("hidden_layer_sizes is empty: give at least the width of the detector's output")
        check_numbers(above=True, anomaly_weight=self.anomaly_weight, contamination=self.contamination)
        if self.contamination > 0.5:
            raise SettingError(f"contamination is {self.contamination}: give a fraction above 0, up to 0.5")
        if y is None:
            table = self._table(X, ensure_min_samples=MIN_SAMPLES)
            anomaly = np.full(len(table), False)
        else:
            table, labels = self._table(X, y, ensure_min_samples=MIN_SAMPLES)
            anomaly = np.asarray(labels == -1)
        self.n_anomalies_ = int(anomaly.sum())
        if anomaly.all():
            raise SettingError("y is -1 (anomaly) for every sample: give unlabelled or normal ones too")
        if not anomaly.any():
            what = "is None" if y is None else f"has no -1 (it has {', '.join(map(str, np.unique(labels)[:4]))})"
            warnings.warn(
                f"y {what}: without a labelled anomaly this is one-class Deep SVDD; mark known anomalies with -1",
                stacklevel=2,
            )

        network, inputs, generator = self._build(table, hidden, bias=False, activation=nn.LeakyReLU)
        sharpness = {"sgd": [0.0, 0.0], "sam": [1.0, 1.0], "imbsam": [0.0, 1.0]}[self.method]
        engine = ClassAwareSAM(network, sharpness_weight=sharpness, rho=self.rho)
        targets = torch.from_numpy(anomaly).long()
        labelled = targets.to(self.device) == 1
        objective = deep_sad.DeepSADObjective(hidden[-1], self.anomaly_weight).to(self.device)
        with torch.no_grad():
            objective.fit(network(inputs))

        def losses(index: Tensor) -> Tensor:
            row_losses: Tensor = objective(network(inputs[index]), labelled[index])
            return row_losses

        optimizer = torch.optim.Adam(
            network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True
        )
        self._train(engine, losses, targets, generator, optimizer)
        self.objective_ = objective.cpu().double()
        self.offset_ = float(np.percentile(self._scores(table), 100 * self.contamination))
        return self

    def score_samples(self, X: ArrayLike) -> Array:
        """Minus d, the squared distance from the centre, float64 (N,): the lower, the more abnormal."""
        return self._scores(self._checked(X))

    def decision_function(self, X: ArrayLike) -> Array:
        """``score_samples(X) - offset_``, float64 (N,): negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: ArrayLike) -> Array:
        """-1 for outliers and 1 for the others, int64 (N,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _scores(self, table: Array) -> Array:
        scores: Array = -self.objective_.distances(self._outputs(table)).numpy()
        return scores


def _one_of(name: str, value: Any, *choices: str) -> None:
    if value not in choices:
        raise SettingError(f"{name} is {value!r}: give {', '.join(choices[:-1])} or {choices[-1]}")
