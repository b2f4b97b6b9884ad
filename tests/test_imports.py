"""Which files may import what, read from all import statements of a file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = [path.relative_to(REPOSITORY) for path in sorted((REPOSITORY / "imbsam").rglob("*.py"))]

ENGINE = {"torch", "numpy"}
ALSO_ALLOWED = {
    "imbsam/metrics.py": {"torchmetrics", "matplotlib"},
    "imbsam/anomaly_metrics.py": {"torchmetrics"},
    "imbsam/multilabel_metrics.py": {"torchmetrics"},
    "imbsam/sklearn.py": {"sklearn"},
    "imbsam/sharpness.py": {"scipy"},
    "imbsam/calibration.py": {"scipy", "sklearn"},
    "imbsam/calibration_metrics.py": {"torchmetrics"},
    "imbsam/conformal.py": {"scipy"},
    "imbsam/drift.py": {"scipy"},
    "imbsam/intervals.py": {"scipy"},
}
"""What single files of the method may import in addition to torch and NumPy."""
FOLDERS = ["sampling", "tables", "base", "features", "image_files", "image_arrays", "anomaly"]
"""The folders of datamodules/: each may import those before it."""
LIGHTNING_FOLDERS = {
    "resuming": {"resuming", "weight_files"},
    "backbones": {"backbones", "weight_files"},
    "detectors": {"detectors"},
    "tuning": {"tuning", "backbones", "weight_files"},
    "export": {"export", "callbacks"},
    "features": {"features", "weight_files"},
    "callbacks": {"callbacks", "backbones", "tuning", "epoch_log", "group_sharpness", "validation_part"},
}
"""The folders of lightning_modules/ that do not know models and command line, and what each may import."""
REPORT = {"rich", "yaml", "plotly", "matplotlib"}
TORCH_FREE = {"imbsam.group_names", "imbsam.messages"}
"""What the report shares with the rest of imbsam/."""
HAND_OVER = ("imbsam/command.py", "lightning_modules")
"""The one arrow that points up: the console script starts the command line."""


def imported(source: str) -> set[str]:
    """Full names of the modules that a file imports, without the standard library."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "import_module",
            "__import__",
        ):
            assert isinstance(node.args[0], ast.Constant), "a module imported by name is named"
            names.add(node.args[0].value)
    return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}


def refused(path: str, source: str) -> set[str]:
    """Imports of a file of imbsam/ that are not allowed."""
    names = imported(source)
    if path.startswith("imbsam/report/"):  # quick: neither torch nor the engine
        names -= TORCH_FREE | {"imbsam.intervals"}  # which needs torch for its type hints alone
        return {n for n in names if not n.startswith("imbsam.report") and n.split(".")[0] not in REPORT}
    if path == "imbsam/command.py":
        return {n for n in names if not n.startswith("imbsam.report") and n.split(".")[0] != HAND_OVER[1]}
    allowed = ENGINE | ALSO_ALLOWED.get(path, set())
    own = {n for n in names if n.split(".")[0] == "imbsam" and not n.startswith(("imbsam.report", "imbsam.command"))}
    return {n for n in names - own if n.split(".")[0] not in allowed}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path):
    assert refused(path.as_posix(), (REPOSITORY / path).read_text()) == set()


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("imbsam/backward.py", "from lightning_modules.callbacks.epoch_timer import Cost"),
        ("imbsam/backward.py", "def f():\n    import datamodules.base.long_tailed"),
        ("imbsam/backward.py", "from torchmetrics import Metric"),
        ("imbsam/backward.py", "from imbsam.report.runs import read_runs"),
        ("imbsam/backward.py", "import importlib\nimportlib.import_module('lightning')"),
        ("imbsam/metrics.py", "import lightning"),
        ("imbsam/sklearn.py", "import torchmetrics"),
        ("imbsam/report/page.py", "import torch"),
        ("imbsam/report/page.py", "from imbsam.class_groups import tail_mask"),
        ("imbsam/report/page.py", "from lightning_modules.cli.run import main"),
        ("imbsam/command.py", "from datamodules import DigitsLTDataModule"),
    ],
)
def test_a_wrong_import_is_found(path, statement):
    assert refused(path, statement)


@pytest.mark.parametrize("name", sorted(TORCH_FREE))
def test_what_the_report_shares_imports_nothing(name):
    assert imported((REPOSITORY / f"{name.replace('.', '/')}.py").read_text()) == set()


def refused_in_folder(folder: str, source: str) -> set[str]:
    """Imports of a file in a folder of datamodules/ that are not allowed."""
    allowed = {f"datamodules.{name}" for name in FOLDERS[: FOLDERS.index(folder) + 1]}
    ours = {n for n in imported(source) if n.split(".")[0] in ("datamodules", "lightning_modules")}
    return {n for n in ours if ".".join(n.split(".")[:2]) not in allowed}


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_within_datamodules_point_down(folder):
    files = sorted((REPOSITORY / "datamodules" / folder).rglob("*.py"))
    assert files
    assert {p.name: names for p in files if (names := refused_in_folder(folder, p.read_text()))} == {}


@pytest.mark.parametrize(
    ("folder", "statement"),
    [
        ("sampling", "from datamodules.base.long_tail import Profile"),
        ("tables", "from datamodules.image_files.lists import ListedImages"),
        ("anomaly", "from lightning_modules.resuming.csv_logger import ResumableCSVLogger"),
        ("base", "from datamodules import DigitsLTDataModule"),
    ],
)
def test_a_wrong_import_within_datamodules_is_found(folder, statement):
    assert refused_in_folder(folder, statement)


def test_every_folder_of_datamodules_is_checked():
    assert {p.parent.name for p in (REPOSITORY / "datamodules").rglob("*.py")} == {"datamodules", *FOLDERS}


@pytest.mark.parametrize("folder", LIGHTNING_FOLDERS)
def test_imports_within_lightning_modules_point_down(folder):
    found = {
        f"{path.name}: {name}"
        for path in (REPOSITORY / "lightning_modules" / folder).rglob("*.py")
        for name in imported(path.read_text())
        if name.startswith("lightning_modules") and name.split(".")[1] not in LIGHTNING_FOLDERS[folder]
    }
    assert found == set()


def test_only_one_statement_imports_the_command_line():
    found = {
        path.as_posix(): [n for n in imported((REPOSITORY / path).read_text()) if n.startswith("lightning_modules")]
        for path in FILES
    }
    assert {path: names for path, names in found.items() if names} == {HAND_OVER[0]: ["lightning_modules.cli.run"]}


def test_the_engine_is_imported_on_first_use():
    code = """
import sys, imbsam
assert "torch" not in sys.modules
assert {"ImbSAM", "SAM", "FocalSAM", "ClassAwareSAM", "SettingError"} <= set(dir(imbsam))
from imbsam import ImbSAM
from imbsam.sam import ImbSAM as same
assert ImbSAM is same is imbsam.ImbSAM
assert "torch" in sys.modules
namespace = {}
exec("from imbsam import *", namespace)
assert namespace["FocalSAM"] is imbsam.FocalSAM
assert namespace["CCSAM"] is imbsam.CCSAM
try:
    imbsam.Imbsam
except AttributeError as error:
    assert "Imbsam" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
