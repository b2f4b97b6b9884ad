import pytest
import torch
from sklearn.datasets import load_digits

from datamodules import AnomalyImageDataModule, DigitsLTDataModule
from imbsam import SettingError


def data_of(**settings):
    data = AnomalyImageDataModule(**settings)
    data.prepare_data()
    data.setup("fit")
    return data


def digit_of(images):
    """The digit that each image shows, looked up in the whole data set."""
    everything = load_digits()
    lookup = {tuple(pixels): label for pixels, label in zip(everything.data.tolist(), everything.target, strict=True)}
    return [int(lookup[tuple(pixels)]) for pixels in (images.flatten(1) * 16).tolist()]


def test_one_digit_is_normal_and_the_others_are_anomalies():
    data = data_of(normal_class=3, labelled_ratio=0.1, pollution=0.2)
    digits = torch.tensor(digit_of(data.train_features))
    labelled = data.train_labels == 1
    normal = int((digits == 3).sum())
    assert normal == 128  # every training image of a 3
    assert not (digits[labelled] == 3).any()
    hidden = int((digits[~labelled] != 3).sum())
    assert hidden == 32  # a fifth of the 160 unlabelled ones
    assert labelled.sum() == 18  # a tenth of the 178 training images
    assert data.class_counts.tolist() == [160, 18]
    assert len(set(digits[labelled].tolist())) > 1
    assert len(data.train_features.unique(dim=0)) == 178  # none is labelled and hidden
    x, truth = next(iter(data.test_dataloader()))
    assert (x.shape[1:], x.dtype, truth.dtype) == ((1, 8, 8), torch.float32, torch.int64)
    test = torch.cat([images for images, _ in data.test_dataloader()])
    truth = torch.cat([labels for _, labels in data.test_dataloader()])
    assert truth.tolist() == [int(digit != 3) for digit in digit_of(test)]
    assert torch.equal(torch.cat(list(data.predict_dataloader())), test)
    assert (test.min(), test.max()) == (0, 1)


def test_the_labelled_anomalies_are_of_the_named_class():
    data = data_of(anomaly_classes=[7], pollution=0.3)
    digits = torch.tensor(digit_of(data.train_features))
    assert set(digits[data.train_labels == 1].tolist()) == {7}
    assert len(set(digits[data.train_labels == 0].tolist())) == 10  # pollution is of any class


def test_the_training_images_are_the_classifiers():
    source = DigitsLTDataModule()
    train, _, test = source.load_datasets()
    data = data_of(pollution=0.0)
    pool = {tuple(pixels) for pixels in train.images.flatten(1).tolist()}
    assert all(tuple(pixels) in pool for pixels in (data.train_features.flatten(1) * 16).tolist())
    assert len(next(iter(data_of(eval_batch_size=999).test_dataloader()))[0]) == len(test) == 540


def test_validation_has_its_share_of_every_kind():
    data = data_of(val_share=0.25, labelled_ratio=0.2, pollution=0.2)
    whole = data_of(labelled_ratio=0.2, pollution=0.2)
    truth, known = (torch.cat([labels for _, labels in loader]) for loader in data.val_dataloader())
    assert (whole.class_counts.tolist(), data.class_counts.tolist()) == ([155, 39], [116, 29])
    assert torch.bincount(truth).tolist() == [31, 18]  # of 124 normal, of 31 hidden and 39 labelled
    assert known.sum() == 10
    with pytest.warns(UserWarning, match="classes with a single sample: labelled anomaly"):
        assert len(data_of(val_share=0.25, labelled_ratio=0.005).val_dataloader()) == 1  # no loss without a label
    assert whole.val_dataloader() == []


def test_the_seed_alone_decides():
    torch.manual_seed(1)
    one = data_of()
    torch.manual_seed(2)
    assert torch.equal(one.train_features, data_of().train_features)
    assert not torch.equal(one.train_features, data_of(seed=1).train_features)


def test_pairs_of_images():
    x, labels = next(iter(data_of(sampling="pairs", batch_size=8).train_dataloader()))
    assert (x.shape, labels.tolist()) == ((8, 2, 1, 8, 8), [[0, 0]] * 4 + [[1, 0]] * 2 + [[1, 1]] * 2)


def test_cifar10(cifar10_root):
    data = data_of(images="cifar10", root=cifar10_root, normal_class=5, anomaly_classes=[3])
    assert data.train_features.shape[1:] == (3, 32, 32)
    assert data.train_features.max() <= 1
    assert data.class_counts.tolist() == [111, 6]  # of 100 normal images
    assert sum(int(labels.sum()) for _, labels in data.test_dataloader()) == 180


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": "mnist"}, "images is 'mnist': choose one of digits, cifar10"),
        ({"normal_class": 10}, r"normal_class is 10: give a number in \[0, 9\]"),
        ({"anomaly_classes": [0]}, r"anomaly_classes is \[0\]: give classes from 0 to 9 without normal_class, 0"),
        ({"anomaly_classes": []}, r"anomaly_classes is \[\]: give"),
        ({"labelled_ratio": 0.0}, r"labelled_ratio is 0.0: give a number in \(0, 1\)"),
        ({"pollution": 1.0}, r"pollution is 1.0: give a number in \[0, 1\)"),
        (
            {"labelled_ratio": 0.9, "anomaly_classes": [3]},
            "labelled_ratio is 0.9, which takes 1,242 anomalies, and there are 128",
        ),
        ({"pollution": 0.95}, "pollution is 0.95, which takes 2,356 anomalies, and there are"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        data_of(**settings)
