"""Semi-supervised anomaly detection on tables: an npz, CSV or Parquet file, or scikit-learn's digits."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.anomaly.base import SemiSupervisedDataModule
from datamodules.anomaly.batches import BatchLoader, in_order
from datamodules.anomaly.labels import anomaly_labels
from datamodules.anomaly.split import split_rows
from datamodules.tables.encoding import Scaling, TableEncoder
from datamodules.tables.reading import Table, read_table
from imbsam.checks import check_choice, check_interval, check_whole_numbers
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
        path: An npz file (arrays ``X`` and ``y``), a CSV (separated by commas, semicolons or tabs) or a Parquet file;
            null for scikit-learn's digits, where a 0 is an anomaly.
        label: Column that says which rows are anomalies; null is ``y`` of an npz file.
        anomaly_value: The anomalies' value in that column; null is 1 of 0 and 1, true of false and true, or else the
            rarer of two.
        drop_columns: Columns to leave out, for example identifiers.
        labelled_share: Share of the training anomalies whose label the detector knows, in (0, 1]; the others hide among
            the unlabelled rows. The validation loss knows the same share of the validation anomalies. Null is 1 for CSV
            and Parquet, and 0.1 for the benchmarks, npz and digits.
        test_share: Share of the rows to test on, in (0, 1).
        min_rows: Resample a smaller table with replacement to this many rows (ADBench: 1000; the same row may then be
            in training and in test); 0 for never.
        max_rows: Subsample a larger table to this many rows (ADBench: 10000); null for never.
        scaling: How columns of numbers are scaled, see :class:`~datamodules.tables.encoding.TableEncoder`: standard,
            robust, quantile, min_max or none.
        predict: A new file to predict, of the same kinds; null for ``path`` itself.
        **settings: The settings of :class:`~datamodules.anomaly.base.SemiSupervisedDataModule`.

    Raises:
        SettingError: A setting is out of range, or the file cannot be used; the message names the column.
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
        min_rows: int = 0,
        max_rows: int | None = None,
        scaling: Scaling = "standard",
        predict: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.path = None if path is None else Path(path).expanduser()
        self.predict = None if predict is None else Path(predict).expanduser()
        if labelled_share is None:
            labelled_share = 1.0 if self.path and self.path.suffix.lower() != ".npz" else 0.1
        check_interval("(0, 1]", labelled_share=labelled_share)
        check_interval("(0, 1)", test_share=test_share)
        check_whole_numbers(0, min_rows=min_rows)
        if max_rows is not None:
            check_whole_numbers(max(min_rows, 1), max_rows=max_rows)
        check_choice(Scaling, scaling=scaling)
        self.scaling = scaling
        self.label = label
        self.anomaly_value = anomaly_value
        self.drop_columns = list(drop_columns)
        self.labelled_share = labelled_share
        self.test_share = test_share
        self.min_rows = min_rows
        self.max_rows = max_rows
        self._encoder: TableEncoder | None = None
        self._marked_by: str | None = None
        self._parts: dict[str, Table] = {}
        self._true_labels: dict[str, Tensor] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the file, split it, and fit the scaling on the training part; a second call does nothing.

        Args:
            stage: Lightning's stage. All but "predict" do the same. For prediction the file is read later: the
                checkpoint, which Lightning loads after this, says which columns are needed.
        """
        if stage == "predict" or self._parts:
            return
        table = self._read(self.path)
        column = self.label or "y"
        anomalous, self._marked_by = anomaly_labels(table.labels, column, table.source, self.anomaly_value)
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
        self._set_labels(torch.from_numpy(split.labelled))
        encoder = TableEncoder(self._parts["train"], self.scaling)
        self._encode(encoder)
        for notice in encoder.notices:
            rank_zero_info(f"{table.source}: {notice}")
        unlabelled, labelled = self.class_counts.tolist()
        hidden = int(self.train_true_labels.sum()) - labelled
        others = f" and {hidden:,} hidden ones" if self.labelled_share < 1 else ""
        held_out = ", ".join(
            f"{name} {len(labels):,} rows with {int(labels.sum()):,} anomalies"
            for name, labels in self._true_labels.items()
            if name != "train"
        )
        rank_zero_info(
            f"{table.source}: anomalies have {column} = {self._marked_by}; training {unlabelled + labelled:,} rows, "
            f"{labelled:,} labelled anomalies{others}; {held_out}; {self.num_features:,} features"
        )

    @property
    def train_true_labels(self) -> Tensor:
        """True labels of the training rows, int64 (N,), for benchmarks: training only knows ``train_labels``."""
        return self._true_labels["train"]

    def predict_dataloader(self) -> BatchLoader:
        """Every row of the file, in its order, x alone; only the columns that training used are read."""
        if self._encoder is None:
            raise SettingError("ckpt_path is null: give the checkpoint of a trained detector, which holds the scaling")
        table = self._read(self.predict or self.path, self._encoder.columns)
        features = self._encoder.transform(table)
        if unseen := self._encoder.unseen(features):
            rank_zero_info(f"{table.source}: values that training did not see in: {first_few(unseen, 10)}")
        return in_order(features, None, self.eval_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """The fitted scaling and the anomalies' value, plain data; Lightning keeps it in the checkpoint."""
        if self._encoder is None:
            return {}
        return {"encoder": self._encoder.state_dict(), "anomaly_value": self._marked_by}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Scale as the checkpoint's training did, whatever file this is.

        Raises:
            SettingError: This file lacks a column that the model was trained on, or marks anomalies by another value.
        """
        value = state_dict.get("anomaly_value")
        if None not in (value, self._marked_by) and value != self._marked_by and self.anomaly_value is None:
            raise SettingError(
                f"data.anomaly_value is null: anomalies have {self.label or 'y'} = {value} in the checkpoint, and "
                f"{self._marked_by} is the rarer value in {self.path}: set it"
            )
        if "encoder" in state_dict:
            self._encode(TableEncoder.from_state_dict(state_dict["encoder"]))

    def _encode(self, encoder: TableEncoder) -> None:
        """Make the features of all parts."""
        self._encoder = encoder
        self.feature_names = encoder.feature_names
        self.num_features = len(self.feature_names)
        features = {name: encoder.transform(table) for name, table in self._parts.items()}
        if features:
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
