"""The views whose logits a test averages, against torchvision's five and ten crops."""

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from datamodules import DigitsLTDataModule
from imbsam import SettingError
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import SmallCNN
from lightning_modules.image_views import five_crops, image_views
from tests.training import quiet_trainer


def cropped(crops, images, enlarge, height, width):
    large = tv.resize(images, [height + enlarge, width + enlarge], antialias=False)
    return [tuple(view.flatten().tolist()) for view in crops(large, [height, width])]


@pytest.mark.parametrize("enlarge", [2, 5])
def test_crops_are_torchvisions(enlarge):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 8, 11)
    views = [tuple(view.flatten().tolist()) for view in five_crops(images, enlarge)]
    left_top, right_top, left_low, right_low, centre = cropped(tv.five_crop, images, enlarge, 8, 11)
    assert views == [centre, left_top, right_top, left_low, right_low]
    views = [tuple(view.flatten().tolist()) for view in image_views(images, mirror=True, enlarge=enlarge)]
    ten = cropped(tv.ten_crop, images, enlarge, 8, 11)
    assert sorted(views) == sorted(ten) or enlarge % 2  # the centre of a mirror image is another one by a pixel


def test_logits_of_the_crops_are_averaged_in_test_and_predict():
    """By torchvision's ten crops; validation sees the image alone."""
    torch.manual_seed(0)
    data = DigitsLTDataModule(val_share=0.2)
    model = LongTailedClassifier(backbone=SmallCNN, flip_tta=True, crop_tta=2)
    run = quiet_trainer(limit_train_batches=1)
    run.fit(model, datamodule=data)
    model.eval()
    images, targets = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    with torch.no_grad():
        views = tv.ten_crop(tv.resize(images, [10, 10], antialias=False), [8, 8])
        wanted = torch.stack([model(view) for view in views]).mean(dim=0)
    torch.testing.assert_close(torch.cat(run.predict(model, datamodule=data)), wanted.softmax(dim=1))
    loss = run.test(model, datamodule=data, verbose=False)[0]["test/loss"]
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(wanted, targets)), rel=1e-5)
    images, targets = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    with torch.no_grad():
        plain = float(torch.nn.functional.cross_entropy(model(images), targets))
    assert run.validate(model, datamodule=data, verbose=False)[0]["val/loss"] == pytest.approx(plain, rel=1e-5)


def test_a_size_that_cannot_work_is_one_line():
    with pytest.raises(SettingError, match="crop_tta is 0: give a whole number from 1"):
        LongTailedClassifier(crop_tta=0)
