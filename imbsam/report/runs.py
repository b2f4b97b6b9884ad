"""Read a run's folder, as Lightning's CSVLogger and our callbacks write it."""

import csv
import datetime
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from imbsam.report.method import Method, method_of
from imbsam.report.task import CLASSIFIER, Task, task_of

# settings that do not make a run another experiment: seeds, paths, logging, what predict is compared with
NOT_SETTINGS = re.compile(
    r"seed_everything|seed|root|config|ckpt_path|weights_only|checkpoint\..*|predictions\..*|drift\..*|_.*"
    r"|trainer\.(logger.*|enable_.*|log_every_n_steps|default_root_dir)|device|processes"
)

# settings of a DataModule that do not say which samples are trained and tested on
NOT_DATA = re.compile(
    r"seed|(predict_|test_)?(root|path)|lists|num_workers|(eval_)?batch_size|batches_per_epoch|sampling|mixup|cutmix"
    r"|(auto)?augment|color_jitter|image_size|corrupt_images|images_on_device|scaling|_.*"
)

EVALUATION_FILES = {
    "classes": ("per_class.csv", "class class_name training_samples group tail test_samples accuracy"),
    "confusion": ("confusion.csv", "target predicted count"),
    "calibration": ("calibration.csv", "group bin samples confidence accuracy"),
    "calibrated": ("calibrated.csv", "group bin samples confidence accuracy"),
    "sharpness": ("sharpness.csv", "epoch group measure value"),
}
"""What a run may have written: attribute of :class:`Run`, file, and the columns that are read."""

TEXT = {"class_name", "group", "measure", "split", "settings"}
"""The columns of CSV files that are not numbers."""

Row = dict[str, Any]


class UnreadableRunError(Exception):
    """Why a folder cannot be reported, in one line."""


@dataclass
class Run:
    """One training and its test.

    Attributes:
        folder: its folder.
        place: the folder's last two names above ``version_N``.
        seeds: its seeds; empty where they are not known.
        settings: dotted name to value, where it is not null, without what does not make it another experiment.
        final: the last value of every logged quantity; accuracies are in [0, 1].
        curves: quantity to its (epoch from 1, value) pairs, for what is logged once an epoch.
        hardware: device and processes.
        task: what the model does.
        data: settings that say which samples it was trained and tested on, the DataModule's class under "data set".
        date: when its log was last written, ISO 8601.
        classes: the rows of ``per_class.csv``; this and the following are empty where there is no such file.
        confusion: the rows of ``confusion.csv``.
        calibration: the rows of ``calibration.csv``.
        calibrated: the rows of ``calibrated.csv``, after calibration.
        sharpness: the rows of ``sharpness.csv``.
        facts: the content of ``facts.json``.
    """

    folder: Path
    place: str
    seeds: tuple[Any, ...]
    settings: dict[str, Any]
    final: dict[str, float]
    curves: dict[str, list[tuple[int, float]]]
    hardware: dict[str, Any]
    task: Task = CLASSIFIER
    data: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    classes: list[Row] = field(default_factory=list)
    confusion: list[Row] = field(default_factory=list)
    calibration: list[Row] = field(default_factory=list)
    calibrated: list[Row] = field(default_factory=list)
    sharpness: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        """What it was trained with."""
        return method_of(self.settings)

    @property
    def test_samples(self) -> int | None:
        """Size of the test set, where ``per_class.csv`` tells."""
        return sum(row["test_samples"] for row in self.classes) or None

    @property
    def training_samples(self) -> int | None:
        """Size of the training set, where ``per_class.csv`` tells."""
        return sum(row["training_samples"] for row in self.classes) or None


def read_runs(paths: Iterable[Path]) -> tuple[list[Run], dict[Path, str]]:
    """Read every run in some folders, at any depth.

    Args:
        paths: run folders, or folders that hold some.

    Returns:
        The runs in the order of the paths, and each skipped folder with the reason. Of several runs in one place with
        the same settings and seeds the newest counts.
    """
    runs: list[Run] = []
    skipped: dict[Path, str] = {}
    for path in paths:
        folders = find_folders(path)
        if not folders:
            skipped[path] = "there is no run in it" if path.is_dir() else "no such folder"
        for folder in folders:
            try:
                runs.append(read_run(folder))
            except (UnreadableRunError, OSError) as reason:
                skipped[folder] = str(reason)
    newest: dict[str, Run] = {}
    for run in runs:
        key = f"{run.folder.resolve().parent} {run.settings} {run.seeds}" if run.seeds else str(run.folder.resolve())
        older = newest.get(key)
        if older is not None and older.folder.resolve() != run.folder.resolve():
            if version(run.folder) < version(older.folder):
                run, older = older, run
            skipped[older.folder] = f"{run.folder.name} has the same settings and seed, and is newer"
        newest[key] = run
    return list(newest.values()), skipped


def find_folders(path: Path) -> list[Path]:
    """The run folders at or below a path, version_2 before version_10."""
    if is_run(path):
        return [path]
    inside = sorted((p for p in path.iterdir() if p.is_dir()), key=version) if path.is_dir() else []
    # written beside a run by `imbsam test` and the like
    runs = [p for p in inside if not re.fullmatch(r"(test|validate|predict)_\d+", p.name)]
    return [folder for child in runs for folder in find_folders(child)]


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, even an empty one."""
    return path.is_dir() and ((path / "metrics.csv").exists() or re.fullmatch(r"version_\d+", path.name) is not None)


def version(path: Path) -> tuple[Any, ...]:
    """The sort key of a name with numbers in it: (text, number, text, ...)."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name))


def read_run(folder: Path) -> Run:
    """Read one run.

    Raises:
        UnreadableRunError: it was not trained, not tested, or its files are cut off.
    """
    log = folder / "metrics.csv"
    if not log.exists():
        raise UnreadableRunError("it has no metrics.csv: the run stopped before its first epoch")
    final: dict[str, float] = {}
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in read_csv(log, "epoch"):
        for name, value in row.items():
            if value is not None:
                final[name] = value
                if name.startswith(("train/", "val/")) and not name.endswith("_step"):
                    curves[name].append((int(row["epoch"]) + 1, value))
    config = _read_yaml(folder / "config.yaml")
    logged = _read_yaml(folder / "hparams.yaml") if (folder / "hparams.yaml").exists() else {}
    task = task_of(final)
    if task is None:
        raise UnreadableRunError("its log has no training loss: a test, a prediction, or nothing yet")
    if missing := [name for name in task.results if name not in final]:
        raise UnreadableRunError(f"its log has no {missing[0]}: not tested yet")
    # the model's and the data's arguments by their own names
    flat = {re.sub(r"^(model|data)\.", "", key): value for key, value in flatten(config).items() if value is not None}
    return Run(
        folder=folder,
        place="/".join(folder.resolve().parts[-3:-1]),
        seeds=tuple(flat[key] for key in ("seed_everything", "seed") if key in flat),
        settings={key: value for key, value in flat.items() if not NOT_SETTINGS.fullmatch(key)},
        final=final,
        curves=dict(curves),
        hardware={key: logged[key] for key in ("device", "processes") if key in logged},
        task=task,
        data=_data(config.get("data")),
        date=datetime.date.fromtimestamp(log.stat().st_mtime).isoformat(),
        facts=_read_json(folder / "facts.json"),
        **{
            name: read_csv(folder / file, needed) if (folder / file).exists() else []
            for name, (file, needed) in EVALUATION_FILES.items()
        },
    )


def _data(config: Any) -> dict[str, Any]:
    """The settings of the data, without those that do not say which samples they are."""
    flat = {key.removeprefix("data set."): v for key, v in flatten(config, "data set").items() if v is not None}
    # a file by its name alone: it may be elsewhere on another machine
    files = {key: Path(str(flat[key])).name for key in ("path", "test_path") if key in flat}
    return {key: value for key, value in flat.items() if not NOT_DATA.fullmatch(key)} | files


def read_csv(path: Path, needed: str = "") -> list[Row]:
    """The rows of a CSV file that was written to its end: numbers, None for an empty cell, and text in :data:`TEXT`.

    Args:
        path: the file.
        needed: columns that it must have, separated by spaces.

    Raises:
        UnreadableRunError: it is empty or cut off, lacks a column, or has a word where a number belongs.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise UnreadableRunError(f"its {path.name} is empty")
    rows: list[Row] = list(csv.DictReader(io.StringIO(text, newline="")))
    if not text.endswith("\n") or any(None in row or None in row.values() for row in rows):
        raise UnreadableRunError(f"its {path.name} is cut off: half-written?")
    if rows and (missing := set(needed.split()) - set(rows[0])):
        raise UnreadableRunError(f"its {path.name} has no column {min(missing)}")
    for row in rows:
        for name, cell in row.items():
            if name not in TEXT:
                try:
                    row[name] = None if cell == "" else int(cell) if cell.isdigit() else float(cell)
                except ValueError as error:
                    raise UnreadableRunError(f"its {path.name} has {cell!r} as {name}") from error
    return rows


def flatten(config: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as dotted names; a class is its path's last part, its arguments stand beside it."""
    if not isinstance(config, dict) or not config:
        return {name: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key == "class_path":
            flat[name] = str(value).rpartition(".")[2]
        elif key != "init_args" or value:  # a class without arguments stays its name
            flat.update(flatten(value, name if key == "init_args" else f"{name}.{key}".strip(".")))
    return flat


def _read_json(path: Path) -> dict[str, Any]:
    """An object; empty where there is no such file, as in runs of before there was one."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnreadableRunError(f"its {path.name} cannot be read: half-written?") from error
    if not isinstance(content, dict):
        raise UnreadableRunError(f"its {path.name} is no object: half-written?")
    return content


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UnreadableRunError(f"it has no {path.name}")
    try:
        content = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UnreadableRunError(f"its {path.name} cannot be read: half-written?") from error
    if not isinstance(content, dict):
        raise UnreadableRunError(f"its {path.name} is empty or no mapping: half-written?")
    return content
