"""Does ImbSAM help anomaly detection? Fits every detector, sampling, method, data set and seed, and prints a table.

python scripts/anomaly_table.py ADBENCH_FOLDER --tune   # tune rho on the validation parts of four data sets
python scripts/anomaly_table.py ADBENCH_FOLDER          # run the grid, then print the table; run it again to resume
python scripts/anomaly_table.py ADBENCH_FOLDER --table  # print the table of the finished fits

ADBENCH_FOLDER holds ADBench's npz files in folders (Classical, CV_by_ResNet18, NLP_by_BERT). Results go to
results/anomaly/{tuning,fits}.csv, one row per fit, one seed after another.
"""

import argparse
import csv
import functools
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

METHODS = ("sgd", "sam", "imbsam")
RHOS = (0.02, 0.1, 0.5, 1.0)  # 1.0 was added when 0.5, then the highest, came out best in most rows
COLUMNS = ("data", "detector", "sampling", "method", "rho", "seed", "max_epochs")
RESULTS = ("auroc", "average_precision", "train_auroc", "train_loss", "learned", "constant", "steps", "seconds")
"""``train_auroc`` is the AUROC of the labelled training anomalies against the normal training samples; ``learned`` is
the share of them that score above the median of the unlabelled samples, 0.5 by chance; ``constant`` is 1 if all
training samples have the same score; ``steps`` includes those after the best epoch."""

LEARNED = 0.75
"""A row of the table with a lower ``learned`` is marked."""

# Chosen before any result, by a rule: the classical tables of smallest and of median width, and the first data set each
# of images and of texts.
TUNING_SETS = (
    "Classical/2_annthyroid",
    "Classical/6_cardio",
    "CV_by_ResNet18/CIFAR10_0",
    "NLP_by_BERT/20news_3",
)


BATCHES_PER_EPOCH = 50
MAX_EPOCHS = 200
PATIENCE = 10
VAL_SHARE = 0.2
"""As in configs/data/anomaly_table.yaml: until the validation loss has not fallen for 500 steps; to save time, at most
10,000 steps."""


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained with one sampling, the same for all three methods: as in configs/detector.

    The papers take 600 (FEAWAD) to 1,000 (DevNet, PReNet) steps of 512 samples at a learning rate of 1e-3 or 1e-4. Here
    Adam replaces RMSprop in all of them.
    """

    sampling: str
    """The DataModule's."""
    args: dict[str, Any] = field(default_factory=dict)
    """The detector's."""
    lr: float = 2e-3
    batch_size: int = 256
    weight_decay: float = 0.0


RECIPES = {
    ("devnet", "own"): Recipe("balanced"),
    ("deep_sad", "own"): Recipe("natural", lr=1e-3, weight_decay=1e-6),  # natural is its own
    ("prenet", "own"): Recipe("pairs"),
    ("feawad", "own"): Recipe("balanced", {"pretrain_steps": 150}, lr=1e-3, batch_size=128),  # it has the widest net
    ("classifier", "own"): Recipe("natural"),
    ("classifier", "natural"): Recipe("natural", {"weighted": False}),
}
"""By detector and sampling, its own or natural. The classifier's "own" is inverse-frequency weights."""


@dataclass(frozen=True)
class Fit:
    """One training, and the part it is judged on."""

    data: str
    detector: str
    sampling: str
    method: str
    rho: float
    seed: int
    max_epochs: int = MAX_EPOCHS
    tuning: bool = False
    labelled_share: float = 0.1

    def key(self) -> tuple[str, ...]:
        """Identifies it among the fits of its file."""
        return tuple(str(getattr(self, name)) for name in COLUMNS)


def run(fit: Fit, folder: Path) -> dict[str, Any]:
    """Train and evaluate; the seconds are this process's CPU seconds of training, with preparation and validation.

    The validation loss sees the same labels as training; a tuning fit is then evaluated by all true labels of that
    part, any other by those of the test part.
    """
    import torch
    from lightning.pytorch import Trainer, seed_everything

    from datamodules import AnomalyDataModule
    from imbsam import SAM, ImbSAM, Plain
    from lightning_modules import AnomalyDetector, RestoringEarlyStopping
    from lightning_modules.detectors import FEAWAD, DeepSAD, DevNet, PReNet, WeightedClassifier

    recipe = RECIPES[fit.detector, fit.sampling]
    seed_everything(fit.seed, verbose=False)
    data = AnomalyDataModule(
        path=folder / f"{fit.data}.npz",
        sampling=recipe.sampling,  # type: ignore[arg-type]
        batch_size=recipe.batch_size,
        batches_per_epoch=BATCHES_PER_EPOCH,
        labelled_share=fit.labelled_share,
        val_share=VAL_SHARE,
        min_rows=1000,
        max_rows=10000,
        seed=fit.seed,
    )
    method = {"sgd": Plain, "sam": SAM, "imbsam": ImbSAM}[fit.method]
    kind = {
        "devnet": DevNet,
        "deep_sad": DeepSAD,
        "prenet": PReNet,
        "feawad": FEAWAD,
        "classifier": WeightedClassifier,
    }[fit.detector]
    detector = AnomalyDetector(
        functools.partial(kind, **recipe.args),
        sam=functools.partial(method, **({} if method is Plain else {"rho": fit.rho})),
        optimizer=functools.partial(torch.optim.Adam, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True),
    )
    trainer = Trainer(
        max_epochs=fit.max_epochs,
        callbacks=[RestoringEarlyStopping(patience=PATIENCE)],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data.setup()  # reading the file does not count as training
    start = time.process_time()
    trainer.fit(detector, datamodule=data)
    seconds = time.process_time() - start
    loss, steps = float(trainer.callback_metrics["train/loss"]), trainer.global_step
    with torch.no_grad():
        scores = detector(data.train_features)
    constant = bool(scores.max() - scores.min() <= 1e-6 * scores.abs().max())
    anomalies, unlabelled = scores[data.train_labels == 1], scores[data.train_labels == 0]
    learned = 0.0 if constant else float((anomalies > unlabelled.median()).float().mean())
    part, judge = ("val", trainer.validate) if fit.tuning else ("test", trainer.test)
    metrics = judge(detector, datamodule=data, verbose=False)[0]
    results = {
        "auroc": f"{metrics[f'{part}/auroc']:.6f}",
        "average_precision": f"{metrics[f'{part}/average_precision']:.6f}",
        "train_auroc": f"{auroc_of_labelled(scores, data.train_labels, data.train_true_labels):.6f}",
        "train_loss": f"{loss:.6g}",
        "learned": f"{learned:.4f}",
        "constant": int(constant),
        "steps": steps,
        "seconds": f"{seconds:.3f}",
    }
    return {name: value for name, value in asdict(fit).items() if name in COLUMNS} | results


def auroc_of_labelled(scores: Any, labels: Any, true_labels: Any) -> float:
    """AUROC of the labelled anomalies against the normal samples, without the hidden anomalies."""
    from torchmetrics.functional.classification import binary_auroc

    known = (labels == 1) | (true_labels == 0)
    return float(binary_auroc(scores[known], labels[known]))


def start_worker() -> None:
    """Quiet and single-threaded."""
    from lightning_modules.quiet_process import quiet_process

    quiet_process()


def work(task: tuple[Fit, Path]) -> dict[str, Any] | str:
    """A row of the results, or the error message."""
    try:
        return run(*task)
    except Exception as error:
        return f"{task[0]}: {type(error).__name__}: {error}"


def data_sets(folder: Path) -> list[str]:
    """The npz files, as folder/name."""
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.npz"))


def detector_variants(detectors: Iterable[str]) -> list[tuple[str, str]]:
    """The (detector, sampling) pairs of these detectors, in the order of the table."""
    return [variant for variant in RECIPES if variant[0] in detectors]


def tuning_fits(seeds: Iterable[int], variants: list[tuple[str, str]], max_epochs: int = MAX_EPOCHS) -> Iterator[Fit]:
    """Every rho for SAM and ImbSAM, and SGD for comparison, evaluated on the validation part."""
    for seed, data, variant in itertools.product(seeds, TUNING_SETS, variants):
        yield Fit(data, *variant, "sgd", 0.0, seed, max_epochs, tuning=True)
        for rho, method in itertools.product(RHOS, ("sam", "imbsam")):
            yield Fit(data, *variant, method, rho, seed, max_epochs, tuning=True)


def grid_fits(
    names: list[str],
    seeds: Iterable[int],
    variants: list[tuple[str, str]],
    rhos: dict[tuple[str, str, str], float],
    max_epochs: int = MAX_EPOCHS,
) -> Iterator[Fit]:
    """One seed after another, so that an interrupted grid still gives a table."""
    for seed, data, variant, method in itertools.product(seeds, names, variants, METHODS):
        yield Fit(data, *variant, method, rhos.get((*variant, method), 0.0), seed, max_epochs)


def read(path: Path) -> list[dict[str, str]]:
    """The finished fits; a last line that a crash has truncated is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row.get(name) for name in (*COLUMNS, *RESULTS))]


def select_max_epochs(rows: list[dict[str, str]], max_epochs: int = MAX_EPOCHS) -> list[dict[str, str]]:
    """The fits with this max_epochs: shorter trials are kept apart."""
    return [row for row in rows if row["max_epochs"] == str(max_epochs)]


def select_rhos(rows: list[dict[str, str]], rhos: dict[tuple[str, str, str], float]) -> list[dict[str, str]]:
    """The fits with these rhos, and SGD's."""
    keyed = [((row["detector"], row["sampling"], row["method"]), row) for row in rows]
    return [row for key, row in keyed if key[2] == "sgd" or float(row["rho"]) == rhos.get(key)]


def run_missing(fits: list[Fit], path: Path, folder: Path, workers: int) -> int:
    """Run the fits that `path` lacks, appending a row as each finishes; returns how many failed."""
    rows = read(path)
    done = {tuple(row[name] for name in COLUMNS) for row in rows}
    missing = [fit for fit in fits if fit.key() not in done]
    print(f"{path}: {len(fits) - len(missing)} of {len(fits)} fits are finished", file=sys.stderr)
    if not missing:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:  # drops a truncated line
        writer = csv.DictWriter(file, (*COLUMNS, *RESULTS))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
    failed = 0
    tasks = [(fit, folder) for fit in missing]
    started = time.monotonic()
    with (
        path.open("a", newline="") as file,
        multiprocessing.get_context("spawn").Pool(workers, start_worker) as pool,
    ):
        writer = csv.DictWriter(file, (*COLUMNS, *RESULTS))
        for n, result in enumerate(pool.imap_unordered(work, tasks), start=1):
            if isinstance(result, str):
                failed += 1
                print(f"failed: {result}", file=sys.stderr)
            else:
                writer.writerow(result)
                file.flush()
            if n % 25 == 0 or n == len(tasks):
                left = (time.monotonic() - started) / n * (len(tasks) - n)
                print(f"{n} of {len(tasks)} fits, {left / 60:.0f} minutes left", file=sys.stderr, flush=True)
    if failed:
        print(f"{failed} fits failed: run the same command again to retry", file=sys.stderr)
    return failed


def best_rhos(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], float]:
    """For each detector, sampling and method the rho of the best mean average precision on the validation parts.

    Only (data set, seed) pairs that have every rho count, so that an interrupted tuning compares like with like.
    """
    tuned: dict[tuple[str, str, str], dict[tuple[str, str], dict[float, float]]] = {}
    for row in rows:
        if row["method"] != "sgd":
            cell = tuned.setdefault((row["detector"], row["sampling"], row["method"]), {})
            cell.setdefault((row["data"], row["seed"]), {})[float(row["rho"])] = float(row["average_precision"])
    best = {}
    for key, cells in tuned.items():
        whole = [cell for cell in cells.values() if set(cell) >= set(RHOS)]
        if whole:
            best[key] = max(RHOS, key=lambda rho: mean(cell[rho] for cell in whole))
    return best


def tuning_table(rows: list[dict[str, str]]) -> str:
    """Mean average precision on the validation parts for every rho."""
    best = best_rhos(rows)
    lines = [
        "| detector | sampling | method | " + " | ".join(f"rho {rho}" for rho in RHOS) + " | SGD |",
        "| --- " * (len(RHOS) + 4) + "|",
    ]
    for detector, sampling, method in best:
        cells = []
        for rho in (*RHOS, 0.0):
            values = [
                100 * float(row["average_precision"])
                for row in rows
                if (row["detector"], row["sampling"], float(row["rho"])) == (detector, sampling, rho)
                and row["method"] == (method if rho else "sgd")
            ]
            text = f"{mean(values):.1f}" if values else ""
            cells.append(f"**{text}**" if rho == best[detector, sampling, method] else text)
        lines.append(f"| {detector} | {sampling} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(rows: list[dict[str, str]]) -> str:
    """The results in Markdown: overall, with and without the tuning data sets, cost, then each data set."""
    values: dict[tuple[str, str, str], dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:
        cell = values.setdefault((row["detector"], row["sampling"], row["method"]), {})
        cell[row["data"], row["seed"]] = row
    variants = [variant for variant in RECIPES if any(key[:2] == variant for key in values)]
    parts: list[str] = []
    for metric, title in (("average_precision", "Average precision"), ("auroc", "AUROC")):
        parts.append(_overall(values, variants, metric, f"{title} in %, mean over data sets"))
        without = {
            key: {at: row for at, row in cell.items() if at[0] not in TUNING_SETS} for key, cell in values.items()
        }
        title = f"{title} in %, without the {len(TUNING_SETS)} data sets that rho was tuned on"
        parts.append(_overall(without, variants, metric, title))
    parts += [_overfitting(values, variants), _cost(values, variants)]
    for metric, title in (("average_precision", "Average precision"), ("auroc", "AUROC")):
        parts.append(_each_data_set(values, variants, metric, title))
    return "\n\n".join(parts)


def _comparable(
    values: dict[Any, Any], variants: list[tuple[str, str]]
) -> Iterator[tuple[str, str, list[dict[tuple[str, str], dict[str, str]]], list[tuple[str, str]]]]:
    """Detector, sampling, the methods' fits, and the (data set, seed) pairs that all methods have.

    An interrupted grid has fits of some methods only.
    """
    for detector, sampling in variants:
        cells = [values.get((detector, sampling, method), {}) for method in METHODS]
        if common := sorted(set.intersection(*(set(cell) for cell in cells))):
            yield detector, sampling, cells, common


def _overall(values: dict[Any, Any], variants: list[tuple[str, str]], metric: str, title: str) -> str:
    """Means over data sets, wins and losses, and whether the labelled anomalies were learned.

    In brackets each p as the false discovery rate over all comparisons of the table (Benjamini and Hochberg, 1995).
    """
    from scipy.stats import false_discovery_control

    lines = [
        f"### {title}",
        "",
        "| detector | sampling | data sets x seeds | rho SAM / ImbSAM | SGD | SAM | ImbSAM "
        "| ImbSAM against SGD: wins / losses / ties, p (corrected) | against SAM: wins / losses / ties, p (corrected) "
        "| % of labelled training anomalies above the unlabelled median | fits with constant scores |",
        "| --- " * 11 + "|",
    ]
    rows = list(_comparable(values, variants))
    means_of_rows = [[_by_data_set(cell, common, metric) for cell in cells] for _, _, cells, common in rows]
    p_values = [_p_value(imbsam, other) for *others, imbsam in means_of_rows for other in others]
    corrected = iter(false_discovery_control(p_values))
    for (detector, sampling, cells, common), means in zip(rows, means_of_rows, strict=True):
        rho = [next(iter(cell.values()))["rho"] for cell in cells[1:]]
        learned = [mean(float(cell[key]["learned"]) for key in common) for cell in cells]
        constant = [sum(row["constant"] == "1" for row in (cell[key] for key in common)) for cell in cells]
        name = f"{sampling}, not learned" if min(learned) < LEARNED else sampling
        seeds = len({seed for _, seed in common})
        lines.append(
            f"| {detector} | {name} | {len(means[0])} x {seeds} | {rho[0]} / {rho[1]} | "
            + " | ".join(f"{mean(m.values()):.1f}" for m in means)
            + "".join(f" | {_compare(means[2], other)} ({next(corrected):.3f})" for other in means[:2])
            + " | "
            + " / ".join(f"{100 * share:.0f}" for share in learned)
            + " | "
            + " / ".join(f"{count}" for count in constant)
            + f" of {len(common)} |"
        )
    return "\n".join(lines)


def _by_data_set(
    cell: dict[tuple[str, str], dict[str, str]], common: list[tuple[str, str]], metric: str
) -> dict[str, float]:
    """Mean over seeds, in %."""
    return {
        data: mean(100 * float(cell[d, seed][metric]) for d, seed in common if d == data)
        for data in dict.fromkeys(d for d, _ in common)
    }


def _compare(ours: dict[str, float], theirs: dict[str, float]) -> str:
    """Wins, losses and ties (less than 0.05 points apart) over data sets, and p."""
    differences = [ours[data] - theirs[data] for data in ours]
    wins, losses = sum(d >= 0.05 for d in differences), sum(d <= -0.05 for d in differences)
    return f"{wins} / {losses} / {len(differences) - wins - losses}, {_p_value(ours, theirs):.3f}"


def _p_value(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """The Wilcoxon signed-rank test's, over data sets."""
    from scipy.stats import wilcoxon

    differences = [ours[data] - theirs[data] for data in ours]
    return float(wilcoxon(differences).pvalue) if any(differences) else 1.0


def _overfitting(values: dict[Any, Any], variants: list[tuple[str, str]]) -> str:
    """How much better the labelled training anomalies are separated from normal samples than the test part's."""
    lines = [
        "### AUROC in % of the labelled training anomalies, and how far behind it the test part is",
        "",
        "| detector | sampling | data sets x seeds | training: SGD | SAM | ImbSAM | behind: SGD | SAM | ImbSAM "
        "| ImbSAM less behind than SGD: wins / losses / ties, p |",
        "| --- " * 10 + "|",
    ]
    for detector, sampling, cells, common in _comparable(values, variants):
        train, test = ([_by_data_set(cell, common, name) for cell in cells] for name in ("train_auroc", "auroc"))
        behind = [{d: a[d] - b[d] for d in a} for a, b in zip(train, test, strict=True)]
        lines.append(
            f"| {detector} | {sampling} | {len(train[0])} x {len({seed for _, seed in common})} | "
            + " | ".join(f"{mean(m.values()):.1f}" for m in (*train, *behind))
            + f" | {_compare(behind[0], behind[2])} |"
        )
    return "\n".join(lines)


def _cost(values: dict[Any, Any], variants: list[tuple[str, str]]) -> str:
    """Median seconds per fit, and the methods' ratio to SGD on the same data sets and seeds."""
    lines = [
        "### Steps and CPU seconds per fit, median (in brackets the median ratio to SGD on the same data and seed)",
        "",
        "| detector | sampling | steps: SGD / SAM / ImbSAM | SGD | SAM | ImbSAM |",
        "| --- " * 6 + "|",
    ]
    for detector, sampling, cells, common in _comparable(values, variants):
        seconds = [[float(cell[key]["seconds"]) for key in common] for cell in cells]
        ratios = [median(s / sgd for s, sgd in zip(each, seconds[0], strict=True)) for each in seconds]
        texts = [f"{median(each):.2f} ({ratio:.2f})" for each, ratio in zip(seconds, ratios, strict=True)]
        steps = " / ".join(f"{median(int(cell[key]['steps']) for key in common):.0f}" for cell in cells)
        lines.append(f"| {detector} | {sampling} | {steps} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _each_data_set(values: dict[Any, Any], variants: list[tuple[str, str]], metric: str, title: str) -> str:
    names = sorted({data for cell in values.values() for data, _ in cell})
    lines = [
        f"### {title} in %, SGD / SAM / ImbSAM on each data set",
        "",
        "| data set | " + " | ".join(f"{detector}, {sampling}" for detector, sampling in variants) + " |",
        "| --- " * (len(variants) + 1) + "|",
    ]
    for data in names:
        cells = []
        for detector, sampling in variants:
            three = [values.get((detector, sampling, method), {}) for method in METHODS]
            seeds = set.intersection(*({seed for d, seed in cell if d == data} for cell in three))
            cells.append(
                " / ".join(f"{mean(100 * float(cell[data, s][metric]) for s in seeds):.1f}" for cell in three)
                if seeds
                else ""
            )
        lines.append(f"| {data} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="ADBench's npz files")
    parser.add_argument("--tune", action="store_true", help="tune rho on the validation parts of four data sets")
    parser.add_argument("--table", action="store_true", help="only print the table of the finished fits")
    parser.add_argument("--out", type=Path, default=Path("results/anomaly"), help="folder of tuning.csv and fits.csv")
    parser.add_argument("--seeds", type=int, default=None, help="number of seeds from 0 (default: 2, tuning: 1)")
    parser.add_argument("--workers", type=int, default=2, help="number of processes, of one thread each")
    parser.add_argument("--only", default="", help="only data sets whose name contains this, for a short trial")
    parser.add_argument(
        "--detectors",
        nargs="+",
        default=["devnet", "deep_sad", "prenet", "classifier"],
        choices=sorted({detector for detector, _ in RECIPES}),
        help="default: all but feawad, whose fits on 512 columns take one to three minutes",
    )
    parser.add_argument(
        "--max_epochs", type=int, default=MAX_EPOCHS, help="fewer epochs for a short trial, whose fits are kept apart"
    )
    settings = parser.parse_args(arguments)
    names = [name for name in data_sets(settings.folder) if settings.only in name]
    if not names and not settings.table:
        raise SystemExit(f"anomaly_table: no npz file in {settings.folder} whose name contains {settings.only!r}")
    variants = detector_variants(settings.detectors)
    tuning, fits = settings.out / "tuning.csv", settings.out / "fits.csv"
    if settings.tune:
        if missing := set(TUNING_SETS) - set(names):
            raise SystemExit(
                f"anomaly_table: {settings.folder} lacks data sets to tune rho on: {', '.join(sorted(missing))}"
            )
        todo = list(tuning_fits(range(1 if settings.seeds is None else settings.seeds), variants, settings.max_epochs))
        failed = run_missing(todo, tuning, settings.folder, settings.workers)
        print(tuning_table(select_max_epochs(read(tuning), settings.max_epochs)))
        sys.exit(1 if failed else 0)
    rhos, failed = best_rhos(select_max_epochs(read(tuning), settings.max_epochs)), 0
    seeds = range(2 if settings.seeds is None else settings.seeds)
    if not settings.table:
        wanted = {(*variant, method) for variant in variants for method in ("sam", "imbsam")}
        if wanted - set(rhos):
            raise SystemExit(f"anomaly_table: {tuning} has no rho for {sorted(wanted - set(rhos))}: run --tune first")
        todo = list(grid_fits(names, seeds, variants, rhos, settings.max_epochs))
        failed = run_missing(todo, fits, settings.folder, settings.workers)
    rows = select_rhos(select_max_epochs(read(fits), settings.max_epochs), rhos)
    print(table([row for row in rows if int(row["seed"]) in seeds]))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
