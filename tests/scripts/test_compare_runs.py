"""The table of several runs."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compare_runs.py"
HEADER = "epoch,step,test/all,test/few,test/many,test/medium,train/loss_epoch\n"


def write_run(folder: Path, few: float, loss: float, rho: float = 0.05) -> Path:
    folder.mkdir(parents=True)
    rows = f"0,9,,,,,2.0\n1,19,,,,,{loss}\n1,19,0.5,{few},0.9,0.7,\n"
    (folder / "metrics.csv").write_text(HEADER + rows)
    seed = folder.name.rpartition("_")[2]
    config = f"model:\n  init_args: {{method: imbsam, rho: {rho}}}\ndata:\n  init_args: {{seed: {seed}, ratio: 50}}\n"
    (folder / "config.yaml").write_text(config)
    return folder


def compare(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, check=False)


def test_mean_and_standard_deviation_over_runs_and_the_newest_of_a_folder(tmp_path: Path) -> None:
    sgd = [write_run(tmp_path / f"digits/sgd/version_{i}", few, 0.01) for i, few in ((2, 0.1), (10, 0.3))]
    write_run(tmp_path / "digits/imbsam/version_0", 0.4, 0.02)
    done = compare("--markdown", *sgd, tmp_path / "digits/imbsam")
    assert done.returncode == 0, done.stderr
    assert "| digits/sgd (2 runs) | 90.0 ± 0.0 | 70.0 ± 0.0 | 20.0 ± 14.1 | 50.0 ± 0.0 | 0.010 |" in done.stdout
    assert "| digits/imbsam | 90.0 | 70.0 | 40.0 | 50.0 | 0.020 |" in done.stdout
    assert "| digits/sgd | 90.0 | 70.0 | 30.0 | 50.0 |" in compare("--markdown", tmp_path / "digits/sgd").stdout


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    done = compare(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{tmp_path}: ")
    unfinished = write_run(tmp_path / "a/b/version_0", 0.1, 0.1)
    assert "no log of a training" in done.stderr
    (unfinished / "metrics.csv").write_text("epoch,step,train/loss_epoch\n0,9,2.0\n")
    assert "not tested yet" in compare(unfinished).stderr


def test_runs_of_other_settings_are_rows_of_their_own_and_tests_are_left_out(tmp_path: Path) -> None:
    for version, rho in ((0, 0.05), (1, 0.05), (2, 0.1)):
        write_run(tmp_path / f"digits/imbsam/version_{version}", rho, 0.01, rho)
    tested = tmp_path / "digits/imbsam/version_3"
    write_run(tested, 0.9, 0.1)
    (tested / "metrics.csv").write_text("epoch,step,test/all\n0,0,0.9\n")
    done = compare("--markdown", *sorted((tmp_path / "digits/imbsam").glob("version_*")))
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["digits/imbsam rho=0.05 (2 runs)", "digits/imbsam rho=0.1"]
