"""scripts/reproduce.py on the digits, in real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHORT = [
    "--trainer.max_epochs=2",
    "--model.lr_scheduler.init_args.T_max=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


def reproduce(cwd, *arguments):
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts/reproduce.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout, done.stderr


def test_every_row_names_a_config():
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    from reproduce import BENCHMARKS

    for name, benchmark in BENCHMARKS.items():
        assert len({row.name for row in benchmark.rows}) == len(benchmark.rows), name
        for row in benchmark.rows:
            for piece in (*benchmark.pieces, *row.pieces):
                assert (REPOSITORY / f"configs/{piece}.yaml").exists(), row


def test_published_numbers_match_their_rows_and_the_docs():
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    from reproduce import METHODS, published, published_accuracy, published_table

    assert [published_accuracy("cifar100_lt", row).get("all") for row in METHODS] == [47.6, None, 48.9, None, 51.1]
    assert published_accuracy("cifar100_lt_50", METHODS[0]) == {}
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
    assert header.startswith("| digits_lt | seeds | epochs | many | medium | few | all |")
    assert imbsam.startswith("| ImbSAM, tail loss doubled | 1 | 2 | ")
    assert (tmp_path / "logs/reproduce/digits_lt/imbsam_doubled_tail/seed_0/version_0/checkpoints/last.ckpt").exists()
    again = reproduce(tmp_path, "digits_lt", *rows)  # trains nothing, so takes seconds
    assert "digits_lt: 1 of 1 runs are finished" in again[1]
    assert again[1].strip().splitlines()[-3:] == table
    assert reproduce(tmp_path, "digits_lt", *rows, "--table")[1].strip().splitlines() == table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["digits_lt", "--rows", "adam"],
            "--rows: no adam; digits_lt has sgd, sgd_doubled_tail, sam, sam_doubled_tail, imbsam_doubled_tail",
        ),
        (["pack", "--root", ".", "images.zip"], "pack: name the file to write, ending in .npz"),
        (["pack"], "pack: name the file to write, ending in .npz"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    code, _, err = reproduce(tmp_path, *arguments)
    assert code == 2
    assert message in err


def test_sigterm_ends_the_run_too(tmp_path):
    script = (
        "import sys; sys.argv = ['reproduce.py', 'digits_lt']; import reproduce; "
        "reproduce.command = lambda *_: [sys.executable, '-c', "
        "'import os, time; print(os.getpid(), flush=True); time.sleep(100)']; reproduce.main()"
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'scripts'}"}
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    run = next(int(line) for line in parent.stdout if line.strip().isdigit())
    parent.terminate()
    assert parent.wait(30) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(run, 0)


def test_an_empty_group_has_no_number():
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    from reproduce import _cell

    nan = float("nan")
    assert [_cell(values) for values in ([], [nan], [nan, nan], [50.0, 60.0])] == ["", "-", "-", "55.0 ± 7.1"]
