"""Real runs with Lightning's WandbLogger and the real client, offline; its own reader reads what it wrote."""

import base64
import hashlib
import json
import sys

import pytest
import yaml

from tests.training import csv_rows

pytestmark = pytest.mark.processes

pytest.importorskip("wandb")

SHORT = [
    *("fit", "--config=configs/data/digits_lt.yaml", "--data.val_share=0.2", "--trainer.max_epochs=1"),
    *("--model.lr_scheduler.init_args.T_max=1", "--trainer.log_every_n_steps=1"),
]
OFFLINE = [*SHORT, "--config=configs/logger/wandb.yaml"]


@pytest.fixture(scope="module")
def logs(tmp_path_factory, run_imbsam):
    """Two seeds in one command; a third that is interrupted, resumed and tested once more."""
    root = tmp_path_factory.mktemp("wandb")
    env = {"HOME": str(root / "home"), "WANDB_SILENT": "true"}
    checkpoints = ["--trainer.logger=WandbLogger", "--trainer.logger.init_args.log_model=true"]
    third = [*OFFLINE, "--data.seed=2", "--seed_everything=2"]
    for answer in (
        run_imbsam(root, *SHORT, "--seeds", "0", "1", *checkpoints, env={**env, "WANDB_MODE": "offline"}),
        run_imbsam(root, *third, env=env, signal=["SIGTERM", 5]),
        run_imbsam(root, *third, "--ckpt_path=last", env=env),
        run_imbsam(root, "test", *third[1:], "--ckpt_path=last", env=env),
    ):
        assert answer["codes"] == [0], answer["err"]
    return root / "logs"


@pytest.fixture(scope="module")
def wandb_runs(logs):
    """Their folders, in the order in which they were begun."""
    return sorted(logs.glob("wandb/offline-run-*"), key=lambda folder: next(folder.glob("*.wandb")).stat().st_mtime_ns)


@pytest.fixture(scope="module")
def first(wandb_runs, read_wandb):
    return read_wandb(wandb_runs[0])


def merged(records, name):
    return {key: value for record in records[name] for key, value in record.get("update", {}).items()}


def table(folder, summary, key):
    found = json.loads((folder / "files" / summary[f"{key}.path"]).read_text())
    return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


def test_the_run_folder_is_as_without_wandb(logs):
    assert {path.name for path in logs.iterdir()} == {"digits_lt", "wandb"}
    evaluation, *runs = sorted((logs / "digits_lt/imbsam").iterdir())
    assert [evaluation.name, *(run.name for run in runs)] == ["test_0", "version_0", "version_1", "version_2"]
    assert (evaluation / "per_class.csv").read_bytes() == (runs[2] / "per_class.csv").read_bytes()
    for seed, run in enumerate(runs):
        assert {path.name for path in run.iterdir()} == {
            *("checkpoints", "config.yaml", "hparams.yaml", "metrics.csv"),
            *("per_class.csv", "confusion.csv", "calibration.csv", "facts.json"),
        }
        assert yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] == seed
        logged = csv_rows(run / "metrics.csv")
        assert [int(row["step"]) for row in logged if row["train/tail_rows"]] == list(range(9))


def test_name_group_and_settings(first):
    run = first["run"][-1]
    assert (run["display_name"], run["run_group"]) == ("digits_lt/imbsam/version_0", "digits_lt/imbsam")
    settings = {
        "model": "LongTailedClassifier",
        "model.sam.rho": 0.05,
        "model.backbone.width": 16,
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
    logged = csv_rows(logs / "digits_lt/imbsam/version_0/metrics.csv")
    summary = merged(first, "summary")
    measures = ("test/lowest_recall", "test/macro_f1", "test/top5_few", "test/ece_all", "test/backward_50")
    for name in ("test/many", "test/few", "test/all", "val/all", "train/loss_epoch", "train/tail_rows", *measures):
        assert summary[name] == pytest.approx([float(row[name]) for row in logged if row[name]][-1], rel=1e-5), name
    steps = [record["item"]["train/tail_rows"] for record in first["history"] if "train/tail_rows" in record["item"]]
    assert steps == [float(row["train/tail_rows"]) for row in logged if row["train/tail_rows"]]
    assert [record["exit_code"] for record in first["exit"]] == [0]


def test_tables_and_charts_are_those_of_the_run_folder(logs, wandb_runs, first):
    run, summary, folder = logs / "digits_lt/imbsam/version_0", merged(first, "summary"), wandb_runs[0]
    classes = table(folder, summary, "test/classes")
    expected = csv_rows(run / "per_class.csv")
    for row, wanted in zip(classes, expected, strict=True):
        for name in ("precision", "f1"):
            assert row.pop(name) == (float(wanted[name]) if wanted[name] else None)
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
        for row in csv_rows(run / "confusion.csv")
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
    assert [sorted(artifact["aliases"]) for artifact in models] == [["best", "latest"], ["latest"]]


def test_an_interrupted_run_is_resumed_under_its_id(logs, wandb_runs, read_wandb):
    ids = [folder.name.rpartition("-")[2] for folder in wandb_runs]
    assert len(set(ids[:3])) == 3, "each seed has its own run"
    assert ids[3] == ids[2]
    for version, wandb_id in enumerate(ids[:3]):
        hparams = yaml.safe_load((logs / f"digits_lt/imbsam/version_{version}/hparams.yaml").read_text())
        assert hparams["wandb_id"] == wandb_id
    interrupted, resumed = (read_wandb(folder) for folder in wandb_runs[2:4])
    for records, exit_code in ((interrupted, 1), (resumed, 0)):
        run = records["run"][-1]
        assert (run["display_name"], run["project"], run["resume"]) == ("digits_lt/imbsam/version_2", "imbsam", True)
        assert [record["exit_code"] for record in records["exit"]] == [exit_code]
    assert "test/classes.path" in merged(resumed, "summary")


def test_an_evaluation_has_a_run_of_its_own(wandb_runs, read_wandb):
    records = read_wandb(wandb_runs[4])
    run = records["run"][-1]
    assert run["display_name"] == "digits_lt/imbsam/test_0"
    assert wandb_runs[4].name.endswith(run["run_id"])
    assert run["run_id"] not in {"test_0", *(folder.name.rpartition("-")[2] for folder in wandb_runs[:4])}
    assert "test/classes.path" in merged(records, "summary")


def test_a_refused_run_leaves_nothing(tmp_path, tmp_path_factory, run_imbsam):
    """Refused once the data are loaded, when W&B's run has begun."""
    env = {"HOME": str(tmp_path_factory.mktemp("home"))}
    answer = run_imbsam(tmp_path, *OFFLINE, "--model.sam.tail_classes=[10]", env=env)
    (err,) = answer["err"]
    assert "Run data is saved locally in" in err
    assert err.splitlines()[-1].startswith("imbsam: error: tail_classes holds 10")
    assert answer["codes"] == [2]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith("offline-run")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.logger.init_args.offline=false"], "trainer.logger is WandbLogger: No API key configured"),
        (["--trainer.logger.init_args.log_model=true"], "trainer.logger.init_args.log_model is True: Lightning"),
    ],
)
def test_what_wandb_refuses_is_one_line(tmp_path, run_imbsam, arguments, message):
    env = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": ""}
    answer = run_imbsam(tmp_path, *OFFLINE, *arguments, env=env)
    assert answer["codes"] == [2]
    assert answer["err"][0].splitlines()[-1].startswith(f"imbsam: error: {message}")
    assert not list(tmp_path.rglob("version_*"))


def test_without_wandb_the_line_says_how_to_install_it(imbsam, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = imbsam(*OFFLINE)
    assert code == 2
    assert 'pip install "wandb>=0.31"' in err.splitlines()[-1]


def test_two_processes_are_one_run_and_loggers_may_be_listed(tmp_path, run_imbsam, read_wandb):
    """With the WandbLogger before the CSV log, as a user may list them."""
    csv_logger = "lightning_modules.resuming.csv_logger.ResumableCSVLogger"
    loggers = [
        {"class_path": "WandbLogger", "init_args": {"offline": True, "name": "mine"}},
        {"class_path": csv_logger, "init_args": {"save_dir": "runs", "name": "two"}},
    ]
    two = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    answer = run_imbsam(
        tmp_path,
        *(*SHORT, *two, f"--trainer.logger={json.dumps(loggers)}"),
        **{"processes": 2, "env": {"WANDB_SILENT": "true"}},
    )
    assert answer["codes"] == [0, 0], answer["err"]
    (folder,) = tmp_path.rglob("offline-run-*")
    records = read_wandb(folder)
    assert records["run"][-1]["display_name"] == "mine"
    assert merged(records, "config")["processes"] == 2
    assert "test/classes.path" in merged(records, "summary")
    assert [record["exit_code"] for record in records["exit"]] == [0]
    run = tmp_path / "runs/two/version_0"
    assert {"config.yaml", "metrics.csv", "per_class.csv", "checkpoints"} <= {path.name for path in run.iterdir()}
