"""Train and print the tables of the papers: every method and seed of a table, resuming where it was stopped.

python scripts/reproduce.py cifar100_lt --root data                   # train what is missing, then print the table
python scripts/reproduce.py cifar100_lt --root data --jobs 4          # four runs side by side, their output in files
python scripts/reproduce.py cifar100_lt --root data --minutes 9       # stop after 9 minutes; run it again to resume
python scripts/reproduce.py cifar100_lt --table                       # print the table of the finished runs
python scripts/reproduce.py cifar100_lt --root data -- --config configs/trainer/gpu.yaml --model.compile true
python scripts/reproduce.py published                                 # print the published numbers
python scripts/reproduce.py pack --root data cifar100_lt_100.npz      # pack the images of ratio 100, seed 0

The tables are in configs/tables.yaml. Arguments after ``--`` go to every ``imbsam fit``. Runs are in
logs/reproduce/TABLE/ROW/seed_N: an interrupted run resumes from its last checkpoint, a finished one is left alone.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reproduction.processes import Job, Processes
from reproduction.results import table
from reproduction.runs import SeededRow
from reproduction.tables import Row, published_table, tables


def train_missing(name: str, rows: Sequence[Row], args: argparse.Namespace, settings: list[str]) -> bool:
    """Train what is not finished, seed by seed; returns whether no run failed."""
    runs = [SeededRow(row, seed) for seed in args.seeds for row in rows]
    missing = [run for run in runs if run.tested() is None]
    print(f"{name}: {len(runs) - len(missing)} of {len(runs)} runs are finished", flush=True)
    in_files = args.jobs > 1
    if in_files:
        settings = ["--trainer.enable_progress_bar=false", *settings]  # which a file has no use for
    jobs = [Job(run.title, run.command(args.root, settings), run.output if in_files else None) for run in missing]
    processes = Processes(args.jobs, args.minutes)
    processes.run(jobs)
    if not processes.failed and any(run.tested() is None for run in missing):
        print("not finished: run the same command again to resume", file=sys.stderr)
    return not processes.failed


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
    known = tables()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table_name", metavar="table", choices=[*known, "published", "pack"], help=", ".join(known))
    parser.add_argument("file", nargs="?", type=Path, help="pack: the file to write")
    parser.add_argument("--root", help="folder of the data; default: the DataModule's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="only these rows, by the names of their folders")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each with its own file of output")
    parser.add_argument("--minutes", type=float, help="stop after this time; run the same command again to resume")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs without training")
    parser.add_argument("--ratio", type=float, default=100, help="pack: imbalance ratio; larger ones fit too")
    args = parser.parse_intermixed_args(own)  # which also sees a file after an option
    if args.table_name == "published":
        print(published_table())
        return
    if args.table_name == "pack":
        if args.file is None or args.file.suffix != ".npz":
            parser.error("pack: name the file to write, ending in .npz")
        pack(args.root or "data", args.file, args.ratio, args.seeds[0])
        return
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}: give a number from 1")
    rows = known[args.table_name]
    if args.rows:
        names = [row.name for row in rows]
        if unknown := set(args.rows) - set(names):
            parser.error(f"--rows: no {', '.join(sorted(unknown))}; {args.table_name} has {', '.join(names)}")
        rows = [row for row in rows if row.name in args.rows]
    succeeded = args.table or train_missing(args.table_name, rows, args, settings)
    print(table(args.table_name, rows, args.seeds))
    if not succeeded:
        sys.exit(1)


if __name__ == "__main__":
    main()
