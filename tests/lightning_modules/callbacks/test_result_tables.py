"""The table after a test, on a terminal of 80 columns."""

import re
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from datamodules import DigitsLTDataModule
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import SmallCNN
from lightning_modules.callbacks.evaluation_files import EvaluationFiles
from lightning_modules.callbacks.result_tables import AccuracyTable


class Few(DigitsLTDataModule):
    """Four digits alone."""

    def setup(self, stage=None):
        super().setup(stage)
        self.class_counts, self.class_names = self.class_counts[:4], self.class_names[:4]

    def test_dataloader(self):
        images, labels = map(torch.cat, zip(*super().test_dataloader(), strict=True))
        kept = labels < 3  # and one class without test samples
        return DataLoader(TensorDataset(images[kept], labels[kept]), batch_size=64)


def table(data, few, tmp_path, capsys):
    """Rows of the printed table by their first cell, the metrics, and the widest line."""
    model = LongTailedClassifier(backbone=partial(SmallCNN, width=8), many=50, few=few)
    run = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[EvaluationFiles(), AccuracyTable()],
    )
    run.test(model, data, verbose=False)
    lines = capsys.readouterr().out.splitlines()
    rows = [
        [cell.strip() for cell in line.strip("│┃").split(re.search("[│┃]", line)[0])] for line in lines if "│" in line
    ]
    return {row[0]: row[1:] for row in rows}, run.callback_metrics, max(map(len, lines))


def test_it_has_every_measure_and_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows, metrics, width = table(DigitsLTDataModule(), 10, tmp_path, capsys)
    assert width <= 80
    assert rows.pop("classes") == ["3", "3", "4", "10"]
    for title, prefix in (("accuracy", ""), ("top-5 accuracy", "top5_"), ("calibration error", "ece_")):
        wanted = [f"{100 * float(metrics[f'test/{prefix}{group}']):.1f}" for group in ("many", "medium", "few", "all")]
        assert rows.pop(title) == wanted
    names = ["lowest_recall", "harmonic_mean", "geometric_mean", "macro_f1", "forward_50", "backward_50"]
    assert list(rows) == [
        *("lowest recall", "harmonic mean recall", "geometric mean recall", "macro-F1"),
        *("forward long tail, ratio 50", "backward long tail, ratio 50"),
    ]
    for cells, name in zip(rows.values(), names, strict=True):
        assert cells == ["", "", "", f"{100 * float(metrics[f'test/{name}']):.1f}"]


@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
def test_of_four_classes_there_is_no_top_5_and_an_empty_group_is_a_dash(tmp_path, capsys):
    rows, metrics, _ = table(Few(), 2, tmp_path, capsys)
    assert "top-5 accuracy" not in rows
    assert not any("top5" in name for name in metrics)
    assert rows["classes"] == ["1", "3", "0", "4"]
    for title in ("accuracy", "calibration error"):
        assert [cell == "–" for cell in rows[title]] == [False, False, True, False]
    assert rows["forward long tail, ratio 50"][3] != "–"
