"""Runs `imbsam` in forked processes, so that a test pays for the imports once; kills them where it is told to.

Reads one request a line from stdin, JSON: `cwd`, `args`, `processes`, `kill` (see `arm`), `signal` (its name, and the
batch at which it comes), `alone` (true: a process that fails leaves the others alone; else they are killed, since they
would wait for it). Answers with one line: exit code, stdout and stderr of every process. The code to be killed knows
nothing of this file.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from imbsam.perturbation import Ascent
from lightning_modules.classifier import LongTailedClassifier
from lightning_modules.cli import run as cli
from tests.ports import held_port
from tests.programs import PATIENCE


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_calls(owner: Any, name: str, number: int, act: Any) -> None:
    """Let `act` take the place of call `number` (from 1) of `owner.name`; it gets the original and its arguments."""
    original, calls = getattr(owner, name), 0

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return act(original, *args, **kwargs) if calls == number else original(*args, **kwargs)

    setattr(owner, name, patched)


def arm(kind: str, number: float) -> None:
    """Choose the moment of death: the call `number` of something; "any moment": so many tenths of a second after it."""

    def after(original: Any, *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        die()

    def mid_write(original: Any, obj: Any, file: Any) -> None:
        original(obj, file)
        file.flush()
        os.truncate(file.name, file.tell() // 2)
        die()

    def before(original: Any, *args: Any, **kwargs: Any) -> None:
        die()

    def start_clock(original: Any, *args: Any, **kwargs: Any) -> Any:
        threading.Timer(number % 1 / 10, die).start()
        return original(*args, **kwargs)

    if kind == "at w + e":
        after_calls(Ascent, "ascend", int(number), after)
    elif kind == "mid-write":
        after_calls(torch, "save", int(number), mid_write)
    elif kind == "between the renames":  # two a checkpoint, but one for the first
        after_calls(Path, "replace", 2 * int(number), before)
    elif kind == "any moment":  # 2.5: half a tenth of a second after the second batch began
        after_calls(LongTailedClassifier, "training_step", int(number), start_clock)
    else:
        raise ValueError(kind)


def signal_after(name: str, steps: int) -> None:
    def act(original: Any, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.Signals[name])
        return original(*args, **kwargs)

    after_calls(LongTailedClassifier, "training_step", steps, act)


def start(request: dict[str, Any], rank: int, port: int, out: Path, err: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        os.chdir(request["cwd"])
        os.environ.update(request.get("env", {}), COLUMNS="120", STANDALONE_PORT=str(port))
        if request["processes"] > 1:  # as torchrun does
            names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
            names |= {"WORLD_SIZE": request["processes"], "LOCAL_WORLD_SIZE": request["processes"]}
            os.environ.update({name: str(value) for name, value in names.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="test")
            rank_zero_only.rank = rank  # Lightning reads it from the environment when it is imported
        signal.alarm(PATIENCE)
        if request.get("kill"):
            arm(*request["kill"])
        if request.get("signal") and rank == request["processes"] - 1:
            signal_after(*request["signal"])
        sys.argv = ["imbsam", *request["args"]]
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        request.setdefault("processes", 1)
        with tempfile.TemporaryDirectory() as folder, held_port() as port:
            names = [Path(folder) / str(rank) for rank in range(request["processes"])]
            begun = time.monotonic()
            pids = [
                start(request, rank, port, name.with_suffix(".out"), name.with_suffix(".err"))
                for rank, name in enumerate(names)
            ]
            codes = []
            for pid in pids:
                codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                if codes[-1] and not request.get("alone"):
                    for other in pids[len(codes) :]:
                        os.kill(other, signal.SIGKILL)
            answer = {
                "codes": codes,
                "seconds": time.monotonic() - begun,
                "out": [name.with_suffix(".out").read_text() for name in names],
                "err": [name.with_suffix(".err").read_text() for name in names],
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
