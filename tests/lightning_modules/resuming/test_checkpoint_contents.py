"""Checkpoints after the training: predicting with them, or refusing them in one line; in real processes."""

import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import DigitsLTDataModule
from imbsam import SettingError
from lightning_modules.class_names import check_class_names
from lightning_modules.resuming.checkpoint_contents import read_checkpoint, saved_classes
from tests.pieces import anomaly
from tests.training import csv_rows

pytestmark = pytest.mark.processes

CLASSES = {"ant": 24, "bee": 12, "cat": 8}
SMALL_NET = ["--model.backbone=SmallCNN", "--model.backbone.width=4", "--model.backbone.in_channels=3"]
ONE_EPOCH = ["--trainer.max_epochs=1", "--model.lr_scheduler.init_args.T_max=1"]
IMAGES = ["--config=configs/data/image_folder.yaml", *SMALL_NET, *ONE_EPOCH, "--data.image_size=8"]
IMAGES += ["--data.num_workers=0", "--data.val_share=0"]
DIGITS = ["--config=configs/data/digits_lt.yaml", *ONE_EPOCH]
DEVNET = anomaly("devnet", "sgd")
TABLES = ["--trainer.max_epochs=1", "--data.batches_per_epoch=2", "--data.val_share=0"]


@pytest.fixture(scope="module")
def trained(run_imbsam, tmp_path_factory):
    """A folder with a run on images, one on the digits, and two detectors on a table."""
    folder = tmp_path_factory.mktemp("trained")
    random = np.random.default_rng(0)
    for label, (name, count) in enumerate(CLASSES.items()):
        for i in range(count):
            path = folder / "pictures" / name / f"{'old/' if i % 2 else ''}{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 100, (9, 8, 3)) + np.eye(3, dtype=int)[label] * 150
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    table(folder / "frauds.csv")
    frauds = ["--data.path=frauds.csv", "--data.label=fraud", *TABLES]
    for args in (
        [*IMAGES, "--data.root=pictures"],
        DIGITS,
        [*DEVNET, *frauds],
        [*anomaly("classifier", "sgd"), *frauds],
    ):
        answer = run_imbsam(folder, "fit", *args)
        assert answer["codes"] == [0], answer["err"][0]
    return folder


def table(path, seed=0, separator=",", columns=("amount", "kind", "hour", "fraud")):
    random = np.random.default_rng(seed)
    fraud = np.arange(96) % 8 == 0
    cells = {
        "amount": random.normal(fraud * 3.0).round(3),
        "hour": random.integers(0, 24, 96),
        "kind": np.where(random.random(96) < 0.5, "card", "cash"),
        "fraud": np.where(fraud, "yes", "no"),
    }
    lines = [columns, *zip(*(cells[name].tolist() for name in columns), strict=True)]
    path.write_text("".join(separator.join(map(str, line)) + "\n" for line in lines))


@pytest.fixture
def work(trained, tmp_path):
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "work")
    return tmp_path / "work"


def last(name):
    return f"logs/{name}/version_0/checkpoints/last.ckpt"


def refused(answer):
    """The one line of a run that ended with exit code 2."""
    assert answer["codes"] == [2], answer
    assert "Traceback" not in answer["err"][0]
    assert "weights_only" not in answer["err"][0]
    assert answer["err"][0].count("imbsam: error:") == 1
    line = answer["err"][0].splitlines()[-1]
    assert line.startswith("imbsam: error: ")
    return line


@pytest.mark.parametrize("command", ["test", "sharpness", "resume", "second stage"])
def test_a_renamed_class_is_not_scored_under_another_name(run_imbsam, work, command):
    """A folder renamed from ant to zebra is the last class, and every label another one."""
    (work / "pictures/ant").rename(work / "pictures/zebra")
    images = [*IMAGES, "--data.root=pictures", "--ckpt_path", last("image_folder/imbsam")]
    source = "the checkpoint"
    if command == "resume":
        answer = run_imbsam(work, "fit", *images, "--trainer.max_epochs=2")
    elif command == "second stage":
        source = f"the first stage ({last('image_folder/imbsam')})"
        second = ["--model=SecondStageClassifier", f"--model.checkpoint={last('image_folder/imbsam')}"]
        data = ["--data=ImageFolderLTDataModule", "--data.root=pictures", "--data.num_workers=0", "--data.image_size=8"]
        answer = run_imbsam(work, "fit", *second, *data)
    else:
        answer = run_imbsam(work, command, *images)
    assert refused(answer) == (
        f"imbsam: error: the classes of the data are not those of {source}: {source} knows ant, which the data lack; "
        f"the data have zebra, which {source} does not know: rename the classes as they were"
    )


def test_classes_in_another_order_and_other_numbers_of_classes():
    check_class_names(["ant", "bee"], SimpleNamespace(class_names=["ant", "bee"]))
    check_class_names(["ant", "bee"], SimpleNamespace())
    with pytest.raises(SettingError, match="in another order: class 0 is ant there and bee in the data"):
        check_class_names(["ant", "bee"], SimpleNamespace(class_names=["bee", "ant"]))
    with pytest.raises(SettingError, match=r"the data have 2, 3, 4, 5, 6 and 2 more, which the checkpoint does"):
        check_class_names(["0", "1"], SimpleNamespace(class_names=list("012345678")))


PREDICTED = {
    "folder": ("new", None),
    "paths": ("[new/bee/0.png, new/cat]", ["new/bee/0.png", *(f"new/cat/{name}" for name in ("0.png", "2.png"))]),
    "csv": ("list.csv", ["new/cat/0.png", "new/bee/0.png"]),
}


@pytest.mark.parametrize("case", PREDICTED)
def test_images_are_predicted_from_the_checkpoint_alone(run_imbsam, work, case):
    """No config, no training data; a row for each image, with its path and the probability of every class."""
    given, paths = PREDICTED[case]
    (work / "pictures").rename(work / "new")
    (work / "list.csv").write_text("note;path\n1;new/cat/0.png\n2;new/bee/0.png\n")
    answer = run_imbsam(
        work, "predict", "--ckpt_path", last("image_folder/imbsam"), "--data.predict", given, "--predictions.path=p.csv"
    )
    assert answer["codes"] == [0], answer["err"][0]
    found = csv_rows(work / "p.csv")
    assert list(found[0]) == ["path", "predicted", *CLASSES]
    names = [row["path"] for row in found]
    if paths is None:
        paths = sorted(str(path.relative_to(work / "new")) for path in (work / "new").rglob("*.png"))
        assert len(paths) == sum(CLASSES.values())
    assert names[: len(paths)] == paths
    for row in found:
        probabilities = {name: float(row[name]) for name in CLASSES}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
        assert row["predicted"] == max(probabilities, key=probabilities.get)


def test_predictions_are_those_of_the_model(run_imbsam, work):
    """The probabilities of a file, computed here from the weights and the pixels."""
    args = ["predict", "--ckpt_path", last("image_folder/imbsam"), "--predictions.path=p.csv"]
    assert run_imbsam(work, *args, "--data.predict=pictures/bee/0.png")["codes"] == [0]
    from datamodules.image_files.augmentation import ImageTransform
    from lightning_modules import LongTailedClassifier

    model = LongTailedClassifier.load_from_checkpoint(work / last("image_folder/imbsam")).eval()
    transform = ImageTransform("none", 8, 0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        wanted = model(transform(Image.open(work / "pictures/bee/0.png"))[None]).softmax(dim=1)[0]
    assert [float(csv_rows(work / "p.csv")[0][name]) for name in CLASSES] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_what_cannot_be_predicted_is_one_line(run_imbsam, work):
    (work / "broken.jpg").write_text("no image")
    for given, message in (
        ("nowhere", "is nowhere: there is no such"),
        ("broken.jpg", "image broken.jpg is corrupt: the"),
    ):
        answer = run_imbsam(work, "predict", "--ckpt_path", last("image_folder/imbsam"), "--data.predict", given)
        assert message in refused(answer)


def test_a_new_table_is_scored_from_the_checkpoint_alone(run_imbsam, work):
    """Columns are matched by name, with any separator and in any order; the rows are numbered from 1."""
    args = ["predict", "--ckpt_path", last("anomaly_table/devnet_sgd"), "--predictions.path=p.csv"]
    assert run_imbsam(work, *args, "--data.predict=frauds.csv")["codes"] == [0]
    scores = csv_rows(work / "p.csv")
    (work / "frauds.csv").unlink()
    table(work / "new.csv", separator=";", columns=("kind", "hour", "amount"))
    answer = run_imbsam(work, *args, "--data.predict=new.csv")
    assert answer["codes"] == [0], answer["err"][0]
    assert csv_rows(work / "p.csv") == scores
    assert [row["row"] for row in scores] == [str(i) for i in range(1, 97)]
    table(work / "less.csv", columns=("kind", "amount"))
    line = refused(run_imbsam(work, *args, "--data.predict=less.csv"))
    assert "less.csv lacks columns that the model was trained on: hour" in line


def test_a_table_is_tested_by_the_names_of_its_columns_and_labels(run_imbsam, work):
    args = ["test", "--ckpt_path", last("anomaly_table/devnet_sgd")]
    wanted = run_imbsam(work, *args)
    lines = (work / "frauds.csv").read_text().splitlines()
    more = [",".join([*line.split(","), str(i % 5) if i else "note"]) for i, line in enumerate(lines)]
    (work / "frauds.csv").write_text("\n".join(more) + "\n")
    answer = run_imbsam(work, *args)
    assert answer["codes"] == [0], answer["err"][0]
    numbers = [re.findall(r"\d+\.\d", answer["out"][0].split("AUROC")[1].split("checkpoint")[0])]
    assert numbers == [re.findall(r"\d+\.\d", wanted["out"][0].split("AUROC")[1].split("checkpoint")[0])]
    (work / "frauds.csv").write_text(
        "\n".join(lines).replace("yes", "?").replace("no", "yes").replace("?", "no") + "\n"
    )
    line = refused(run_imbsam(work, *args))
    assert "anomalies have fraud = yes in the checkpoint, and no is the rarer value in frauds.csv: set it" in line


def state_dict(checkpoint, path):
    torch.save(checkpoint["state_dict"], path)


def other_zip(checkpoint, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "a zip of something else")


def script(checkpoint, path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def other_torch_file(checkpoint, path):
    torch.save({"epoch": 3, "net": "resnet"}, path)


def with_code(checkpoint, path):
    torch.save({**checkpoint, "more": SimpleNamespace(x=1)}, path)


def others_model(checkpoint, path):
    keys = ("state_dict", "pytorch-lightning_version", "epoch", "global_step", "loops")
    torch.save({key: checkpoint[key] for key in keys}, path)


FOREIGN = {
    "state_dict": (state_dict, "it holds only weights (a state_dict), not a checkpoint of a run; to start a training"),
    "zip": (other_zip, "other.ckpt: it is cut off, or not a file of torch.save"),
    "TorchScript": (script, "other.ckpt: it is cut off, or not a file of torch.save"),
    "torch": (other_torch_file, "it was not written by Lightning; name a run's checkpoints/last.ckpt"),
    "pickle": (with_code, "it holds types.SimpleNamespace beside tensors and plain data: reading that could run code"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_files_are_refused_in_one_line(trained, tmp_path, case):
    make, message = FOREIGN[case]
    make(torch.load(trained / last("digits_lt/imbsam"), weights_only=True), tmp_path / "other.ckpt")
    with pytest.raises(SettingError) as error:
        read_checkpoint(tmp_path / "other.ckpt")
    assert message in str(error.value)
    assert not any(word in str(error.value) for word in ("weights_only", "\n"))


@pytest.mark.parametrize(
    ("command", "make", "message"),
    [
        ("test", with_code, FOREIGN["pickle"][1]),
        ("fit", with_code, FOREIGN["pickle"][1]),
        ("fit", others_model, "that was not written by imbsam: a LongTailedClassifier cannot load its weights"),
    ],
)
def test_the_command_refuses_other_files(run_imbsam, trained, tmp_path, command, make, message):
    make(torch.load(trained / last("digits_lt/imbsam"), weights_only=True), tmp_path / "other.ckpt")
    assert message in refused(run_imbsam(tmp_path, command, *DIGITS, "--ckpt_path=other.ckpt"))


def test_a_folder_is_no_checkpoint(run_imbsam, work):
    run = "logs/digits_lt/imbsam/version_0"
    for command in ("test", "fit"):
        line = refused(run_imbsam(work, command, *DIGITS, f"--ckpt_path={run}"))
        assert (
            f"{run}: it is a folder, not a checkpoint; name the file: --ckpt_path {run}/checkpoints/last.ckpt" in line
        )


@pytest.mark.parametrize(
    ("command", "args", "name", "message"),
    [
        (
            "fit",
            [*DIGITS, "--model.backbone.width=8"],
            "digits_lt/imbsam",
            "model.backbone.width is 8, and the checkpoint's is 16",
        ),
        (
            "test",
            DEVNET,
            "anomaly_table/classifier_sgd",
            "model.detector is DevNet, and the checkpoint's is WeightedClassifier",
        ),
        (
            "fit",
            DEVNET,
            "anomaly_table/classifier_sgd",
            "model.detector is DevNet, and the checkpoint's is WeightedClassifier",
        ),
        (
            "test",
            DEVNET,
            "digits_lt/imbsam",
            "ckpt_path is a checkpoint of LongTailedClassifier, and the model is AnomalyDetector",
        ),
        (
            "fit",
            DIGITS,
            "anomaly_table/devnet_sgd",
            "ckpt_path is a checkpoint of AnomalyDetector, and the model is LongTailedClassifier",
        ),
    ],
)
def test_the_checkpoint_of_another_model_is_one_line(run_imbsam, work, command, args, name, message):
    if args == DEVNET:
        args = [*args, "--data.path=frauds.csv", "--data.label=fraud", *TABLES, "--trainer.max_epochs=2"]
    assert message in refused(run_imbsam(work, command, *args, "--ckpt_path", last(name)))


def test_weights_that_do_not_fit_are_counted(run_imbsam, work):
    path = work / last("digits_lt/imbsam")
    checkpoint = torch.load(path, weights_only=True)
    weights = checkpoint["state_dict"]
    first, *_ = weights
    weights["more"] = weights.pop(first)
    torch.save(checkpoint, path)
    line = refused(run_imbsam(work, "test", "--ckpt_path", last("digits_lt/imbsam")))
    assert f"of its weights 1 missing ({first}), 1 unknown (more)" in line


def classes_of_groups(out):
    (line,) = (line for line in out.splitlines() if line.startswith("│ classes "))
    return [int(number) for number in re.findall(r"\d+", line)]


def test_settings_of_an_evaluation_on_the_command_line_win(run_imbsam, work):
    """For the other settings the checkpoint wins, unless a config sets one."""
    args = ["test", "--ckpt_path", last("digits_lt/imbsam")]
    out = run_imbsam(work, *args)["out"][0]
    assert classes_of_groups(out) == [3, 3, 4, 10]
    out = run_imbsam(work, *args, "--model.many=30", "--model.few=5")["out"][0]
    assert classes_of_groups(out) == [4, 4, 2, 10]
    args = ["test", "--ckpt_path", last("anomaly_table/devnet_sgd")]
    assert "as many alarms as anomalies" in run_imbsam(work, *args)["out"][0]
    assert "alarms for 3 rows" in run_imbsam(work, *args, "--model.budget=3")["out"][0]


def test_what_depends_on_the_machine_is_no_setting_of_an_evaluation():
    trained = dict(DigitsLTDataModule(num_workers=2, images_on_device=True, seed=3).hparams)
    saved = saved_classes({"datamodule_class": "DigitsLTDataModule", "datamodule_hyper_parameters": trained})
    settings = saved["data"]["init_args"]
    assert settings["seed"] == 3
    assert not {"num_workers", "images_on_device"} & settings.keys()


def test_other_data_do_not_take_the_settings_of_the_checkpoint(run_imbsam, work):
    """The images have no long tail; the settings of the digits would give them one of ratio 50."""
    images = ["--data=ImageFolderLTDataModule", "--data.root=pictures", "--data.num_workers=0"]
    line = refused(run_imbsam(work, "test", "--ckpt_path", last("digits_lt/imbsam"), *images))
    assert "the checkpoint knows 0, 1, 2, 3, 4 and 5 more, which the data lack" in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "ckpt_path is null: name the checkpoint's file with --ckpt_path"),
        (
            ["--ckpt_path=last"],
            "ckpt_path is last: name the checkpoint's file with --ckpt_path, or the config of its runs",
        ),
        (["--ckpt_path=none.ckpt"], "ckpt_path is none.ckpt: there is no such file"),
    ],
)
def test_an_unknown_model_is_one_line(run_imbsam, tmp_path, args, message):
    assert message in refused(run_imbsam(tmp_path, "predict", "--data.predict=a.jpg", *args))


OWN_DATA = """
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class Blobs(LightningDataModule):
    def __init__(self, names: str = "a,b"):
        super().__init__()
        self.save_hyperparameters()
        self.class_names = names.split(",")

    def setup(self, stage=None):
        labels = torch.arange(24) % 2
        self.data = TensorDataset(torch.rand(24, 1, 8, 8) + labels[:, None, None, None], labels)
        self.class_counts = labels.bincount()

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=8)

    def test_dataloader(self):
        return DataLoader(self.data, batch_size=8)
"""


def test_custom_data(imbsam, tmp_path, monkeypatch):
    """The checkpoint has its class, its settings and its class names, as for our DataModules."""
    (tmp_path / "blobs_for_test.py").write_text(OWN_DATA)
    named = ["--model=LongTailedClassifier", "--model.backbone=SmallCNN", "--data=blobs_for_test.Blobs"]
    args = ["test", "--ckpt_path=logs/version_0/checkpoints/last.ckpt"]
    with monkeypatch.context() as at_home:
        at_home.syspath_prepend(tmp_path)
        assert imbsam("fit", *named, "--data.names=x,y", "--trainer.max_epochs=1")[0] == 0
        assert imbsam(*args)[0] == 0
        code, _, err = imbsam(*args, "--data.names=y,x")
        assert (code, "the checkpoint in another order: class 0 is x there and y in the data" in err) == (2, True)
    del sys.modules["blobs_for_test"]
    code, _, err = imbsam(*args)
    assert (code, "the checkpoint's data cannot be built (blobs_for_test.Blobs: " in err) == (2, True)
    assert "No module named 'blobs_for_test'): add the folder of their module to PYTHONPATH" in err


def test_best_without_validation_is_one_line(run_imbsam, work):
    line = refused(run_imbsam(work, "test", *DIGITS, "--ckpt_path=best"))
    assert "ckpt_path is best: logs/digits_lt/imbsam/version_0 has no best.ckpt, which a training keeps only" in line
    checkpoints = Path(work / last("digits_lt/imbsam")).parent
    shutil.copy(checkpoints / "last.ckpt", checkpoints / "best.ckpt")
    answer = run_imbsam(work, "test", *DIGITS, "--ckpt_path=best")
    assert (
        answer["codes"],
        "checkpoint: logs/digits_lt/imbsam/version_0/checkpoints/best.ckpt" in answer["out"][0],
    ) == (
        [0],
        True,
    )
