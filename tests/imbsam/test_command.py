"""The console script: what it answers itself, and what it leaves to LightningCLI."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imbsam.command import COMMANDS, OPTIONS, SETTINGS, main
from lightning_modules.cli.run import ImbSAMCLI

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = "import sys; sys.argv[0] = 'imbsam'; from imbsam.command import main; main()"


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["imbsam", *args])
        monkeypatch.setattr(sys, "path", [*sys.path])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def test_every_command_is_listed(command):
    code, out, _ = command()
    assert code == 0
    assert set(re.findall(r"^  (\w+) ", out, flags=re.MULTILINE)) == {*ImbSAMCLI.subcommands(), "report"}
    assert command("--help")[1] == out
    assert set(OPTIONS) == set(COMMANDS) - {"report"}


@pytest.mark.parametrize("args", [[], ["--version"], ["fit", "--help"], ["report", "--help"], ["trian"]])
def test_help_and_version_are_quick_and_import_no_torch(args, tmp_path):
    code = f"{SCRIPT[:-6]}\ntry:\n    main()\nfinally:\n    assert not {{'torch', 'lightning'}} & set(sys.modules)"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "AssertionError" not in done.stderr
    assert done.returncode == (2 if args == ["trian"] else 0), done.stderr
    assert time.monotonic() - start < 2


def test_the_version_is_the_installed_one(command):
    from importlib.metadata import version

    assert command("--version")[1].startswith(f"imbsam {version('imbsam')} (torch {version('torch')}, lightning ")


def test_help_of_fit_shows_rho_and_eta_and_how_to_list_the_rest(command):
    code, out, _ = command("fit", "--help")
    assert code == 0
    assert len(out.splitlines()) < 40
    assert {"--model.sam.rho", "--model.sam.eta", "--help-all"} <= set(out.split())
    settings = [f"{name}={example}" for name, (example, _) in SETTINGS.items()]
    code, shown, err = command("fit", "--config=configs/data/digits_lt.yaml", *settings, "--print_config")
    assert (code, err) == (0, "")  # every setting that help names exists
    assert "eta: 20" in shown


def test_all_settings_are_one_flag_away(command):
    code, out, _ = command("fit", "--help-all")
    assert code == 0
    assert "--checkpoint.every_seconds" in out


def test_an_unknown_command_is_one_line(command):
    code, out, err = command("tests")
    assert (code, out) == (2, "")
    assert err == "imbsam: error: unknown command tests: did you mean test?\n"


def test_a_command_without_settings_is_one_line(command):
    code, out, err = command("fit")
    assert (code, out) == (2, "")
    assert err == "imbsam: error: fit needs settings: give --config FILE, see imbsam fit --help\n"


@pytest.mark.processes
def test_a_datamodule_in_the_current_folder_is_found_and_a_report_folder_there_does_no_harm(tmp_path):
    """From the project of a user with folders and modules of common names."""
    (tmp_path / "my_data.py").write_text(
        "from datamodules import DigitsLTDataModule\n\n\nclass MyData(DigitsLTDataModule):\n    pass\n"
    )
    for name in ("report", "configs", "datasets"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    config = "--config=configs/data/digits_lt.yaml"  # not in the user's configs/
    run = [sys.executable, "-P", "-c", SCRIPT] if sys.version_info >= (3, 11) else [sys.executable, "-c", SCRIPT]
    for args, text in (
        (["check", config, "--data=my_data.MyData"], "the data can be read"),
        (["report", "."], "no run to report"),
    ):
        done = subprocess.run(
            [*run, *args],
            cwd=tmp_path,
            env={"PYTHONPATH": str(REPOSITORY), "PATH": "", "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert text in done.stdout + done.stderr, done
