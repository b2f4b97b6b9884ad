"""`kill -9` at any moment: `--ckpt_path last` resumes the run, which ends bit-identically."""

import csv
import random
import signal
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.processes

ARGS = [
    "fit",
    "--config=configs/data/digits_lt.yaml",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=3",
    "--trainer.log_every_n_steps=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--model.lr_scheduler.init_args.T_max=3",
    "--model.backbone.width=8",
    "--model.backbone.dropout=0.2",
    "--data.val_share=0.2",
    "--checkpoint.every_seconds=0",
    "--ckpt_path=last",
]
RUN = Path("logs/digits_lt/imbsam/version_0")
STEPS = 3 * 9


def weights_optimizer_log(folder):
    checkpoint = torch.load(folder / RUN / "checkpoints/last.ckpt", weights_only=True)
    with (folder / RUN / "metrics.csv").open(newline="") as file:
        log = [{name: value for name, value in row.items() if name != "train/seconds"} for row in csv.DictReader(file)]
    return checkpoint["state_dict"], checkpoint["optimizer_states"], log


def assert_same(found, wanted):
    for name, value in wanted[0].items():
        assert torch.equal(found[0][name], value), name
    for index, state in wanted[1][0]["state"].items():
        assert torch.equal(found[1][0]["state"][index]["momentum_buffer"], state["momentum_buffer"])
    assert found[2] == wanted[2]


@pytest.fixture(scope="module")
def uninterrupted(run_imbsam, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    answer = run_imbsam(folder, *ARGS)
    assert answer["codes"] == [0], answer["err"]
    assert "starting a new run" in answer["out"][0]
    return weights_optimizer_log(folder)


def kill_and_resume(run_imbsam, folder, uninterrupted, kind, number):
    answer = run_imbsam(folder, *ARGS, kill=[kind, number])
    finished = answer["codes"] == [0]
    assert finished or answer["codes"] == [-signal.SIGKILL], answer["err"]
    answer = run_imbsam(folder, *ARGS)
    assert answer["codes"] == [0], answer["err"]
    lines = [line for line in answer["out"][0].splitlines() if line.startswith("imbsam: ")]
    assert len(list(folder.glob("logs/digits_lt/imbsam/*"))) == 1  # it resumed in its folder
    assert_same(weights_optimizer_log(folder), uninterrupted)
    return finished, lines


@pytest.mark.parametrize(("kind", "number"), [("at w + e", 13), ("mid-write", 8)])
def test_killed(run_imbsam, tmp_path, uninterrupted, kind, number):
    finished, lines = kill_and_resume(run_imbsam, tmp_path, uninterrupted, kind, number)
    assert not finished
    assert "resuming at epoch" in lines[-1]
    assert not lines[-1].endswith("epoch 0, batch 0")


@pytest.mark.slow
def test_killed_twenty_times(run_imbsam, tmp_path, uninterrupted, capsys):
    """8 at any moment, 6 while the weights are perturbed, 6 while a checkpoint is written; prints a Markdown table."""
    draw = random.Random(0)
    kills = [("any moment", draw.uniform(2, STEPS - 2)) for _ in range(8)]
    kills += [("at w + e", draw.randint(1, 20)) for _ in range(6)]
    kills += [("mid-write", draw.randint(2, STEPS)) for _ in range(3)]
    kills += [("between the renames", draw.randint(2, STEPS)) for _ in range(3)]
    table = ["| kill -9 | at | resumed | bit-identical |", "| --- | --- | --- | --- |"]
    killed = 0
    for index, (kind, number) in enumerate(kills):
        folder = tmp_path / str(index)
        folder.mkdir()
        finished, lines = kill_and_resume(run_imbsam, folder, uninterrupted, kind, number)
        killed += not finished
        resumed = "the run had ended" if finished else lines[-1].removeprefix("imbsam: ")
        table.append(f"| {kind} | {number:.3g} | {resumed} | yes |")
    with capsys.disabled():
        print("\n" + "\n".join(table))
    assert killed == len(kills)
