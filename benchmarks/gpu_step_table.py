"""The table of `gpu_step_cost.py`, which `step_cost.py` prints on a GPU.

    python benchmarks/step_cost.py --modes eager captured --sizes "ResNet-34 at 32, 64" --rounds 30 --json gpu.json

Each mode of each network has a process of its own, which measures eager SGD before and after its methods: the mean of
the two is what "/ eager SGD" divides by, and the last row shows how far they are apart. A method that fails ends its
process, which a failed capture may have damaged; the methods after it get a new one.

Columns:
    ms          median time of a step, including the optimizer's
    / SGD       multiple of SGD in the same mode
    / eager SGD multiple of eager SGD
    first pass  seconds for seeing the batches the first time, including compilation, warm-up and capture
    memory      peak memory of the caching allocator, in MB
"""

import gc
import statistics
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from gpu_step_cost import METHODS, Size, measure

Row = dict[str, Any]

GOALS: dict[tuple[str, str, str], tuple[str, float]] = {
    ("ResNet-34 at 32, 128", "eager", "SAM"): ("SGD", 2.1),
    ("ResNet-34 at 32, 128", "eager", "ImbSAM, auto"): ("SGD", 3.05),
    ("ResNet-34 at 32, 128", "captured", "ImbSAM, auto"): ("SGD", 1.6),
    ("ResNet-50 at 224, 256", "captured", "ImbSAM, auto"): ("SGD", 1.25),
    ("ViT-B/16 at 224, 128", "captured", "ImbSAM, auto"): ("SGD", 1.1),
    ("ResNet-34 at 32, 64", "captured", "ImbSAM, auto"): ("eager SGD", 0.45),
}
"""By network and batch, mode and method: what is divided by, and the largest ratio that we want."""


def table(sizes: Mapping[str, Size], modes: Sequence[str], rounds: int, device: torch.device) -> list[Row]:
    """Measure and print one Markdown table per size; a method that fails is a line with the reason."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU: the passes are called, not captured"
    rows: list[Row] = []
    for size in sizes:
        print(f"\n**{size}, {name}, torch {torch.__version__}, {rounds} rounds**\n")
        print("| mode | method | ms (quartiles) | / SGD | / eager SGD | first pass | memory |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for mode in modes:
            found = in_processes(sizes[size], mode, rounds, device)
            print("\n".join(markdown(size, mode, found)), flush=True)
            rows += [{"size": size, "device": name, "mode": mode, **row} for row in found]
    return rows


def in_processes(size: Size, mode: str, rounds: int, device: torch.device) -> list[Row]:
    """The rows of all methods in one mode; after one that fails the next begins a process of its own."""
    rows: list[Row] = []
    while len(rows) < len(METHODS):
        left = list(METHODS)[len(rows) :]
        receiver, sender = get_context("spawn").Pipe(duplex=False)
        process = get_context("spawn").Process(target=_measure_all, args=(sender, size, mode, left, rounds, device))
        process.start()
        sender.close()
        new: list[Row] = []
        eager: list[float] = []
        while True:
            try:
                message = receiver.recv()
            except EOFError:
                break
            (eager if isinstance(message, float) else new).append(message)
        process.join()
        if len(new) < len(left) and not any("failed" in row for row in new):
            new.append({"method": left[len(new)], "failed": f"the process ended with code {process.exitcode}"})
        rows += [{**row, "eager_sgd_ms": eager} for row in new]
    return rows


def _measure_all(
    results: Connection, size: Size, mode: str, methods: Sequence[str], rounds: int, device: torch.device
) -> None:
    """In a new process: send eager SGD's milliseconds, the row of each method up to one that fails, and SGD's again."""

    def run(method: str, mode: str) -> dict[str, float]:
        try:
            return measure(method, mode, size, rounds, device)
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    results.send(run("SGD", "eager")["ms"])
    for method in methods:
        try:
            results.send({"method": method, **run(method, mode)})
        except Exception as error:  # the other rows are worth having
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            results.send({"method": method, "failed": f"{type(error).__name__}: {reason}"})
            return
    results.send(run("SGD", "eager")["ms"])


def markdown(size: str, mode: str, rows: Sequence[Row]) -> list[str]:
    """A line for each method of a mode, with its goal if it has one, and one for eager SGD beside them."""
    sgd = next((row["ms"] for row in rows if row["method"] == "SGD" and "ms" in row), None)
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append(f"| {mode} | {row['method']} | {row['failed']} | | | | |")
            continue
        eager = statistics.mean(row["eager_sgd_ms"])
        of, goal = GOALS.get((size, mode, row["method"]), ("", 0.0))
        cells = [
            "" if divisor is None else f"{row['ms'] / divisor:.2f}" + (f" (goal {goal})" if of == name else "")
            for name, divisor in (("SGD", sgd), ("eager SGD", eager))
        ]
        lines.append(
            f"| {mode} | {row['method']} | {row['ms']:.2f} ({row['low']:.2f} to {row['high']:.2f}) | {cells[0]} | "
            f"{cells[1]} | {row['first_s']:.1f} s | {row['memory_mb']:,.0f} MB |"
        )
    beside = [f"{ms:.2f}" for row in _first_of_each_process(rows) for ms in row["eager_sgd_ms"]]
    return [*lines, f"| {mode} | eager SGD beside them | {', '.join(beside)} | | | | |"]


def _first_of_each_process(rows: Sequence[Row]) -> list[Row]:
    return [row for i, row in enumerate(rows) if i == 0 or "failed" in rows[i - 1]]
