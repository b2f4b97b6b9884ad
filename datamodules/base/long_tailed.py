"""The settings, splits and loaders that all long-tailed data sets share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from datamodules.base.data_module import RecordedDataModule
from datamodules.base.long_tail import Profile, check_imbalance, imbalanced_class_counts
from datamodules.base.pixels import PixelInput
from datamodules.sampling.class_sampling import ClassSampling, Sampling, class_probabilities
from datamodules.sampling.loaders import EvalLoader, TrainLoader, eval_loader, train_loader
from datamodules.sampling.mixing import MixedBatches
from datamodules.sampling.samplers import ranks
from datamodules.sampling.stratified import first_samples, held_out_mask, subsample
from imbsam.checks import check_choice, check_interval, check_whole_numbers
from imbsam.errors import SettingError

Draw = Literal["random", "first"]


class LongTailedDataModule(RecordedDataModule, ABC):
    """A classification data set whose training part is cut down to a long tail.

    A subclass says where the samples come from (:meth:`load_datasets`) and how they are collated (``train_collate``,
    ``eval_collate``). Batches are ``(inputs, labels)`` with int64 labels of shape (B,).

    Attributes:
        class_counts: Training samples per class after the validation split, int64 (C,); known after
            ``setup``, whatever its stage.
        class_names: The C names of the classes; known after ``setup``.
        kept_samples: Indices of the long tail's samples in the whole training set, including those held out for
            validation, int64 (M,); known after ``setup``.
        group_counts: The class counts that decide many, medium and few, int64 (C,), or None for ``class_counts``; known
            after ``setup``.
        shuffle_classes: Whether ``seed`` deals the class counts to the classes; otherwise class 0 has the most.
        predict: What to predict, if the data set takes samples from outside; None for its test samples.
        own_validation: Whether the data set comes with validation samples, so that ``val_share`` must be 0.
        train_collate: ``collate_fn`` of the training loader, None for PyTorch's own. One with an argument ``seeds``
            gets a seed for each sample, int64 (B,), that depends on (seed, epoch, sample) alone.
        eval_collate: ``collate_fn`` of the other loaders, None for PyTorch's own.

    Args:
        ratio: Imbalance ratio, largest class / smallest class, at least 1.
        profile: How the class counts fall: "exponential", "step" (half of the classes frequent, half rare),
            or "none" (keeps every training sample and ignores the ratio).
        val_share: Share of the long-tailed training samples to hold out for validation, in [0, 1). With 0
            there is no validation: nothing is ever selected on the test set.
        batch_size: Samples in a training batch.
        eval_batch_size: Samples in a validation, test or prediction batch.
        num_workers: Loader processes; with 0 the batches are made in the main process.
        sampling: How often training draws each class: "instance_balanced" (every sample once an epoch),
            "class_balanced" (all classes alike), "square_root" (as the roots of the class counts), or
            "progressively_balanced" (from the first to the second over the trainer's ``max_epochs``). Every epoch has
            as many draws as there are samples.
        mixup: alpha of mixup's Beta distribution, 0 for no mixup. Each sample is mixed with its neighbour in the batch.
        cutmix: alpha of CutMix's, 0 for no CutMix. With both set, each batch takes one of them at random.
        seed: Seed of the draw of the training samples and of the validation split.
        draw: Which samples of a class the long tail keeps: "random", drawn with the seed, or "first", the first in the
            order of the data set's files, as the code of the ImbSAM authors takes those of CIFAR-100. Ignored where the
            profile is "none".
        groups_of_ratio: Many, medium and few go by the class counts of this imbalance ratio and not by the training's;
            the literature's groups of CIFAR-100-LT at ratio 50 and 10 are those of ratio 100.

    Raises:
        SettingError: A setting is out of range.
    """

    class_counts: Tensor
    class_names: list[str]
    kept_samples: Tensor
    group_counts: Tensor | None = None
    shuffle_classes: bool = False
    predict: Any = None
    own_validation: bool = False
    train_collate: Callable[..., Any] | None = None
    eval_collate: Callable[[Any], Any] | None = None

    def __init__(
        self,
        ratio: float = 100,
        profile: Profile = "exponential",
        val_share: float = 0.0,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        sampling: Sampling = "instance_balanced",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        seed: int = 0,
        groups_of_ratio: float | None = None,
        draw: Draw = "random",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # the subclasses' arguments too
        check_imbalance(ratio, profile)
        check_interval("[0, 1)", val_share=val_share)
        check_choice(Sampling, sampling=sampling)
        check_choice(Draw, draw=draw)
        check_interval("[0, inf)", mixup=mixup, cutmix=cutmix)
        check_whole_numbers(batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_whole_numbers(0, num_workers=num_workers)
        self.ratio = ratio
        self.profile = profile
        self.val_share = val_share
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.sampling: Sampling = sampling
        self.mixup = mixup
        self.cutmix = cutmix
        self.seed = seed
        self.groups_of_ratio = groups_of_ratio
        self.draw: Draw = draw
        self._train_labels: Tensor
        self._largest: int
        self._rank_of_class: Tensor
        self._train: Dataset[Any] | None = None
        self._val: Dataset[Any] | None = None
        self._test: Dataset[Any] | None = None
        self.check_validation()

    @abstractmethod
    def load_datasets(self) -> tuple[Dataset[Any], Tensor, Dataset[Any]]:
        """Read the whole data set and set ``class_names``.

        Returns:
            The map-style training set before any subsampling, its labels, int64 (N,) in [0, C), and the
            map-style test set.
        """

    def validation_set(self) -> Dataset[Any] | None:
        """The data set's own validation samples, asked for after :meth:`load_datasets`; None if it has none."""
        return None

    def select(self, dataset: Any, indices: Tensor, training: bool) -> Dataset[Any]:
        """The samples of the training set at these indices, int64 (M,), for training or for validation."""
        return Subset(dataset, indices.tolist())

    def setup(self, stage: str | None = None) -> None:
        """Draw the training and validation samples, the same ones on every rank; a second call does nothing.

        Args:
            stage: Lightning's stage. All need the class counts, so all do the same, except "predict" on samples from
                outside: a trained model knows its classes, and nothing is read.

        Raises:
            SettingError: A label is outside the classes, the ratio leaves a class without a sample, or ``val_share`` is
                not 0 and the data set has validation samples of its own.
        """
        if self._train is not None or (stage == "predict" and self.predict is not None):
            return
        train, labels, self._test = self.load_datasets()
        self.check_validation()
        num_classes = len(self.class_names)
        if outside := sorted(set(labels.tolist()) - set(range(num_classes))):
            raise SettingError(
                f"{type(self).__name__}: training labels {outside} are outside [0, {num_classes}): "
                "name every class in class_names, in the order of the labels"
            )
        generator = torch.Generator().manual_seed(self.seed)
        kept = torch.arange(len(labels))
        if self.profile != "none":
            self._largest = int(torch.bincount(labels, minlength=num_classes).min())
            self._rank_of_class = torch.arange(num_classes)
            if self.shuffle_classes:
                self._rank_of_class = torch.randperm(num_classes, generator=generator)
            counts = self.counts_of_ratio(self.ratio)
            kept = first_samples(labels, counts) if self.draw == "first" else subsample(labels, counts, generator)
        if self.groups_of_ratio is not None:
            try:
                self.group_counts = self.counts_of_ratio(self.groups_of_ratio)
            except SettingError as error:
                raise SettingError(f"groups_of_ratio is {self.groups_of_ratio:g}: {error}") from error
        self.kept_samples = kept
        held_out = held_out_mask(labels[kept], self.class_names, generator, val_share=self.val_share)
        self._val = self.validation_set() if self.own_validation else self.select(train, kept[held_out], training=False)
        self._train = self.select(train, kept[~held_out], training=True)
        self._train_labels = labels[kept[~held_out]]
        self.class_counts = torch.bincount(self._train_labels, minlength=num_classes)

    def counts_of_ratio(self, ratio: float) -> Tensor:
        """The class counts that another imbalance ratio would give, before a validation split; after ``setup``.

        Args:
            ratio: Largest class / smallest class, at least 1.

        Returns:
            int64 tensor of shape (C,); with ``ratio`` itself those of :attr:`kept_samples`.

        Raises:
            SettingError: The data set is not cut down to a ratio, or the ratio leaves a class without a sample.
        """
        if self.profile == "none":
            raise SettingError(
                f"{type(self).__name__} keeps every training sample (profile is none) and so has no ratio: leave it out"
            )
        counts = imbalanced_class_counts(self._largest, len(self._rank_of_class), ratio, self.profile)
        return torch.tensor(counts)[self._rank_of_class]

    @property
    def only_predicts(self) -> bool:
        """Whether the trainer predicts samples from outside, so that none of the data set's files are needed."""
        return self.predict is not None and self.trainer is not None and self.trainer.predicting

    @property
    def pixels(self) -> PixelInput | None:
        """How an evaluation makes its inputs of pixels, for ``imbsam export``; None if that is not known."""
        mean, std = (getattr(self.eval_collate, name, None) for name in ("mean", "std"))
        if mean is None or std is None:
            return None
        return PixelInput(tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()))

    @property
    def drawn_shares(self) -> Tensor:
        """Each class's share of the training draws, float64 (C,), averaged over the run."""
        return class_probabilities(self.class_counts, self.sampling, progress=0.5)

    def check_validation(self) -> None:
        """Raise a :class:`SettingError` for a ``val_share`` if the data set has validation samples of its own."""
        if self.own_validation and self.val_share:
            raise SettingError(
                f"val_share is {self.val_share}, but {type(self).__name__} has validation samples of its own here: "
                "leave it at 0"
            )

    def train_dataloader(self) -> TrainLoader:
        """The shuffled training batches; the last one may be smaller.

        Order and augmentation depend only on the seed of ``seed_everything`` and the epoch.

        Raises:
            SettingError: Progressively balanced sampling without a trainer that has ``max_epochs``.
        """
        train, order = self._loaded(self._train), None
        collate = _collate_of(train, self.train_collate)
        if self.sampling != "instance_balanced":
            order = ClassSampling(self._train_labels, self.sampling, getattr(self.trainer, "max_epochs", None))
        if self.mixup or self.cutmix:
            collate = MixedBatches(collate or default_collate, len(self.class_names), self.mixup, self.cutmix)
        return train_loader(train, self.batch_size, collate, self.num_workers, **ranks(self.trainer), order=order)

    def train_eval_dataloader(self) -> EvalLoader:
        """All training samples in order and without augmentation, on every process, for measurements on them."""
        return self._in_order(self._loaded(self._train))

    def val_dataloader(self) -> EvalLoader | list[Any]:
        """The validation batches, or an empty list if nothing is held out and the data set has none of its own."""
        return self._eval_loader(self._val) if self.val_share or self.own_validation else []

    def test_dataloader(self) -> EvalLoader:
        """The test batches, in order."""
        return self._eval_loader(self._test)

    def predict_dataloader(self) -> EvalLoader:
        """The test batches again."""
        return self.test_dataloader()

    def _eval_loader(self, dataset: Dataset[Any] | None) -> EvalLoader:
        return self._in_order(self._loaded(dataset), **ranks(self.trainer))

    def _in_order(self, dataset: Dataset[Any], **share: int) -> EvalLoader:
        collate = _collate_of(dataset, self.eval_collate)
        return eval_loader(dataset, self.eval_batch_size, collate, self.num_workers, **share)


def _collate_of(dataset: Dataset[Any], collate: Any) -> Any:
    """Images that are decoded once and kept bring their own."""
    return getattr(dataset, "collate", collate)
