"""Ctrl-C and SIGTERM, sent to the real command as a terminal, a user and a scheduler send them."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.programs import PATIENCE, REPOSITORY


class Command:
    """`imbsam fit` on the digits with a user's defaults, in a process group of its own as a shell makes it."""

    def __init__(self, folder: Path, *args: str, file_size: int | None = None) -> None:
        self.folder = folder
        self.out, self.err = folder / "out", folder / "err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [
                    *(Path(sys.executable).with_name("imbsam"), "fit", "--config", "configs/data/digits_lt.yaml"),
                    *("--trainer.accelerator=cpu", *args),
                ],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=lambda: file_size and resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size)),
            )

    def wait_for(self, seen) -> None:
        """Wait until `seen` is true."""
        end = time.monotonic() + PATIENCE
        while not seen():
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < end, self.err.read_text()
            time.sleep(0.05)

    def wait_for_training(self) -> None:
        """Wait until something is in the log."""
        self.wait_for(lambda: list(self.folder.rglob("metrics.csv")))

    def signal_all(self, number: int) -> None:
        """Signal the whole process group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def end(self, seconds: float = PATIENCE) -> tuple[int, str, str]:
        """Exit code, stdout and stderr; no process may be left."""
        try:
            code = self.process.wait(seconds)
            time.sleep(0.5)  # for a child to be gone
            assert not alive(self.process.pid), "a process was left behind"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return code, self.out.read_text(), self.err.read_text()


def alive(group: int) -> list[int]:
    """The processes of a group that have not ended; /proc/N/stat is "pid (name) state parent group ..."."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(number) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def has_torch(pid: int) -> bool:
    """Whether it has begun to import torch."""
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def lines(text: str) -> list[str]:
    """Our lines."""
    return [line for line in text.splitlines() if line.startswith("imbsam: ")]


@pytest.mark.processes
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    """To the whole group: two processes and their loaders' workers."""
    command = Command(tmp_path, "--trainer.devices=2", "--data.num_workers=1")
    command.wait_for_training()
    command.signal_all(signal.SIGINT)
    code, out, err = command.end()
    assert code == 130
    assert len(lines(out)) == 1
    assert lines(out)[0].startswith("imbsam: interrupted by SIGINT after epoch ")
    assert lines(out)[0].endswith("; resume with --ckpt_path last")
    assert lines(err) == ["imbsam: stopping after this batch, to save; Ctrl-C again stops at once"]
    assert "Traceback" not in err
    assert "test accuracy" not in out
    assert [path.name for path in tmp_path.rglob("*.ckpt*")] == ["last.ckpt"]


@pytest.mark.slow  # test_processes.py has the same with processes that share their imports
def test_sigterm_to_the_first_of_two_processes_ends_both(tmp_path):
    """What `kill PID` does: Lightning has started the second one."""
    command = Command(tmp_path, "--trainer.devices=2")
    command.wait_for_training()
    command.process.terminate()
    code, out, err = command.end()
    assert (code, "Traceback" in err) == (0, False)
    assert lines(out)[0].startswith("imbsam: interrupted by SIGTERM after epoch ")
    assert list(tmp_path.rglob("last.ckpt"))


@pytest.mark.processes
def test_ctrl_c_twice_ends_a_process_that_waits_for_another(tmp_path):
    """The second process is stopped, so the first one waits in C code, where Python runs no handlers."""
    command = Command(tmp_path, "--trainer.devices=2")
    command.wait_for_training()
    (second,) = (pid for pid in alive(command.process.pid) if pid != command.process.pid)
    os.kill(second, signal.SIGSTOP)
    for _ in range(2):
        time.sleep(0.5)
        command.process.send_signal(signal.SIGINT)
    start = time.monotonic()
    code, out, err = command.end()
    assert code == 130
    assert time.monotonic() - start < 10
    # the first is ended, or returns from its wait once it has killed the second
    waited = "imbsam: ended by SIGINT, without saving: it was waiting for another process"
    assert lines(err)[1:] + lines(out) in ([waited], ["imbsam: interrupted by SIGINT again: nothing was saved"])
    assert "Traceback" not in err


WAITS = """
from datetime import timedelta
from torch.distributed import TCPStore
from lightning_modules.resuming import signals

signals.PATIENCE = 1.0
signals.StopSignals(deferred=True).install()
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print("waiting", flush=True)
store.wait(["what nobody sets"], timedelta(seconds=60))
"""


@pytest.mark.processes
def test_sigterm_ends_a_training_that_waits_for_another_process():
    """In C code, which a Python handler would wait for: two minutes, here one second."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", WAITS], env=environment, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.5)
        start = time.monotonic()
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
        assert time.monotonic() - start < 10
        said = "imbsam: ended by SIGTERM, without saving: it was waiting for another process\n"
        assert process.stderr.read().endswith(said)


@pytest.mark.processes
@pytest.mark.parametrize("moment", ["import torch", "meeting the other process"])
def test_ctrl_c_during_start_up_is_one_line(tmp_path, moment):
    command = Command(tmp_path, "--trainer.devices=2")
    processes = 1 if moment == "import torch" else 2
    command.wait_for(lambda: sum(has_torch(pid) for pid in alive(command.process.pid)) == processes)
    command.signal_all(signal.SIGINT)
    code, out, err = command.end()
    assert code == 130
    assert "Traceback" not in err
    assert len(lines(out) + lines(err)) == 1
    assert "by SIGINT" in (lines(out) + lines(err))[0]


@pytest.mark.processes
def test_a_full_disk_is_one_line_and_leaves_no_half_checkpoint(tmp_path):
    """No file may exceed 20 kB, and the checkpoint does; the second process must not wait for the first one."""
    command = Command(tmp_path, "--trainer.devices=2", "--checkpoint.every_seconds=0", file_size=20_000)
    code, _, err = command.end()
    assert code == 2
    assert "Traceback" not in err
    (line,) = lines(err)
    assert line.startswith("imbsam: error: ")
    assert line.endswith("last.ckpt: File too large: free some space, and resume a training with --ckpt_path last")
    assert not list(tmp_path.rglob("*.ckpt*"))
