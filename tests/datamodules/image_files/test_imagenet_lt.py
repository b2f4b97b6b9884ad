import re
import shutil

import pytest

from datamodules import ImageNetLTDataModule, PlacesLTDataModule
from imbsam import SettingError

SMALL = {"image_size": 8, "num_workers": 0}
CASES = {
    "imagenet": (ImageNetLTDataModule, "imagenet_lt_root", ["n01440760", "n01440761", "n01440762", "n01440763"]),
    "places": (PlacesLTDataModule, "places_lt_root", ["airfield", "alley", "pub-indoor", "zen"]),
}


@pytest.fixture(params=CASES)
def case(request):
    kind, root, names = CASES[request.param]
    return kind, request.getfixturevalue(root), names


def test_reads_the_published_lists(case):
    kind, root, names = case
    data = kind(root, **SMALL)
    data.prepare_data()
    with pytest.warns(UserWarning, match=r"not the published ones: 4 classes, not (1,000|365); 158 training images"):
        data.setup("fit")
    assert (data.class_names, data.class_counts.tolist()) == (names, [120, 30, 5, 3])
    assert [len(part) for part in (data._train, data._val, data._test)] == [158, 8, 12]
    assert data.own_validation
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 8
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 12


def test_lists_may_lie_elsewhere(case, tmp_path):
    kind, root, names = case
    for path in root.glob("*.txt"):
        shutil.copy(path, tmp_path)
    assert kind(root, lists=tmp_path, **SMALL).splits.class_names == names
    assert kind(root, lists=tmp_path).hparams["lists"] == str(tmp_path)  # a checkpoint refuses a Path


def test_full_lists_are_those_of_the_papers():
    assert list(ImageNetLTDataModule.published.values()) == [1000, 115846, 20000, 50000, 1280, 5]
    assert list(PlacesLTDataModule.published.values()) == [365, 62500, 7300, 36500, 4980, 5]


@pytest.mark.filterwarnings("ignore:.*not the published ones")
def test_its_own_validation_list_takes_no_share(case):
    kind, root, _ = case
    with pytest.raises(SettingError, match=rf"val_share is 0.1, but {kind.__name__} has validation samples of its own"):
        kind(root, val_share=0.1)


def test_says_what_is_missing_and_where_it_is(case, tmp_path):
    kind, root, _ = case
    with pytest.raises(SettingError, match=r"there is no .*_train.txt: set data.lists .* https://") as caught:
        kind(tmp_path).prepare_data()
    assert "\n" not in str(caught.value)
    for path in root.glob("*.txt"):
        shutil.copy(path, tmp_path)
    with pytest.raises(
        SettingError, match=rf"158 of the 158 images in .*_train.txt are not in {tmp_path}: .* https://"
    ):
        kind(tmp_path).prepare_data()


def test_a_gap_in_the_labels(imagenet_lt_root, tmp_path):
    for path in imagenet_lt_root.glob("*.txt"):
        (tmp_path / path.name).write_text(re.sub(r" 2$", " 4", path.read_text(), flags=re.MULTILINE))
    with pytest.raises(SettingError, match=r"ImageNet_LT_train.txt has no image of class 2"):
        ImageNetLTDataModule(imagenet_lt_root, lists=tmp_path).prepare_data()
