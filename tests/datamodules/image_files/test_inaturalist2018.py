import json

import pytest

from datamodules import INaturalist2018DataModule
from imbsam import SettingError

SMALL = {"image_size": 8, "num_workers": 0}
NAMES = ["Quercus robur", "Vulpes vulpes", "Bufo bufo", "Vulpes lagopus"]


@pytest.mark.parametrize(("lists", "names"), [(None, NAMES), ("txt", ["0", "1", "2", "3"])])
def test_reads_json_files_or_lists(inaturalist2018_root, lists, names):
    data = INaturalist2018DataModule(inaturalist2018_root, lists and inaturalist2018_root / lists, **SMALL)
    data.prepare_data()
    with pytest.warns(UserWarning, match="4 classes, not 8,142; 158 training images, not 437,513; 12 test images"):
        data.setup("fit")
    assert (data.class_names, data.class_counts.tolist()) == (names, [120, 30, 5, 3])
    assert data.val_dataloader() == []
    assert [len(labels) for _, labels in data.test_dataloader()] == [12]  # the official validation set
    assert not {*data._train.paths} & {*data._test.paths}


@pytest.mark.filterwarnings("ignore:.*not the published ones")
def test_a_share_of_the_training_images_is_for_validation(inaturalist2018_root):
    data = INaturalist2018DataModule(inaturalist2018_root, val_share=0.2, **SMALL)
    data.setup("fit")
    assert (data.class_counts.tolist(), len(data._val), len(data._test)) == ([96, 24, 4, 2], 32, 12)


def test_json_and_lists_agree(inaturalist2018_root):
    one = INaturalist2018DataModule(inaturalist2018_root).splits
    other = INaturalist2018DataModule(inaturalist2018_root, lists=inaturalist2018_root / "txt").splits
    for a, b in zip(one.parts(), other.parts(), strict=True):
        assert (a.paths.tolist(), a.labels.tolist()) == (b.paths.tolist(), b.labels.tolist())


def write(folder, categories, annotations):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(len(annotations))]
    found = [{"id": 7, "image_id": i, "category_id": c} for i, c in enumerate(annotations)]
    for name in ("train2018.json", "val2018.json"):
        (folder / name).write_text(json.dumps({"images": images, "annotations": found, "categories": categories}))


def test_categories_need_not_be_numbered_from_0_or_have_one_name_each(tmp_path):
    write(tmp_path, [{"id": 9, "name": "a"}, {"id": 4, "name": "b"}, {"id": 5, "name": "a"}], [9, 4, 5, 4])
    splits = INaturalist2018DataModule(tmp_path).splits
    assert (splits.class_names, splits.train.labels.tolist()) == (["b", "a (5)", "a (9)"], [2, 0, 1, 0])


@pytest.mark.parametrize(
    ("categories", "annotations", "message"),
    [
        ([{"id": 0, "name": "a"}, {"id": 1, "name": "b"}], [0, 0], r"train2018.json has no image of class 1 \(b\)"),
        ([{"id": 0, "name": "a"}], [0, 3], r"train2018.json has annotations of category 3, which .* does not name"),
    ],
)
def test_annotations_and_categories_must_fit(tmp_path, categories, annotations, message):
    write(tmp_path, categories, annotations)
    with pytest.raises(SettingError, match=message):
        INaturalist2018DataModule(tmp_path).prepare_data()


@pytest.mark.parametrize("text", ['{"images": [', "{}", "[1]", '{"images": [{"id": 1}], "annotations": []}'])
def test_a_broken_file_is_named(tmp_path, text):
    for name in ("train2018.json", "val2018.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises(SettingError, match=r"train2018.json is no COCO-style file .*: download it again"):
        INaturalist2018DataModule(tmp_path).prepare_data()


def test_says_what_is_missing(tmp_path):
    with pytest.raises(SettingError, match=r"has neither train2018.json .* https://github.com/visipedia/inat_comp"):
        INaturalist2018DataModule(tmp_path).prepare_data()
