"""Train and print the tables of the papers: every method and seed of a benchmark, resuming where it was stopped.

python scripts/reproduce.py cifar100_lt --root data                   # train what is missing, then print the table
python scripts/reproduce.py cifar100_lt --root data --minutes 9       # stop after 9 minutes; run it again to resume
python scripts/reproduce.py cifar100_lt --table                       # print the table of the finished runs
python scripts/reproduce.py cifar100_lt --root data -- --config configs/trainer/gpu.yaml --model.compile true
python scripts/reproduce.py published                                 # print the published numbers
python scripts/reproduce.py pack --root data cifar100_lt_100.npz      # pack the images of ratio 100, seed 0

Arguments after ``--`` go to every ``imbsam fit``. Runs are in logs/reproduce/BENCHMARK/ROW/seed_N: an interrupted run
resumes from its last checkpoint, a finished one is left alone.
"""

import argparse
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from imbsam.group_names import GROUPS
from imbsam.report.runs import Run, UnreadableRunError, find_folders, read_run

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LOGS = Path("logs")
EXPERIMENT = "reproduce"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        title: its name in the table.
        pieces: its files under configs/ in addition to the benchmark's, without ".yaml".
        settings: further arguments of ``imbsam fit``.
        variant: what ``settings`` are called in the folder's name.
    """

    title: str
    pieces: tuple[str, ...]
    settings: tuple[str, ...] = ()
    variant: str = ""

    @property
    def name(self) -> str:
        """Its folder."""
        parts = [piece.rpartition("/")[2] for piece in self.pieces]
        return "_".join([*parts, self.variant] if self.variant else parts)


DOUBLED = "loss/doubled_tail"
METHODS = [
    Row("SGD", ("method/sgd",)),
    Row("SGD, tail loss doubled", ("method/sgd", DOUBLED)),
    Row("SAM", ("method/sam",)),
    Row("SAM, tail loss doubled", ("method/sam", DOUBLED)),
    Row("ImbSAM, tail loss doubled", ("method/imbsam", DOUBLED)),
]
CIFAR100 = [
    *METHODS[:-1],
    Row(
        "ImbSAM, tail loss doubled, published gradient",
        ("method/imbsam", DOUBLED),
        ("--model.sam.context_rows=batch",),
        "published_gradient",
    ),
    METHODS[-1],
    Row("ImbSAM, tail loss doubled, rho 0.1", ("method/imbsam", DOUBLED), ("--model.sam.rho=0.1",), "rho_0.1"),
]
LOSSES = [
    Row(f"{method_title}, {title}", (f"method/{method}", *pieces), settings)
    for title, pieces, settings in (
        ("cross-entropy", (), ()),
        ("LDAM-DRW", ("loss/ldam_drw",), ("--trainer.callbacks.start_epoch=24",)),
        ("balanced softmax", ("loss/balanced_softmax",), ()),
    )
    for method_title, method in (("SGD", "sgd"), ("ImbSAM", "imbsam"))
]


@dataclass(frozen=True)
class Benchmark:
    """A table: the pieces that all of its rows share, and the rows."""

    pieces: tuple[str, ...]
    rows: list[Row]


BENCHMARKS = {
    "cifar100_lt": Benchmark(("data/cifar100_lt",), CIFAR100),
    "cifar100_lt_small": Benchmark(("data/cifar100_lt", "size/small"), [*CIFAR100, Row("ImbSAM", ("method/imbsam",))]),
    "cifar100_lt_50": Benchmark(("data/cifar100_lt", "ratio/50"), METHODS),
    "cifar100_lt_10": Benchmark(("data/cifar100_lt", "ratio/10"), METHODS),
    "cifar100_lt_losses": Benchmark(("data/cifar100_lt", "size/small"), LOSSES),
    "cifar10_lt": Benchmark(("data/cifar10_lt",), METHODS),
    "imagenet_lt": Benchmark(("data/imagenet_lt",), METHODS),
    "places_lt": Benchmark(("data/places_lt",), METHODS),
    "inaturalist2018": Benchmark(("data/inaturalist2018",), METHODS),
    "digits_lt": Benchmark(("data/digits_lt",), METHODS),
}
"""The tables by name; cifar100_lt_losses is the small CPU recipe with three losses."""


def published() -> list[dict[str, Any]]:
    """The entries of configs/published.yaml."""
    entries: list[dict[str, Any]] = yaml.safe_load((CONFIGS / "published.yaml").read_text())
    return entries


def published_accuracy(benchmark: str, row: Row) -> dict[str, float]:
    """The published accuracies of exactly these pieces, by group; empty if there are none."""
    pieces = [*BENCHMARKS[benchmark].pieces, *row.pieces]
    return next((entry["accuracy"] for entry in published() if entry["pieces"] == pieces), {})


def published_table() -> str:
    """The published numbers and their configs, in Markdown."""
    lines = ["| pieces of `configs/` | published, all classes | by |", "| :-- | --: | :-- |"]
    for entry in published():
        pieces = ", ".join(f"`{piece}`" for piece in entry["pieces"])
        lines.append(f"| {pieces} | {entry['accuracy']['all']:.1f} | {entry['source']} |")
    return "\n".join(lines)


def folder_of(benchmark: str, row: Row, seed: int) -> str:
    """The run's folder below LOGS."""
    return f"{EXPERIMENT}/{benchmark}/{row.name}/seed_{seed}"


def tested(benchmark: str, row: Row, seed: int) -> Run | None:
    """The finished run, or None."""
    for folder in reversed(find_folders(LOGS / folder_of(benchmark, row, seed))):
        try:
            return read_run(folder)
        except UnreadableRunError:
            continue
    return None


def command(benchmark: str, row: Row, seed: int, root: str | None, settings: Sequence[str]) -> list[str]:
    """The ``imbsam fit`` that starts or resumes the run."""
    pieces = [*BENCHMARKS[benchmark].pieces, *row.pieces]
    return [
        *(sys.executable, "-m", "lightning_modules.cli", "fit"),
        *(f"--config={CONFIGS / piece}.yaml" for piece in pieces),
        *row.settings,
        *((f"--data.root={root}",) if root else ()),
        *settings,
        f"--seed_everything={seed}",
        f"--data.seed={seed}",
        f"--trainer.logger.init_args.save_dir={LOGS}",
        f"--trainer.logger.init_args.name={folder_of(benchmark, row, seed)}",
        "--ckpt_path=last",
    ]


def run(arguments: Sequence[str], deadline: float | None) -> bool:
    """Run until it ends, or ask it to stop at the deadline; returns whether it ended by itself.

    Raises:
        SystemExit: if the run fails, or on SIGTERM or Ctrl-C, which also stop the run.
    """
    process = subprocess.Popen(arguments)
    stopped = False
    try:
        while True:
            left = None if deadline is None or stopped else max(deadline - time.monotonic(), 0.0)
            try:
                code = process.wait(left)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # it saves a checkpoint after the batch
                stopped = True
    except KeyboardInterrupt:  # Ctrl-C reaches the run too, SIGTERM does not
        process.terminate()
        process.wait()
        raise SystemExit("interrupted: run the same command again to resume") from None
    # stopped before training began: it says so itself, or was still importing
    if code != 0 and not (stopped and code in (128 + signal.SIGTERM, -signal.SIGTERM)):
        raise SystemExit(f"imbsam fit ended with code {code}")
    return not stopped


def train_missing(
    benchmark: str,
    rows: Sequence[Row],
    seeds: Sequence[int],
    root: str | None,
    minutes: float | None,
    settings: list[str],
) -> bool:
    """Train what is not finished, one seed at a time; returns whether all runs are finished."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    missing = [(seed, row) for seed in seeds for row in rows if tested(benchmark, row, seed) is None]
    total = len(seeds) * len(rows)
    print(f"{benchmark}: {total - len(missing)} of {total} runs are finished", flush=True)
    for seed, row in missing:
        print(f"{row.title}, seed {seed}", flush=True)
        arguments = command(benchmark, row, seed, root, settings)
        if not run(arguments, deadline) or (deadline is not None and time.monotonic() >= deadline):
            break
    return all(tested(benchmark, row, seed) for seed, row in missing)


def table(benchmark: str, rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """Mean and standard deviation over the finished seeds, and the published numbers, in Markdown."""
    lines = [
        f"| {benchmark} | seeds | epochs | " + " | ".join(GROUPS) + " | published: " + " / ".join(GROUPS) + " |",
        "| :-- | --: | --: " + "| --: " * len(GROUPS) + "| --: |",
    ]
    for row in rows:
        runs = [result for seed in seeds if (result := tested(benchmark, row, seed))]
        cells = [_cell([100 * result.final[f"test/{group}"] for result in runs]) for group in GROUPS]
        known = published_accuracy(benchmark, row)
        others = " / ".join(f"{known[group]:.1f}" if group in known else "" for group in GROUPS) if known else ""
        # a trial of one epoch counts as a run too: show its epochs
        epochs = ", ".join(sorted({str(result.settings.get("trainer.max_epochs", "")) for result in runs}))
        lines.append(f"| {row.title} | {len(runs)} | {epochs} | " + " | ".join(cells) + f" | {others} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values or not all(map(math.isfinite, values)):  # nan: the group has no class
        return "-" if values else ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def pack(root: str, path: Path, ratio: float, seed: int) -> None:
    """Write the images of CIFAR-100-LT to one file."""
    from datamodules import CIFAR100LTDataModule
    from datamodules.image_arrays.packed_images import pack_images

    data = CIFAR100LTDataModule(root, ratio=ratio, seed=seed)
    data.prepare_data()
    pack_images(path, data)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB; read it with --data.root {path}")


def main() -> None:
    """Run the script."""
    own, settings = sys.argv[1:], []
    if "--" in own:
        split = own.index("--")
        own, settings = own[:split], own[split + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "published", "pack"])
    parser.add_argument("file", nargs="?", type=Path, help="pack: the file to write")
    parser.add_argument("--root", help="folder of the data; default: the DataModule's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="only these rows, by the names of their folders")
    parser.add_argument("--minutes", type=float, help="stop after this time; run the same command again to resume")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs without training")
    parser.add_argument("--ratio", type=float, default=100, help="pack: imbalance ratio; larger ones fit too")
    args = parser.parse_intermixed_args(own)  # which also sees a file after an option
    if args.benchmark == "published":
        print(published_table())
        return
    if args.benchmark == "pack":
        if args.file is None or args.file.suffix != ".npz":
            parser.error("pack: name the file to write, ending in .npz")
        pack(args.root or "data", args.file, args.ratio, args.seeds[0])
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the run would outlive this script
    rows = BENCHMARKS[args.benchmark].rows
    if args.rows:
        names = [row.name for row in rows]
        if unknown := set(args.rows) - set(names):
            parser.error(f"--rows: no {', '.join(sorted(unknown))}; {args.benchmark} has {', '.join(names)}")
        rows = [row for row in rows if row.name in args.rows]
    done = args.table or train_missing(args.benchmark, rows, args.seeds, args.root, args.minutes, settings)
    print(table(args.benchmark, rows, args.seeds))
    if not done:
        print("\nnot finished: run the same command again to resume", file=sys.stderr)


if __name__ == "__main__":
    main()
