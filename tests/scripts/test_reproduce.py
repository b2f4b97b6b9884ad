"""scripts/reproduce.py on the digits, in real processes."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.programs import PATIENCE, REPOSITORY

SHORT = [
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
EVERY_EPOCH = f"--config={REPOSITORY}/configs/trainer/test_every_epoch.yaml"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    """The scripts import their own package."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))


def start(cwd, *arguments):
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "scripts/reproduce.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def reproduce(cwd, *arguments):
    process = start(cwd, *arguments)
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def test_every_row_names_a_config():
    from reproduction.tables import tables

    known = tables()
    for name, rows in known.items():
        assert len({row.name for row in rows}) == len(rows), name
        for row in rows:
            for piece in row.pieces:
                assert (REPOSITORY / f"configs/{piece}.yaml").exists(), row
            if row.table != name:  # shared with another table, so trained alike there
                (other,) = (other for other in known[row.table] if other.name == row.name)
                assert (row.pieces, row.settings) == (other.pieces, other.settings)


def test_published_numbers_match_their_rows_and_the_docs():
    from reproduction.tables import published, published_table, tables

    found = {row.name: row.published.get("all") for row in tables()["cifar100_lt"]}
    assert found == {
        "sgd": 47.6,
        "sgd_doubled_tail": None,
        "sam": 48.9,
        "sam_doubled_tail": None,
        "imbsam_doubled_tail": 51.1,
        "imbsam_doubled_tail_published_gradient": 51.1,
        "imbsam_doubled_tail_rho_0.1": None,
    }
    assert tables()["cifar100_lt_50"][0].published == {}
    lift = {name: rows[0].published["all"] for name, rows in tables().items() if name.endswith("_clip")}
    assert lift == {
        "cifar100_lt_clip": 81.7,
        "imagenet_lt_clip": 78.3,
        "places_lt_clip": 52.2,
        "inaturalist2018_clip": 80.4,
    }
    for entry in published():
        for piece in entry["pieces"]:
            assert (REPOSITORY / f"configs/{piece}.yaml").exists(), entry
    assert published_table() in (REPOSITORY / "docs/benchmarks.md").read_text()


@pytest.mark.processes
def test_a_table_is_interrupted_and_resumed(tmp_path):
    rows = ["--rows", "imbsam_doubled_tail", "--seeds", "0"]
    code, out, err = reproduce(tmp_path, "digits_lt", *rows, "--minutes", "0.001", "--", *SHORT)
    assert code == 0, err
    assert "digits_lt: 0 of 1 runs are finished" in out
    assert "not finished: run the same command again to resume" in err
    code, out, err = reproduce(tmp_path, "digits_lt", *rows, "--", *SHORT)
    assert code == 0, err
    header, _, imbsam = table = out.strip().splitlines()[-3:]
    assert header == "| digits_lt | seeds | epochs | many | medium | few | all |"
    assert imbsam.startswith("| ImbSAM, tail loss doubled | 1 | 2 | ")
    assert (tmp_path / "logs/reproduce/digits_lt/imbsam_doubled_tail/seed_0/version_0/checkpoints/last.ckpt").exists()
    again = reproduce(tmp_path, "digits_lt", *rows)  # trains nothing, so takes seconds
    assert "digits_lt: 1 of 1 runs are finished" in again[1]
    assert again[1].strip().splitlines()[-3:] == table
    assert reproduce(tmp_path, "digits_lt", *rows, "--table")[1].strip().splitlines() == table


@pytest.mark.processes
def test_runs_side_by_side_and_one_that_fails(tmp_path):
    """The failing seed's folder cannot be made; the two others finish, with the test set after every epoch."""
    row = tmp_path / "logs/reproduce/digits_lt/sgd"
    (row / "seed_1").mkdir(parents=True)
    (row / "seed_1/version_0").write_text("in the way")
    side_by_side = ["--rows", "sgd", "--seeds", "0", "1", "2", "--jobs", "3"]
    code, out, err = reproduce(tmp_path, "digits_lt", *side_by_side, "--", *SHORT[:1], EVERY_EPOCH)
    assert code == 1
    for seed in range(3):
        assert f"SGD, seed {seed}: logs/reproduce/digits_lt/sgd/seed_{seed}/output.txt" in out
    assert "SGD, seed 1 failed with code" in err
    assert "see logs/reproduce/digits_lt/sgd/seed_1/output.txt" in err
    assert "version_0" in (row / "seed_1/output.txt").read_text()  # says what was in the way
    output = (row / "seed_2/output.txt").read_text()
    assert "test accuracy in %" in output
    assert "it/s" not in output  # no progress bar
    header, _, sgd = out.strip().splitlines()[-5:-2]
    assert "| mirrored: many" in header
    assert "| chosen on the test set, never for comparing methods: many" in header
    assert sgd.startswith("| SGD | 2 | 2 | ")
    assert out.strip().splitlines()[-1].startswith("Accuracies are of the last epoch")


@pytest.mark.processes
def test_sigterm_stops_all_runs_with_a_checkpoint(tmp_path):
    """Sent in mid-training; both resume from there, and the log of the test set has every epoch once."""
    settings = [*SHORT, "--trainer.max_epochs=30", EVERY_EPOCH]
    arguments = ["digits_lt", "--rows", "sgd", "--seeds", "0", "1", "--jobs", "2", "--", *settings]
    process = start(tmp_path, *arguments)
    logs = [tmp_path / f"logs/reproduce/digits_lt/sgd/seed_{seed}/version_0/metrics.csv" for seed in (0, 1)]
    while not all(log.exists() for log in logs):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted: run the same command again to resume" in err
    for log in logs:
        assert "interrupted by SIGTERM" in (log.parents[1] / "output.txt").read_text()
        assert (log.parent / "checkpoints/last.ckpt").exists()
    code, out, err = reproduce(tmp_path, *arguments)
    assert code == 0, err
    assert "digits_lt: 0 of 2 runs are finished" in out
    for log in logs:
        assert "resuming at epoch" in (log.parents[1] / "output.txt").read_text()
        with log.open() as file:
            rows = [row for row in csv.DictReader(file) if row["epochs_on_test_set/all"]]
        assert [int(row["epoch"]) for row in rows] == list(range(30))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["digits_lt", "--rows", "adam"],
            "--rows: no adam; digits_lt has sgd, sgd_doubled_tail, sam, sam_doubled_tail, imbsam_doubled_tail",
        ),
        (["digits_lt", "--jobs", "0"], "--jobs is 0: give a number from 1"),
        (["pack", "--root", ".", "images.zip"], "pack: name the file to write, ending in .npz"),
        (["pack"], "pack: name the file to write, ending in .npz"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    code, _, err = reproduce(tmp_path, *arguments)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_jobs_too(number, tmp_path):
    """Of three jobs two are running and the third never starts."""
    script = (
        "import sys; from pathlib import Path; from reproduction.processes import Job, Processes\n"
        "sleep = [sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(100)']\n"
        "Processes(2).run([Job(f'job {i}', sleep, Path(f'{i}.txt')) for i in range(3)])"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "scripts")}
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    files = [tmp_path / f"{i}.txt" for i in range(2)]
    while not all(file.exists() and file.read_text().endswith("\n") for file in files):
        time.sleep(0.02)
    parent.send_signal(number)
    _, err = parent.communicate(timeout=30)
    assert parent.returncode == 1
    assert err == b"interrupted: run the same command again to resume\n"
    assert not (tmp_path / "2.txt").exists()
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_jobs_run_side_by_side_and_a_failure_is_reported(tmp_path, capsys):
    """Each of the two waits for the other's file, so they must run at once; the third is not stopped by the second."""
    from reproduction.processes import Job, Processes

    def job(own, other, code):
        text = (
            f"import pathlib, time; pathlib.Path({str(own)!r}).touch(); other = pathlib.Path({str(other)!r})\n"
            f"while not other.exists(): time.sleep(0.02)\nprint('done'); raise SystemExit({code})"
        )
        return Job(own.name, [sys.executable, "-c", text], tmp_path / f"{own.name}.txt")

    a, b, c = (tmp_path / name for name in "abc")
    processes = Processes(at_once=2)
    processes.run([job(a, b, 0), job(b, a, 3), job(c, a, 0)])
    assert [failed.title for failed in processes.failed] == ["b"]
    assert capsys.readouterr().err == f"b failed with code 3: see {tmp_path}/b.txt\n"
    assert c.exists()
    assert (tmp_path / "a.txt").read_text() == "done\n"


def test_no_job_outlives_an_error_of_the_script(tmp_path, monkeypatch):
    from reproduction.processes import Job, Processes

    late = [sys.executable, "-c", "import time; time.sleep(2); open('late', 'w')"]
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(OSError, match="file"):
        Processes(2).run([Job("a", late, Path("a.txt")), Job("b", late, Path("file/b.txt"))])
    time.sleep(3)
    assert not Path("late").exists()


def test_an_empty_group_has_no_number():
    from reproduction.results import _cell

    nan = float("nan")
    assert [_cell(values) for values in ([], [nan], [nan, nan], [50.0, 60.0])] == ["", "-", "-", "55.0 ± 7.1"]


def test_the_epoch_chosen_on_the_test_set(tmp_path):
    """Chosen by the plain image, and shown with the mirrored one too; a missing group has no number."""
    from reproduction.results import _every_epoch_cells
    from reproduction.runs import best_on_test_set

    def epoch(number, plain, mirrored):
        groups = {"many": 0.5, "few": 0.25, "all": plain}
        return {**groups, **{f"mirrored_{group}": mirrored for group in groups}, "epoch": number}

    first = [epoch(1, 0.3, 0.9), epoch(2, 0.4, 0.6), epoch(3, 0.4, 0.7), epoch(4, 0.2, 0.5)]
    assert best_on_test_set(first)["epoch"] == 2
    assert _every_epoch_cells([first, [epoch(1, 0.6, 0.8)]]) == [
        "65.0 / - / 65.0 / 65.0",
        "50.0 / - / 25.0 / 50.0 (2, 1)",
        "70.0 / - / 70.0 / 70.0",
    ]
