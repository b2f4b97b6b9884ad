"""Programs that tests run in processes of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PATIENCE = 900
"""Seconds until a program is taken to hang and is killed: many times what it needs, since the machine may be busy.

torch's processes wait half an hour for each other.
"""


def run_command(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `imbsam` in a folder; returns when no process of it holds stdout or stderr any more.

    Args:
        folder: the current folder.
        args: command line, without the program.
        environment: variables in addition to the test's own.
    """
    ours = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "lightning_modules.cli", *args]
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **ours, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # also the processes that it has launched
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)
