"""Milliseconds that a step of `imbsam fit` takes, and how many of them a bare loop would not.

    python benchmarks/fit_step_time.py --root data                                # on a GPU: ResNet-34, batch 64
    python benchmarks/fit_step_time.py --data configs/data/digits_lt.yaml --window 5     # a small network, for a CPU

Runs the command with its defaults, the progress bar included, in a process for each method and each choice of
`model.capture`; on a GPU with configs/trainer/gpu.yaml, so that the images are there. A callback stops the clock after
every few steps, and lets a loop without Lightning take as many: with a copy of the network, the same method, optimizer,
precision, capture and batches. On a GPU, each such window ends with one synchronisation, and no step has its own.
The first windows warm up, and those with the end of an epoch are left out.

CIFAR-100-LT where it is not in the folder `--root` is random images with its class counts. Further arguments go to
`imbsam fit`.

Columns:
    imbsam fit  ms a step, from one window to the next (median over the windows)
    bare loop   the same of the loop without Lightning
    added       the difference, which is Lightning's, the progress bar's and the log's (median and quartiles)
    goal        for `imbsam fit`; Lightning's share of it is to be at most 1 ms
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fit_speed import RandomImages
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules.image_arrays.packed_images import pack_images
from imbsam import Plain

REPOSITORY = Path(__file__).resolve().parents[1]
CIFAR = "configs/data/cifar100_lt.yaml"
GOALS = {("sgd", "true"): 5.0, ("imbsam", "true"): 10.0}
"""Milliseconds a step with CIFAR's config on a GPU, by method and `model.capture`."""


class StepClock(Callback):
    """Time the Trainer's steps in windows, with a window of the bare loop after each.

    Args:
        output: JSON file for the seconds of all windows.
        window: steps in a window.
    """

    def __init__(self, output: str, window: int = 50) -> None:
        self._output = Path(output)
        self._window = window
        self._windows: list[dict[str, Any]] = []
        self._bare: Iterator[None]
        self._steps = 0
        self._epoch_ended = False
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the bare loop, which copies the network when it takes its first step."""
        self._bare = bare_loop(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before a step: let the bare loop take as many when the window is full."""
        if 0 < self._steps < self._window:
            self._steps += 1
            return
        now = clock()
        if self._steps:
            fit = now - self._start
            for _ in range(self._window):
                next(self._bare)
            self._windows.append({"fit": fit, "bare": clock() - now, "epoch_ended": self._epoch_ended})
        self._steps, self._epoch_ended = 1, False
        self._start = clock()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The checkpoint falls into this window."""
        self._epoch_ended = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the seconds."""
        cuda = pl_module.device.type == "cuda"
        device = torch.cuda.get_device_name(pl_module.device) if cuda else "CPU"
        self._output.write_text(json.dumps({"device": device, "window": self._window, "windows": self._windows}))


def clock() -> float:
    """Seconds: of the CPU with one thread, which other programs do not slow; else as they pass, to the GPU's end."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def bare_loop(trainer: Any, pl_module: Any) -> Iterator[None]:
    """What `pl_module`, a LongTailedClassifier, trains like, without Lightning; yields after each step."""
    network = copy.deepcopy(pl_module.backbone)  # without what torch.compile has made of it
    if pl_module.settings.compile:
        network.compile()
    sam = pl_module.sam_factory(network, pl_module.class_counts)
    sam.first_pass = pl_module.sam.first_pass
    optimizer = pl_module.optimizer(network.parameters())
    captured = None

    def losses_of(x: Tensor, y: Tensor) -> Tensor:
        with trainer.precision_plugin.forward_context():
            return F.cross_entropy(network(x), y, reduction="none")

    while True:
        for x, y in trainer.datamodule.train_dataloader():
            x = x.to(pl_module.device, non_blocking=True)
            if pl_module.settings.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            if pl_module.capture:
                captured = captured or sam.capture(losses_of, (x, y), capture=pl_module.capture)
                captured(x, y)
            else:
                labels = y.to(pl_module.device, non_blocking=True)
                if isinstance(sam, Plain):  # without this library
                    torch.autograd.backward(losses_of(x, labels).mean())
                else:
                    sam.backward(lambda rows, x=x, labels=labels: losses_of(x[rows], labels[rows]), y)
            optimizer.step()
            optimizer.zero_grad()
            yield


def run_fit(data: str, method: str, capture: str, epochs: int, window: int, further: list[str]) -> dict[str, Any]:
    """Run `imbsam fit` in a process of its own; what its StepClock has written.

    Raises:
        RuntimeError: it failed; the message is the last line that it printed.
    """
    overlay = ["configs/trainer/gpu.yaml"] if torch.cuda.is_available() else []
    configs = [data, f"configs/method/{method}.yaml", *overlay]
    paths = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "windows.json"
        command = [
            *(sys.executable, "-m", "lightning_modules.cli", "fit"),
            *(f"--config={REPOSITORY / config}" for config in configs),
            *(f"--model.capture={capture}", f"--trainer.max_epochs={epochs}", *further),
            "--trainer.callbacks+=fit_step_time.StepClock",
            *(f"--trainer.callbacks.output={output}", f"--trainer.callbacks.window={window}"),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not output.exists():
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
        result: dict[str, Any] = json.loads(output.read_text())
    return result


def line(method: str, capture: str, result: dict[str, Any], goal: float | None) -> str:
    """A line of the table."""
    inside = [w for w in result["windows"][1:] if not w["epoch_ended"]]
    if len(inside) < 2:
        return f"| {method} | {capture} | too few windows within an epoch: more --epochs, smaller --window | | | | |"
    ms = 1000 / result["window"]
    low, middle, high = statistics.quantiles([ms * (w["fit"] - w["bare"]) for w in inside], n=4)
    fit, bare = (ms * statistics.median(w[name] for w in inside) for name in ("fit", "bare"))
    wanted = "" if goal is None else f"{goal:g}"
    return (
        f"| {method} | {capture} | {fit:.2f} | {bare:.2f} | {middle:.2f} ({low:.2f} to {high:.2f}) | {wanted} | "
        f"{len(inside)} |"
    )


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=CIFAR, help="config of the data and the network")
    parser.add_argument("--root", default="data", help="folder with cifar-100-python")
    parser.add_argument("--methods", nargs="+", default=["sgd", "imbsam"], help="pieces of configs/method")
    captures = ["false", "true"] if gpu else ["false"]
    parser.add_argument("--captures", nargs="+", choices=["false", "true"], default=captures, help="model.capture")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--window", type=int, default=50, help="steps before the other takes its turn")
    parser.add_argument("--json", type=Path, help="also write the seconds of all windows to this file")
    arguments, further = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.data
        if arguments.data == CIFAR:
            root = Path(arguments.root).resolve()
            if not (root / "cifar-100-python").is_dir():
                root, source = Path(folder) / "random.npz", "random images with CIFAR-100-LT's class counts"
                torch.manual_seed(0)
                pack_images(root, RandomImages())
            further = [f"--data.root={root}", *further]
        results = []
        print(f"{source}, torch {torch.__version__}\n")
        print("| method | capture | imbsam fit, ms a step | bare loop | added (quartiles) | goal | windows |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for method in arguments.methods:
            for capture in arguments.captures:
                goal = GOALS.get((method, capture)) if arguments.data == CIFAR else None
                try:
                    result = run_fit(arguments.data, method, capture, arguments.epochs, arguments.window, further)
                except RuntimeError as error:
                    print(f"| {method} | {capture} | failed: {error} | | | | |", flush=True)
                    continue
                print(line(method, capture, result, goal), flush=True)
                results.append({"method": method, "capture": capture, **result})
        print(f"\n{', '.join(sorted({result['device'] for result in results}))}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
