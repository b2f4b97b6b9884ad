"""The command, run in the test's own process."""

import sys

import pytest

from lightning_modules.cli.run import main


@pytest.fixture
def imbsam(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["imbsam", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run
