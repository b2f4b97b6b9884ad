"""The tables of the papers: method after method and seed after seed, with resume, ending in Markdown.

python scripts/reproduce.py cifar100_lt --root data                   # train what is missing, then print the table
python scripts/reproduce.py cifar100_lt --root data --minutes 9       # at most this long; start it again to resume
python scripts/reproduce.py cifar100_lt --table                       # the table of what is there
python scripts/reproduce.py cifar100_lt --root data -- --config configs/trainer/gpu.yaml --model.compile true
python scripts/reproduce.py pack --root data cifar100_lt_100.npz      # the images of ratio 100, seed 0, in one file

A benchmark is one of those below; what follows ``--`` goes to every ``imbsam fit``. Runs lie in
logs/reproduce/BENCHMARK/ROW/seed_N: an interrupted one resumes from its last checkpoint, a finished one is left alone.
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

from imbsam.group_names import GROUPS
from imbsam.report.runs import Run, UnreadableRunError, find_folders, read_run

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LOGS = Path("logs")
EXPERIMENT = "reproduce"

Published = tuple[float | None, float | None, float | None, float | None]
"""many, medium, few, all, in %."""

NOTHING: Published = (None, None, None, None)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        title: what the table calls it.
        name: its folder.
        config: its file under configs/.
        settings: further arguments of ``imbsam fit``.
        published: the accuracies in the literature.
    """

    title: str
    name: str
    config: str
    settings: tuple[str, ...] = ()
    published: Published = NOTHING


DOUBLED = ("--model.sam.tail_weight=2",)


def paper_table(folder: str, published: dict[str, Published], overlay: tuple[str, ...] = ()) -> list[Row]:
    """The rows of every benchmark: SGD and SAM with and without the tail's loss doubled, and ImbSAM with it."""
    rows = [
        ("SGD", "sgd", "sgd", ()),
        ("SGD, tail loss doubled", "sgd_doubled", "sgd", DOUBLED),
        ("SAM", "sam", "sam", ()),
        ("SAM, tail loss doubled", "sam_doubled", "sam", DOUBLED),
        ("ImbSAM, tail loss doubled", "imbsam", "imbsam", DOUBLED),
    ]
    return [
        Row(title, name, f"{folder}/{config}.yaml", overlay + settings, published.get(name, NOTHING))
        for title, name, config, settings in rows
    ]


def ratio(folder: str, number: int) -> tuple[str, ...]:
    """The arguments of a ratio's overlay."""
    return ("--config", str(CONFIGS / folder / f"ratio_{number}.yaml"))


BENCHMARKS: dict[str, list[Row]] = {
    "cifar100_lt": paper_table(
        "cifar100_lt",
        {"sgd": (77.8, 46.6, 13.5, 47.6), "sam": (79.7, 49.3, 12.4, 48.9), "imbsam": (75.9, 53.5, 19.4, 51.1)},
    ),
    "cifar100_lt_50": paper_table("cifar100_lt", {}, ratio("cifar100_lt", 50)),
    "cifar100_lt_10": paper_table("cifar100_lt", {}, ratio("cifar100_lt", 10)),
    "cifar10_lt": paper_table("cifar10_lt", {}),
    "imagenet_lt": paper_table("imagenet_lt", {"imbsam": (None, None, None, 55.3)}),
    "places_lt": paper_table("places_lt", {}),
    "inaturalist2018": paper_table("inaturalist2018", {"imbsam": (None, None, None, 71.1)}),
    "digits_lt": paper_table("digits_lt", {}),
    "cifar100_lt_losses": [
        Row(f"{method_title}, {title}", f"{method}_{name}", f"cifar100_lt/{method}_small.yaml", settings)
        for title, name, settings in (
            ("cross-entropy", "cross_entropy", ()),
            (
                "LDAM-DRW",
                "ldam_drw",
                (
                    "--model.head=cosine",
                    "--model.loss=LDAM",
                    "--trainer.callbacks+=DeferredReweighting",
                    "--trainer.callbacks.start_epoch=24",
                ),
            ),
            ("balanced softmax", "balanced_softmax", ("--model.loss=LogitAdjusted",)),
        )
        for method_title, method in (("SGD", "sgd"), ("ImbSAM", "imbsam"))
    ],
}
"""The tables by name; cifar100_lt_losses is the small CPU recipe with three losses."""


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
    return [
        *(sys.executable, "-m", "lightning_modules.cli", "fit", "--config", str(CONFIGS / row.config), *row.settings),
        *((f"--data.root={root}",) if root else ()),
        *settings,
        f"--seed_everything={seed}",
        f"--data.seed={seed}",
        f"--trainer.logger.init_args.save_dir={LOGS}",
        f"--trainer.logger.init_args.name={folder_of(benchmark, row, seed)}",
        "--ckpt_path=last",
    ]


def run(arguments: Sequence[str], deadline: float | None) -> bool:
    """Run until it ends, or at the deadline ask it to stop; returns whether it ended by itself.

    Raises:
        SystemExit: it failed, or SIGTERM or Ctrl-C came, which end it too.
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
    except KeyboardInterrupt:  # the terminal has sent it to the run too; of SIGTERM it knows nothing
        process.terminate()
        process.wait()
        raise SystemExit("interrupted; start again to resume") from None
    # asked to stop before it began to train: it says so itself, or was still importing
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
    """Train what is not finished, whole seeds first; returns whether all is done."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    missing = [(seed, row) for seed in seeds for row in rows if tested(benchmark, row, seed) is None]
    print(
        f"{benchmark}: {len(seeds) * len(rows) - len(missing)} of {len(seeds) * len(rows)} runs are there", flush=True
    )
    for seed, row in missing:
        print(f"{row.title}, seed {seed}", flush=True)
        arguments = command(benchmark, row, seed, root, settings)
        if not run(arguments, deadline) or (deadline is not None and time.monotonic() >= deadline):
            break
    return all(tested(benchmark, row, seed) for seed, row in missing)


def table(benchmark: str, rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """Markdown: mean and standard deviation over the seeds that are there, and the published numbers."""
    lines = [
        f"| {benchmark} | seeds | epochs | " + " | ".join(GROUPS) + " | published: " + " / ".join(GROUPS) + " |",
        "| :-- | --: | --: " + "| --: " * len(GROUPS) + "| --: |",
    ]
    for row in rows:
        runs = [found for seed in seeds if (found := tested(benchmark, row, seed))]
        cells = [_cell([100 * one.final[f"test/{group}"] for one in runs]) for group in GROUPS]
        known = any(value is not None for value in row.published)
        published = " / ".join("" if value is None else f"{value:.1f}" for value in row.published) if known else ""
        # a trial of one epoch counts as a run too, and is to be seen
        epochs = ", ".join(sorted({str(one.settings.get("trainer.max_epochs", "")) for one in runs}))
        lines.append(f"| {row.title} | {len(runs)} | {epochs} | " + " | ".join(cells) + f" | {published} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values or not all(map(math.isfinite, values)):  # nan: no class is in the group
        return "-" if values else ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def pack(root: str, path: Path, ratio: float, seed: int) -> None:
    """Write CIFAR-100-LT's images to one file."""
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
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "pack"])
    parser.add_argument("file", nargs="?", type=Path, help="pack: the file to write")
    parser.add_argument("--root", help="where the data lie; default: the DataModule's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="some rows only, by their folders' names")
    parser.add_argument("--minutes", type=float, help="stop after this time; start again to resume")
    parser.add_argument("--table", action="store_true", help="print the table of what is there and train nothing")
    parser.add_argument("--ratio", type=float, default=100, help="pack: imbalance ratio; larger ones are in it too")
    args = parser.parse_intermixed_args(own)  # else a file after an option is not seen
    if args.benchmark == "pack":
        if args.file is None or args.file.suffix != ".npz":
            parser.error("pack: name the file to write, ending in .npz")
        pack(args.root or "data", args.file, args.ratio, args.seeds[0])
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the run would outlive this script
    rows = BENCHMARKS[args.benchmark]
    if args.rows:
        names = [row.name for row in rows]
        if unknown := set(args.rows) - set(names):
            parser.error(f"--rows: no {', '.join(sorted(unknown))}; {args.benchmark} has {', '.join(names)}")
        rows = [row for row in rows if row.name in args.rows]
    done = args.table or train_missing(args.benchmark, rows, args.seeds, args.root, args.minutes, settings)
    print(table(args.benchmark, rows, args.seeds))
    if not done:
        print("\nnot done yet: start again to resume", file=sys.stderr)


if __name__ == "__main__":
    main()
