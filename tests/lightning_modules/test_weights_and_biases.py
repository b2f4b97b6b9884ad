"""Real runs with Lightning's WandbLogger and the real client, offline; its own reader reads what it wrote."""

import base64
import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_modules import LongTailedClassifier
from lightning_modules.cli import main

wandb = pytest.importorskip("wandb")

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
SHORT = [
    *("fit", "--config=configs/digits_lt/imbsam.yaml", "--data.val_share=0.2", "--trainer.max_epochs=1"),
    *("--model.lr_scheduler.init_args.T_max=1", "--trainer.log_every_n_steps=1"),
]
OFFLINE = [*SHORT, "--config=configs/logger/wandb.yaml"]


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["imbsam", *map(str, arguments)])
    main()


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Two seeds with the shortest command, then the second one resumed for an epoch, with the overlay's settings."""
    root = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("HOME", str(root / "home"))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_MODE", "offline")
        wandb_logger = ["--trainer.logger=WandbLogger", "--trainer.logger.init_args.log_model=true"]
        run_command(patch, *SHORT, "--seeds", 0, 1, *wandb_logger)
        resumed = ["--data.seed=1", "--seed_everything=1", "--trainer.max_epochs=2", "--ckpt_path=last"]
        run_command(patch, *OFFLINE, *resumed)
        wandb.teardown()  # its service too, whose current folder is this one
    return root / "logs"


@pytest.fixture(scope="module")
def wandb_runs(logs):
    """Their folders, in the order in which they were begun."""
    return sorted(logs.glob("wandb/offline-run-*"), key=lambda folder: (folder / "files").stat().st_ctime_ns)


@pytest.fixture(scope="module")
def first(wandb_runs, read_wandb):
    return read_wandb(wandb_runs[0])


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def merged(records, name):
    return {key: value for record in records[name] for key, value in record.get("update", {}).items()}


def table(folder, summary, key):
    found = json.loads((folder / "files" / summary[f"{key}.path"]).read_text())
    return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


def test_the_run_folder_is_as_without_wandb(logs):
    assert {path.name for path in logs.iterdir()} == {"digits_lt", "wandb"}
    assert {path.name for path in (logs / "digits_lt/imbsam").iterdir()} == {"version_0", "version_1"}
    for version, seed, epochs in ((0, 0, 1), (1, 1, 2)):
        run = logs / f"digits_lt/imbsam/version_{version}"
        assert {path.name for path in run.iterdir()} == {
            *("checkpoints", "config.yaml", "hparams.yaml", "metrics.csv"),
            *("per_class.csv", "confusion.csv", "calibration.csv"),
        }
        assert yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] == seed
        assert len([row for row in rows(run / "metrics.csv") if row["train/loss_epoch"]]) == epochs


def test_name_group_and_settings(first):
    run = first["run"][-1]
    assert (run["display_name"], run["run_group"]) == ("digits_lt/imbsam/version_0", "digits_lt/imbsam")
    settings = {
        "model": "LongTailedClassifier",
        "model.rho": 0.05,
        "model.backbone_args.width": 16,
        "model.optimizer.lr": 0.05,
        "data": "DigitsLTDataModule",
        "data.ratio": 50,
        "trainer.max_epochs": 1,
        "seed_everything": 0,
        "processes": 1,
    }
    config = merged(first, "config")
    assert {key: config.get(key) for key in settings} == settings


def test_metrics_are_those_of_the_run_folder(logs, first):
    logged = rows(logs / "digits_lt/imbsam/version_0/metrics.csv")
    summary = merged(first, "summary")
    for name in ("test/many", "test/few", "test/all", "val/all", "train/loss_epoch", "train/tail_rows"):
        assert summary[name] == pytest.approx([float(row[name]) for row in logged if row[name]][-1], rel=1e-5), name
    steps = [record["item"]["train/tail_rows"] for record in first["history"] if "train/tail_rows" in record["item"]]
    assert steps == [float(row["train/tail_rows"]) for row in logged if row["train/tail_rows"]]
    assert [record["exit_code"] for record in first["exit"]] == [0]


def test_tables_and_charts_are_those_of_the_run_folder(logs, wandb_runs, first):
    run, summary, folder = logs / "digits_lt/imbsam/version_0", merged(first, "summary"), wandb_runs[0]
    classes = table(folder, summary, "test/classes")
    expected = rows(run / "per_class.csv")
    assert [{**row, "accuracy": f"{row['accuracy']:.4f}"} for row in classes] == [
        {
            **{key: int(row[key]) for key in ("class", "training_samples", "tail", "test_samples")},
            **{key: row[key] for key in ("class_name", "group")},
            "accuracy": f"{float(row['accuracy']):.4f}",
        }
        for row in expected
    ]
    chart = table(folder, summary, "test/accuracy_by_count_table")
    assert [(p["class_name"], p["accuracy"]) for p in chart] == [(r["class_name"], r["accuracy"]) for r in classes]
    assert [round(10 ** p["log10 of training samples"]) for p in chart] == [r["training_samples"] for r in classes]

    names = [row["class_name"] for row in expected]
    cells = {
        (names[int(row["target"])], names[int(row["predicted"])]): int(row["count"])
        for row in rows(run / "confusion.csv")
    }
    pairs = table(folder, summary, "test/confusion_pairs")
    assert {(p["target"], p["predicted"]): p["count"] for p in pairs} == cells
    assert [p["count"] for p in pairs] == sorted(cells.values(), reverse=True)
    matrix = {(c["Actual"], c["Predicted"]): c["nPredictions"] for c in table(folder, summary, "test/confusion_table")}
    assert len(matrix) == 100
    assert {pair: count for pair, count in matrix.items() if count} == cells
    config = merged(first, "config")
    assert config["_wandb.visualize.test/accuracy_by_count"]["panel_config"]["panelDefId"] == "wandb/scatter/v0"
    assert "confusion_matrix" in config["_wandb.visualize.test/confusion"]["panel_config"]["panelDefId"]


def test_log_model_logs_the_best_and_the_last_checkpoint(logs, first):
    def md5(name):
        path = logs / "digits_lt/imbsam/version_0/checkpoints" / name
        return base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()

    models = [artifact for artifact in first["artifact"] if artifact["type"] == "model"]
    digests = [artifact["manifest"]["contents"][0]["digest"] for artifact in models]
    assert digests == [md5("best.ckpt"), md5("last.ckpt")]
    assert [artifact["aliases"] for artifact in models] == [["latest", "best"], ["latest"]]


def test_a_resumed_run_keeps_its_id(logs, wandb_runs, read_wandb):
    ids = [folder.name.rpartition("-")[2] for folder in wandb_runs]
    assert ids[0] != ids[1] == ids[2]
    hparams = [yaml.safe_load((logs / f"digits_lt/imbsam/version_{n}/hparams.yaml").read_text()) for n in (0, 1)]
    assert [found["wandb_id"] for found in hparams] == ids[:2]
    run = read_wandb(wandb_runs[2])["run"][-1]
    assert (run["display_name"], run["project"]) == ("digits_lt/imbsam/version_1", "imbsam")
    assert run["resume"]


@pytest.fixture
def quiet(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "")  # an offline WandbLogger sets it
    monkeypatch.delenv("WANDB_MODE")
    yield monkeypatch
    wandb.teardown()


def test_a_refused_run_leaves_nothing(tmp_path, quiet, capsys):
    with pytest.raises(SystemExit):
        run_command(quiet, *OFFLINE, "--model.tail_classes=[10]")  # known once the data is there, and W&B's run began
    assert capsys.readouterr().err.splitlines()[-1].startswith("imbsam: error: tail_classes holds 10")
    assert wandb.run is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith("offline-run")]


def test_a_run_that_fails_in_its_first_step_leaves_nothing(tmp_path, quiet):
    def broken(self, batch, batch_idx):
        assert wandb.run is not None
        raise ValueError("a bug")

    quiet.setattr(LongTailedClassifier, "training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        run_command(quiet, *OFFLINE)
    assert wandb.run is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith("offline-run")]


def test_a_run_that_fails_later_is_kept_as_failed(tmp_path, quiet, read_wandb):
    def broken(self, batch, batch_idx):
        raise ValueError("a bug")

    quiet.setattr(LongTailedClassifier, "validation_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        run_command(quiet, *OFFLINE, "--trainer.num_sanity_val_steps=0")
    (folder,) = tmp_path.glob("logs/wandb/offline-run-*")
    assert [record["exit_code"] for record in read_wandb(folder)["exit"]] == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.logger.init_args.offline=false"], "No API key configured"),
        (["--trainer.logger.init_args.log_model=true"], "log_model is True: Lightning logs no checkpoints offline"),
    ],
)
def test_what_wandb_refuses_is_one_line(tmp_path, quiet, capsys, arguments, message):
    quiet.setenv("NETRC", str(tmp_path / "netrc"))
    quiet.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(SystemExit) as stop:
        run_command(quiet, *OFFLINE, *arguments)
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("imbsam: error: ")
    assert message in line
    assert not list(tmp_path.rglob("version_*"))


def test_without_wandb_the_line_says_how_to_install_it(tmp_path, quiet, capsys):
    quiet.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as stop:
        run_command(quiet, *OFFLINE)
    assert stop.value.code == 2
    assert 'pip install "wandb>=0.31"' in capsys.readouterr().err.splitlines()[-1]
    quiet.undo()


def test_two_processes_are_one_run_and_loggers_may_be_listed(tmp_path, read_wandb):
    """With the WandbLogger before the CSV log, as a user may list them."""
    loggers = [
        {"class_path": "WandbLogger", "init_args": {"offline": True, "name": "mine"}},
        {
            "class_path": "lightning_modules.csv_logger.ResumableCSVLogger",
            "init_args": {"save_dir": "runs", "name": "two"},
        },
    ]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lightning_modules.cli", *SHORT, f"--trainer.logger={json.dumps(loggers)}"),
            *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"),
            "--trainer.enable_progress_bar=false",
        ],
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if name not in RANKS},
            **{"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"},
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("logs/wandb/offline-run-*")
    records = read_wandb(folder)
    assert records["run"][-1]["display_name"] == "mine"
    assert merged(records, "config")["processes"] == 2
    assert len(records["exit"]) == 1
    assert "test/classes.path" in merged(records, "summary")
    run = tmp_path / "runs/two/version_0"
    assert {"config.yaml", "metrics.csv", "per_class.csv", "checkpoints"} <= {path.name for path in run.iterdir()}
