"""Real runs with the real client in offline mode; what it wrote is read back with the client's own reader."""

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

from lightning_modules.cli import main

wandb = pytest.importorskip("wandb")

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
FIT = ["fit", "--config=configs/digits_lt/imbsam.yaml", "--config=configs/logger/wandb.yaml"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SHORT = [*QUIET, "--trainer.max_epochs=1", "--model.lr_scheduler.init_args.T_max=1", "--data.val_share=0.2"]
CSV_FILES = ("per_class.csv", "confusion.csv", "calibration.csv")


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["imbsam", *map(str, arguments)])
    main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs one after the other, then the first one goes on for an epoch; logs/digits_lt/imbsam."""
    root = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("HOME", str(root / "home"))
        # the best checkpoint of the first run differs from its last one
        best = ["--checkpoint.monitor=val/loss", "--checkpoint.mode=max", "--checkpoint.save_top_k=1"]
        two = ["--trainer.max_epochs=2", "--model.lr_scheduler.init_args.T_max=2"]
        run_command(patch, *FIT, *SHORT, *two, *best)
        run_command(patch, *FIT, *SHORT, "--model.sam.rho=0.1", "--wandb.tags=[mine]", "--wandb.checkpoints=false")
    return root / "logs/digits_lt/imbsam"


def offline_run(run):
    (found,) = run.glob("wandb/offline-run-*")
    return found


def records(run):
    """The records of its log by type, in order."""
    (log,) = offline_run(run).glob("*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {}
    for line in done.stdout.splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found


@pytest.fixture(scope="module")
def first(folder):
    return records(folder / "version_0")


@pytest.fixture(scope="module")
def second(folder):
    return records(folder / "version_1")


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def merged(records, name):
    return {key: value for record in records[name] for key, value in record.get("update", {}).items()}


def table(run, summary, key):
    found = json.loads((offline_run(run) / "files" / summary[f"{key}.path"]).read_text())
    return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


def test_name_group_tags_and_settings(first, second):
    (run,) = first["run"]
    assert (run["display_name"], run["run_group"], run["project"], run["job_type"]) == (
        *("digits_lt/imbsam/version_0", "digits_lt/imbsam", "imbsam", "fit"),
    )
    assert run["tags"] == ["ImbSAM", "DigitsLT", "small_cnn"]
    config = merged(first, "config")
    settings = {
        "model": "LongTailedClassifier",
        "model.sam.rho": 0.05,
        "model.sam.eta": 20,
        "model.backbone_args.width": 16,
        "model.optimizer": "SGD",
        "model.optimizer.lr": 0.05,
        "data": "DigitsLTDataModule",
        "data.ratio": 50,
        "trainer.max_epochs": 2,
        "seed_everything": 0,
        "processes": 1,
    }
    assert {key: config.get(key) for key in settings} == settings
    assert "rho" not in config, "the model's settings are logged once"
    assert second["run"][0]["tags"] == ["mine"]
    assert merged(second, "config")["model.sam.rho"] == 0.1
    assert second["run"][0]["run_id"] != run["run_id"]


def test_results_are_those_of_the_run_folder(folder, first):
    run, summary = folder / "version_0", merged(first, "summary")
    logged = rows(run / "metrics.csv")
    for name in ("test/many", "test/medium", "test/few", "test/all", "val/all", "train/loss_epoch", "train/tail_rows"):
        last = [float(row[name]) for row in logged if row[name]][-1]
        assert summary[name] == pytest.approx(last, rel=1e-5), name
    steps = [item["item"]["train/tail_rows"] for item in first["history"] if "train/tail_rows" in item["item"]]
    assert steps == [float(row["train/tail_rows"]) for row in logged if row["train/tail_rows"]]


def test_tables_and_charts(folder, first):
    run, summary = folder / "version_0", merged(first, "summary")
    classes = rows(run / "per_class.csv")
    found = table(run, summary, "test/classes")
    assert [{key: str(int(v) if key == "tail" else v) for key, v in row.items()} for row in found] == [
        {**row, "accuracy": str(float(row["accuracy"]))} for row in classes
    ]
    chart = table(run, summary, "test/accuracy_by_count_table")
    assert [(p["class_name"], p["accuracy"]) for p in chart] == [(r["class_name"], r["accuracy"]) for r in found]
    assert [round(10 ** p["log10 training samples"]) for p in chart] == [r["training_samples"] for r in found]
    cells = table(run, summary, "test/confusion_cells")
    expected = rows(run / "confusion.csv")
    assert [[str(c[key]) for key in ("target", "predicted", "count")] for c in cells] == [
        list(c.values()) for c in expected
    ]
    matrix = {(c["Actual"], c["Predicted"]): c["nPredictions"] for c in table(run, summary, "test/confusion_table")}
    assert len(matrix) == 100
    assert {pair: n for pair, n in matrix.items() if n} == {
        (c["target_name"], c["predicted_name"]): c["count"] for c in cells
    }
    config = merged(first, "config")
    assert config["_wandb.visualize.test/accuracy_by_count"]["panel_config"]["panelDefId"] == "wandb/scatter/v0"
    assert "confusion_matrix" in config["_wandb.visualize.test/confusion"]["panel_config"]["panelDefId"]


def test_checkpoints_and_files_are_complete(folder, first, second):
    """Whatever a sync would send lies in the run's folder, and the log has its end."""
    run = folder / "version_0"
    models = {
        tuple(sorted(a["aliases"])): a["manifest"]["contents"][0] for a in first["artifact"] if a["type"] == "model"
    }
    assert {aliases: Path(content["local_path"]) for aliases, content in models.items()} == {
        ("best", "latest"): next((run / "checkpoints").glob("epoch=*.ckpt")),
        ("last", "latest"): run / "checkpoints/last.ckpt",
    }
    for artifact in first["artifact"]:
        for content in artifact["manifest"]["contents"]:
            path = Path(content["local_path"])
            assert path.is_relative_to(run)
            assert base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode() == content["digest"]
    saved = {file["path"] for record in first["files"] for file in record["files"]}
    assert {*CSV_FILES, "resolved_config.yaml"} <= saved
    assert all((offline_run(run) / "files" / name).exists() for name in saved)
    for name in CSV_FILES:
        assert (offline_run(run) / "files" / name).read_bytes() == (run / name).read_bytes()
    assert [record["exit_code"] for record in first["exit"]] == [0]
    assert not [a for a in second["artifact"] if a["type"] == "model"], "wandb.checkpoints is false"
    assert not (folder.parents[2] / "home/.local").exists()


def test_every_run_keeps_its_config(folder):
    rho = [
        yaml.safe_load((folder / f"version_{n}/config.yaml").read_text())["model"]["init_args"]["sam"]["init_args"][
            "rho"
        ]
        for n in (0, 1)
    ]
    assert rho == [0.05, 0.1]
    assert not list(folder.parents[1].glob("*.yaml"))
    assert {path.name for path in folder.iterdir()} == {"version_0", "version_1"}


def test_a_resumed_run_goes_on_under_its_id(folder, second, monkeypatch):
    run = folder / "version_1"
    monkeypatch.chdir(folder.parents[2])
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_command(
        monkeypatch,
        *(*FIT, *SHORT, "--trainer.max_epochs=2", "--model.lr_scheduler.init_args.T_max=2"),
        *(f"--ckpt_path={run}/checkpoints/last.ckpt", "--trainer.logger.init_args.version=1"),
    )
    assert {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")} == {second["run"][0]["run_id"]}


def test_a_refused_run_leaves_nothing(tmp_path, monkeypatch):
    from lightning_modules import LongTailedClassifier

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(SystemExit):
        run_command(monkeypatch, *FIT, *SHORT, "--model.optimizer.init_args.lr=-1")

    def broken(self, batch, batch_idx):
        assert wandb.run is not None
        raise ValueError("a bug")

    monkeypatch.setattr(LongTailedClassifier, "training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        run_command(monkeypatch, *FIT, *SHORT)
    assert wandb.run is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_online_without_an_account_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(SystemExit):
        run_command(monkeypatch, *FIT, *SHORT, "--wandb.mode=online")
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("imbsam: error: wandb.mode is online: ")
    assert said.endswith("(offline needs no account)")
    assert not list(tmp_path.glob("logs/**/version_*"))


def test_two_processes_are_one_run(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lightning_modules.cli", *FIT, *SHORT),
            *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"),
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
    found = records(tmp_path / "logs/digits_lt/imbsam/version_0")
    assert merged(found, "config")["processes"] == 2
    assert len(found["exit"]) == 1
    assert len(list(tmp_path.rglob("*.wandb"))) == 1
