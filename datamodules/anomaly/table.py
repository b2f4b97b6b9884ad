"""Semi-supervised anomaly detection on tables: an npz, CSV or Parquet file, or scikit-learn's digits."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.anomaly.base import SemiSupervisedDataModule, check_share
from datamodules.anomaly.batches import BatchLoader, Sampling, ordered_batches
from datamodules.anomaly.labels import anomaly_labels
from datamodules.anomaly.split import split_rows
from datamodules.tables.encoding import Scaling, TableEncoder
from datamodules.tables.reading import Table, read_table
from imbsam.errors import SettingError
from imbsam.messages import first_few


class AnomalyDataModule(SemiSupervisedDataModule):
    """A table in which some rows are anomalies, and the labels of some of those are known.

    For prediction every row of ``predict`` (or of ``path``) is scored, in the order of the file, and no label column is
    needed; the scaling is the training file's and comes from the checkpoint.

    Attributes:
        num_features: Features d of a row.
        feature_names: Their d names.

    Args:
        path: An npz file (arrays ``X`` and ``y``), a CSV or a Parquet file; null for scikit-learn's digits, where
            a 0 is an anomaly. A CSV file may be separated by commas, semicolons or tabs.
        label: Column that says which rows are anomalies; null is ``y`` of an npz file.
        anomaly_value: The anomalies' value in that column; null is 1 beside 0, true beside false, or the rarer of two.
        drop_columns: Columns to leave out, for example identifiers.
        labelled_share: Share of the training anomalies that the detector is told of, in (0, 1]; the others hide among
            the unlabelled rows. As many of the validation anomalies are known to the validation loss. Null is 1 for CSV
            and Parquet, and 0.1 for the benchmarks, npz and digits.
        test_share: Share of the rows to test on, in (0, 1).
        val_share: Share of the training part to hold out for validation, in [0, 1).
        min_rows: Resample a smaller table with replacement to this many rows (ADBench: 1000; the same row may then be
            in training and in test); 0 for never.
        max_rows: Cut a larger table to this many rows (ADBench: 10000); null for never.
        scaling: How columns of numbers are scaled, see :class:`~datamodules.tables.encoding.TableEncoder`: standard,
            robust, quantile, min_max or none.
        sampling: How training rows are drawn: natural, balanced, pairs or natural_pairs.
        batch_size: Rows, or pairs, of a training batch.
        batches_per_epoch: Training batches of an epoch, or null for as many as the training rows fill.
        eval_batch_size: Rows of a validation, test or prediction batch.
        seed: Seed of every draw.
        predict: A new file to predict, of the same kinds; null for ``path`` itself.

    Raises:
        SettingError: A setting is outside its range, or the file cannot be used; the message names the column.
    """

    num_features: int
    feature_names: list[str]

    def __init__(
        self,
        path: str | Path | None = None,
        label: str | None = None,
        anomaly_value: str | float | None = None,
        drop_columns: Sequence[str] = (),
        labelled_share: float | None = None,
        test_share: float = 0.3,
        val_share: float = 0.0,
        min_rows: int = 0,
        max_rows: int | None = None,
        scaling: Scaling = "standard",
        sampling: Sampling = "natural",
        batch_size: int = 512,
        batches_per_epoch: int | None = None,
        eval_batch_size: int = 8192,
        seed: int = 0,
        predict: str | Path | None = None,
    ) -> None:
        path, predict = (None if p is None else os.fspath(p) for p in (path, predict))  # checkpoints refuse a Path
        drop_columns = list(drop_columns)
        super().__init__(sampling, batch_size, batches_per_epoch, eval_batch_size, val_share, seed)
        self.path = None if path is None else Path(path).expanduser()
        self.predict = None if predict is None else Path(predict).expanduser()
        if labelled_share is None:
            labelled_share = 1.0 if self.path and self.path.suffix.lower() != ".npz" else 0.1
        check_share("labelled_share", labelled_share)
        check_share("test_share", test_share, zero_allowed=True)
        if test_share == 0:
            raise SettingError("test_share=0: a detector that is never tested is worth little; pass 0.3")
        if min_rows < 0 or (max_rows is not None and max_rows < max(min_rows, 1)):
            raise SettingError(
                f"min_rows={min_rows}, max_rows={max_rows}: pass 0 and null, or 1000 and 10000 for ADBench"
            )
        if scaling not in get_args(Scaling):
            raise SettingError(f"scaling is {scaling!r}: choose one of {', '.join(get_args(Scaling))}")
        self.scaling = scaling
        self.label = label
        self.anomaly_value = anomaly_value
        self.drop_columns = drop_columns
        self.labelled_share = labelled_share
        self.test_share = test_share
        self.min_rows = min_rows
        self.max_rows = max_rows
        self._encoder: TableEncoder | None = None
        self._marked_by: str | None = None
        self._parts: dict[str, Table] = {}
        self._true_labels: dict[str, Tensor] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the file, split it, and fit the scaling on the training part.

        Args:
            stage: Lightning's stage. All but "predict" do the same; a second call does nothing. For prediction the
                file is read later: which columns are needed stands in the checkpoint, which Lightning loads after this.
        """
        if stage == "predict" or self._parts:
            return
        table = self._read(self.path)
        column = self.label or "y"
        anomalous, value = anomaly_labels(table.labels, column, table.source, self.anomaly_value)
        self._marked_by = value
        split = split_rows(
            anomalous,
            table.source,
            labelled_share=self.labelled_share,
            test_share=self.test_share,
            val_share=self.val_share,
            min_rows=self.min_rows,
            max_rows=self.max_rows,
            seed=self.seed,
        )
        for name, rows in (("train", split.train), ("val", split.val), ("test", split.test)):
            if len(rows):
                self._parts[name] = table.take(rows)
                self._true_labels[name] = torch.from_numpy(anomalous[rows]).long()
        self._val_known = torch.from_numpy(split.val_labelled).long()
        self._learn_labels(torch.from_numpy(split.labelled))
        self._encode(TableEncoder(self._parts["train"], self.scaling))
        assert self._encoder is not None
        unlabelled, labelled = self.class_counts.tolist()
        hidden = int(self.train_true_labels.sum()) - labelled
        others = f" and {hidden:,} hidden ones" if self.labelled_share < 1 else ""
        held_out = ", ".join(
            f"{name} {len(labels):,} rows with {int(labels.sum()):,} anomalies"
            for name, labels in self._true_labels.items()
            if name != "train"
        )
        for notice in self._encoder.notices:
            rank_zero_info(f"{table.source}: {notice}")
        rank_zero_info(
            f"{table.source}: anomalies have {column} = {value}; training {unlabelled + labelled:,} rows, {labelled:,} "
            f"labelled anomalies{others}; {held_out}; {self.num_features:,} features"
        )

    @property
    def train_true_labels(self) -> Tensor:
        """True labels of the training rows (N,), for benchmarks: training is told of ``train_labels`` only."""
        return self._true_labels["train"]

    def predict_dataloader(self) -> BatchLoader:
        """Every row of the file, in its order, x alone; of its columns only those that training used are read."""
        if self._encoder is None:
            raise SettingError(
                "there is no scaling to score with: pass ckpt_path, the checkpoint of a trained detector"
            )
        table = self._read(self.predict or self.path, self._encoder.columns)
        features = self._encoder.transform(table)
        if unseen := self._encoder.unseen(features):
            rank_zero_info(f"{table.source}: values that training did not see in: {first_few(unseen, 10)}")
        return ordered_batches(features, None, self.eval_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """The fitted scaling and the anomalies' value, plain data; Lightning keeps it in the checkpoint."""
        return (
            {} if self._encoder is None else {"encoder": self._encoder.state_dict(), "anomaly_value": self._marked_by}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Scale as the checkpoint's training did, whatever file this is.

        Raises:
            SettingError: This file lacks a column that the model was trained on, or other labels are its anomalies.
        """
        value = state_dict.get("anomaly_value")
        if None not in (value, self._marked_by) and value != self._marked_by and self.anomaly_value is None:
            raise SettingError(
                f"label {self.label or 'y'}: the checkpoint's anomalies are marked by {value}, and in {self.path} "
                f"{self._marked_by} is the rarer value: set data.anomaly_value"
            )
        if "encoder" in state_dict:
            self._encode(TableEncoder.from_state_dict(state_dict["encoder"]))

    def _encode(self, encoder: TableEncoder) -> None:
        """Make the features of all parts."""
        self._encoder = encoder
        self.feature_names = encoder.feature_names
        self.num_features = len(self.feature_names)
        features = {name: encoder.transform(table) for name, table in self._parts.items()}
        if not features:
            return
        self.train_features = features["train"]
        self._test = features["test"], self._true_labels["test"]
        if "val" in features:
            self._val = features["val"], self._true_labels["val"], self._val_known

    def _read(self, path: Path | None, only: Collection[str] | None = None) -> Table:
        return _digits() if path is None else read_table(path, self.label, self.drop_columns, only)


def _digits() -> Table:
    """Scikit-learn's 1,797 digits as a table of 64 pixels; a 0 is an anomaly, 178 of them."""
    from sklearn.datasets import load_digits

    pixels, digit = load_digits(return_X_y=True)
    columns = {f"x{i}": pixels[:, i] for i in range(pixels.shape[1])}
    return Table("digits", columns, {}, (digit == 0).astype(float))
