"""Multi-label data: counts, the validation split by the rarest class, and settings that make no sense for them."""

from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from datamodules import MultiLabelDataModule
from imbsam import SettingError

LABELS = torch.zeros(100, 3, dtype=torch.int64)
LABELS[:80, 0] = LABELS[70:90, 1] = LABELS[[5, 75, 76, 85], 2] = 1


class Own(MultiLabelDataModule):
    labels = LABELS
    held_back: Any = None

    def load_datasets(self):
        self.class_names = ["common", "rarer", "rarest"]
        everything = TensorDataset(torch.arange(len(self.labels)), self.labels)
        return everything, self.labels, everything

    def validation_set(self):
        return self.held_back


def test_counts_without_and_with_each_class():
    data = Own()
    data.setup()
    assert data.class_counts.tolist() == [80, 20, 4]
    assert data.label_counts.tolist() == [[20, 80], [80, 20], [96, 4]]
    x, y = next(iter(data.train_dataloader()))
    assert (y.shape, y.dtype) == ((100, 3), torch.int64)
    assert torch.equal(y, LABELS[x])
    assert data.val_dataloader() == []


def test_validation_takes_its_share_of_the_samples_of_every_rarest_class():
    data = Own(val_share=0.5, seed=3)
    data.setup()
    held_out = torch.cat([y for _, y in data.val_dataloader()])
    # half of 4 with the rarest class, of 17 others with the rarer one, of 11 without a class
    strata = [
        int(held_out[:, 2].sum()),
        int((held_out[:, 1] * (1 - held_out[:, 2])).sum()),
        int((held_out.sum(1) == 0).sum()),
    ]
    assert strata[0] == 2
    assert strata[1] in (8, 9)
    assert strata[2] in (5, 6)
    again = Own(val_share=0.5, seed=3)
    again.setup()
    assert torch.equal(
        torch.cat([x for x, _ in data.val_dataloader()]), torch.cat([x for x, _ in again.val_dataloader()])
    )


@pytest.mark.parametrize(
    ("setting", "value"), [("sampling", "class_balanced"), ("mixup", 0.2), ("cutmix", 1.0), ("profile", "exponential")]
)
def test_settings_for_samples_of_one_class_each_are_refused(setting, value):
    with pytest.raises(SettingError, match=f"^{setting} is .*: multi-label data are taken as they are"):
        Own(**{setting: value})


def test_a_class_without_a_training_sample():
    data = Own()
    data.labels = LABELS * torch.tensor([1, 0, 1])
    with pytest.raises(SettingError, match=r"^no training sample has class rarer: add some, or leave"):
        data.setup()


def test_validation_samples_without_a_class():
    data = Own()
    data.own_validation, data.held_back = True, TensorDataset(torch.zeros(2))
    data.held_back.labels = torch.tensor([[1, 0, 0], [1, 1, 0]])
    with pytest.warns(UserWarning, match="no validation sample has class rarest: .* leaves it out"):
        data.setup()
    data = Own()
    data.own_validation, data.held_back = True, TensorDataset(torch.zeros(2))
    data.held_back.labels = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(SettingError, match=r"^none of the 2 validation samples has a class"):
        data.setup()
