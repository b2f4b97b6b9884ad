"""The command on several processes: the same weights on 1, 2 or 4, no repeats in evaluation, and interruption."""

import csv
import os
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from datamodules import DigitsLTDataModule
from lightning_modules import LongTailedClassifier
from tests.programs import REPOSITORY, run_command
from tests.training import RANKS, csv_rows

pytestmark = pytest.mark.processes

ARGS = [*RANKS, "--trainer.callbacks+=test_processes.LookOnRank0", "--data.val_share=0.2"]


class LookOnRank0(Callback):
    """Only rank 0 reads what was logged, as its progress bar does, and as a custom callback may."""

    def look(self, trainer, *args):
        if trainer.is_global_zero:
            assert trainer.callback_metrics is not None  # here Lightning would reduce
            assert trainer.progress_bar_metrics is not None

    on_train_batch_end = on_train_epoch_end = on_train_end = look
    on_validation_epoch_end = on_validation_end = on_test_epoch_end = on_test_end = look


class PlainValidation(DigitsLTDataModule):
    """A loader of the user's own, which every process reads to its end."""

    def val_dataloader(self):
        loader = super().val_dataloader()
        return DataLoader(loader.dataset, batch_size=20, collate_fn=loader.collate_fn)


def fail_on_rank_0():
    """As a user's code does in the process that the user started; it leaves the time."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Path("failed").touch()
        raise RuntimeError("a bug of the user's")


class FailBeforeTheRendezvous(LongTailedClassifier):
    """A process waits for the first one there for half an hour."""

    def configure_callbacks(self):
        fail_on_rank_0()
        return super().configure_callbacks()


class FailAfterTheRendezvous(DigitsLTDataModule):
    """The other process waits until the data are there."""

    def prepare_data(self):
        fail_on_rank_0()


def last(folder):
    run = folder / "logs/digits_lt/imbsam/version_0"
    with (run / "metrics.csv").open(newline="") as file:
        log = [{name: value for name, value in row.items() if name != "train/seconds"} for row in csv.DictReader(file)]
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True), log


def test_one_two_and_four_processes_give_the_same_weights_and_metrics(run_imbsam, tmp_path):
    """Batches of 32, 2 * 16 and 4 * 8 samples; the 540 test images in batches of unequal number on the ranks."""
    found = []
    for processes in (1, 2, 4):
        folder = tmp_path / str(processes)
        folder.mkdir()
        settings = [
            f"--trainer.devices={processes}",
            f"--data.batch_size={32 // processes}",
            "--trainer.precision=64-true",
        ]
        settings += ["--data.val_share=0.0", "--data.eval_batch_size=45", "--model.backbone.width=8"]
        answer = run_imbsam(folder, *ARGS, *settings, processes=processes)
        assert answer["codes"] == [0] * processes, answer["err"]
        found.append(last(folder))
    for checkpoint, log in found[1:]:
        for name, value in found[0][0]["state_dict"].items():
            torch.testing.assert_close(checkpoint["state_dict"][name], value, rtol=0, atol=1e-10)
        measures = ("lowest_recall", "harmonic_mean", "macro_f1", "top5_few", "ece_all", "backward_50")
        for name in ("test/loss", "test/all", "test/few", "train/loss_epoch", *(f"test/{name}" for name in measures)):
            values = [[float(row[name]) for row in rows if row[name]] for rows in (log, found[0][1])]
            assert values[0] == pytest.approx(values[1], rel=1e-6), name


@pytest.mark.parametrize("loader", ["ours", "plain"])
def test_two_processes_calibrate_decide_and_predict_as_one(run_imbsam, tmp_path, loader):
    """67 validation images of which each has a part, or, by a loader of the user's own, all; the progress bar is on."""
    cpu = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp"]
    settings = ["--trainer.precision=64-true", "--data.eval_batch_size=45", "--model.backbone.width=8"]
    settings += ["--trainer.max_epochs=1", "--calibration.method=temperature"]
    settings += ['--decisions={"recall": {"0": 0.9}, "false_alarms": {"1": 50}}']
    if loader == "plain":
        settings += ["--data=test_processes.PlainValidation"]

    def run(processes, command, *args):
        devices = f"--trainer.devices={processes}"
        answer = run_imbsam(tmp_path, command, *args, *cpu, devices, processes=processes)
        assert answer["codes"] == [0] * processes, answer["err"]
        assert all("imbsam: wrote" not in out and "predictions:" not in out for out in answer["out"][1:])

    run(2, *ARGS, *settings)
    last = tmp_path / "logs/digits_lt/imbsam/version_0/checkpoints/last.ckpt"
    for processes in (1, 2):
        run(processes, "decide", f"--ckpt_path={last}", f"--output={processes}.ckpt", "--trainer.precision=64-true")
    one, *others = (
        torch.load(path, weights_only=True)["callbacks"] for path in (tmp_path / "1.ckpt", tmp_path / "2.ckpt", last)
    )
    for other in others:
        assert other["Calibration"]["fitted"]["map"] == pytest.approx(one["Calibration"]["fitted"]["map"], rel=1e-6)
        assert torch.equal(other["Calibration"]["fitted"]["source"], one["Calibration"]["fitted"]["source"])
        for index in (0, 1):
            found, wanted = (fit["Decisions"]["fitted"]["thresholds"][index] for fit in (other, one))
            assert found["value"] == pytest.approx(wanted["value"], rel=1e-6)
            for count in ("positives", "negatives", "true_alarms", "false_alarms"):
                assert found[count] == wanted[count], count
    if loader == "plain":
        return
    for processes in (1, 2):
        run(processes, "predict", f"--ckpt_path={last}", f"--predictions.path={processes}.csv")
    files = [csv_rows(tmp_path / f"{processes}.csv") for processes in (1, 2)]
    assert [row["row"] for row in files[1]] == [str(n) for n in range(1, 541)]
    for row, other in zip(*files, strict=True):
        assert list(row) == list(other)
        assert [row["predicted"], row["decision"]] == [other["predicted"], other["decision"]]
        assert float(row["0"]) == pytest.approx(float(other["0"]), rel=1e-4, abs=1e-9)


def test_two_processes_stop_together_and_resume(run_imbsam, tmp_path):
    """SIGTERM to rank 1 alone; BatchNorm, dropout, and 67 validation images in 2 batches on rank 0 and 1 on rank 1."""
    settings = ["--trainer.devices=2", "--data.batch_size=16", "--data.eval_batch_size=33"]
    settings += ["--model.backbone.width=8", "--model.backbone.norm=batch", "--model.backbone.dropout=0.2"]
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    answer = run_imbsam(tmp_path / "whole", *ARGS, *settings, processes=2)
    assert answer["codes"] == [0, 0], answer["err"]
    answer = run_imbsam(tmp_path / "stopped", *ARGS, *settings, processes=2, signal=["SIGTERM", 5])
    assert answer["codes"] == [0, 0], answer["err"]
    assert "imbsam: interrupted by SIGTERM after epoch 0, batch 6; resume with --ckpt_path last" in answer["out"][0]
    assert "test accuracy" not in answer["out"][0]
    assert "imbsam:" not in answer["out"][1]
    settings += ["--data.images_on_device=true"]  # the images are the same
    answer = run_imbsam(tmp_path / "stopped", *ARGS, *settings, processes=2)
    assert answer["codes"] == [0, 0], answer["err"]
    assert "imbsam: resuming at epoch 0, batch 6" in answer["out"][0]
    (found, log), (wanted, wanted_log) = last(tmp_path / "stopped"), last(tmp_path / "whole")
    for name, value in wanted["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name
    for index, state in wanted["optimizer_states"][0]["state"].items():
        assert torch.equal(found["optimizer_states"][0]["state"][index]["momentum_buffer"], state["momentum_buffer"])
    assert log == wanted_log


def test_a_corrupt_image_ends_both_processes(run_imbsam, image_folder_root, tmp_path):
    """Only rank 1 meets it in the first epoch; rank 0 then waits for a gradient that never comes."""
    root = tmp_path / "images"
    shutil.copytree(image_folder_root, root)
    for image in sorted((root / "train/ant").iterdir())[:6]:
        image.write_bytes(b"no image")
    settings = ["fit", "--data=ImageFolderLTDataModule", f"--data.root={root}", "--data.image_size=8"]
    settings += ["--data.num_workers=1", "--data.batch_size=2", "--model=LongTailedClassifier"]
    settings += ["--model.backbone=CifarResNet20", "--model.backbone.width=8"]
    settings += ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.max_epochs=1"]
    answer = run_imbsam(tmp_path, *settings, processes=2, alone=True)
    assert 2 in answer["codes"]
    assert not {0, -14} & {*answer["codes"]}, answer  # -14: the alarm
    line = (
        "imbsam: error: image {}/train/ant/train {}.jpg is corrupt: the file is not an image: fix or remove it, or set"
    )
    said = answer["err"][answer["codes"].index(2)]
    assert any(line.format(root, i) in said for i in (0, 1, 10, 100, 101, 102)), said


def test_a_taken_port_ends_all_processes_in_one_line(tmp_path):
    """The second one would look for the first for half an hour, with the terminal in its hands."""
    with socket.socket() as other:
        other.bind(("", 0))
        port = other.getsockname()[1]
        done = run_command(tmp_path, *RANKS, "--trainer.devices=2", MASTER_PORT=str(port))
    assert done.returncode == 2, done
    assert f"imbsam: error: MASTER_PORT is {port}, which another program uses" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "setting",
    [
        "--model=test_processes.FailBeforeTheRendezvous",
        "--data=test_processes.FailAfterTheRendezvous",
    ],
)
def test_an_unexpected_error_of_the_first_process_ends_both(tmp_path, setting):
    """With its traceback, and soon: the other one would wait."""
    paths = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    done = run_command(tmp_path, *RANKS, "--trainer.devices=2", setting, PYTHONPATH=paths)
    seconds = time.time() - (tmp_path / "failed").stat().st_mtime
    assert done.returncode == 1, done
    assert "RuntimeError: a bug of the user's" in done.stderr
    assert "Traceback" in done.stderr
    assert seconds < 30
