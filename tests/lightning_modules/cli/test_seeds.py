"""`imbsam fit --seeds 0 1 2`: one run for each seed, as if each had been started by itself."""

import csv

import pytest
import torch
import yaml

from imbsam import SettingError
from lightning_modules.cli.seeds import split_seeds
from tests.programs import run_command

SHORT = ["--config", "configs/data/digits_lt.yaml", "--trainer.max_epochs=1"]


def loss(run):
    with (run / "metrics.csv").open(newline="") as file:
        return [row["train/loss_epoch"] for row in csv.DictReader(file) if row["train/loss_epoch"]]


def test_each_seed_has_a_command_line_of_its_own():
    assert split_seeds(["fit", "--config=a", "--seeds", "0", "12", "--model.sam.rho", "0.1"]) == [
        ["fit", "--config=a", "--seeds", "0", "--model.sam.rho", "0.1"],
        ["fit", "--config=a", "--seeds", "12", "--model.sam.rho", "0.1"],
    ]
    assert split_seeds(["fit", "--config=a"]) == [["fit", "--config=a"]]
    for wrong, line in ((["--seeds"], "seeds is empty"), (["--seeds", "1", "1"], "seeds is 1 1: name each seed once")):
        with pytest.raises(SettingError, match=line):
            split_seeds(["fit", *wrong])


def test_runs_are_those_of_one_seed_each(imbsam, tmp_path):
    code, _, _ = imbsam("fit", *SHORT, "--seeds", "3", "4")
    assert code == 0
    runs = sorted((tmp_path / "logs/digits_lt/imbsam").iterdir())
    for run, seed in zip(runs, (3, 4), strict=True):
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert (config["seed_everything"], config["data"]["init_args"]["seed"], config["seeds"]) == (seed, seed, None)
    imbsam("fit", *SHORT, "--seed_everything=4", "--data.seed=4")
    alone = tmp_path / "logs/digits_lt/imbsam/version_2"
    assert loss(alone) == loss(runs[1]) != loss(runs[0])
    weights = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (alone, runs[1])]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_a_wrong_setting_ends_it_with_one_line(imbsam, tmp_path):
    code, _, err = imbsam("fit", *SHORT, "--seeds", "0", "1", "--model.sam.rho=-1")
    assert (code, err.count("imbsam: error:")) == (2, 1)
    code, _, err = imbsam("fit", *SHORT, "--seeds")
    assert (code, "seeds is empty" in err) == (2, True)


NETWORKS = """
import weakref
from lightning.pytorch import Callback

networks = []


class CountNetworks(Callback):
    def setup(self, trainer, pl_module, stage):
        if stage == "fit":
            networks.append(weakref.ref(pl_module))
            print("networks:", sum(network() is not None for network in networks))
"""


def test_the_network_of_a_seed_is_gone_when_the_next_begins(imbsam, tmp_path, monkeypatch):
    """With its memory, and its process group: at one MASTER_PORT the next run would meet in the store of the last."""
    (tmp_path / "count_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    short = ["--trainer.limit_train_batches=1", "--trainer.callbacks+=count_networks.CountNetworks"]
    code, out, _ = imbsam("fit", *SHORT, *short, "--seeds", "3", "4")
    assert (code, out.count("networks: 1"), out.count("networks: 2")) == (0, 2, 0)


@pytest.mark.processes
def test_two_processes_for_each_seed(tmp_path):
    """Lightning starts the second process anew for every seed; they meet at the same port."""
    arguments = ["fit", *SHORT, "--seeds", "0", "1", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    arguments += ["--trainer.strategy=ddp"]
    done = run_command(tmp_path, *arguments)
    assert done.returncode == 0, done
    assert sorted(p.name for p in (tmp_path / "logs/digits_lt/imbsam").iterdir()) == ["version_0", "version_1"]
    assert done.stdout.count("test accuracy in %") == 2
