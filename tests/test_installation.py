"""What `pip install .` puts into site-packages, and that it works from there, in an empty folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel's files, unpacked into a folder."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed: pip install '.[dev]'")
    folder = tmp_path_factory.mktemp("site")
    for path in wheel.WheelBuilder(str(REPOSITORY)).build(directory=str(folder / "dist"), versions=["standard"]):
        with zipfile.ZipFile(path) as file:
            file.extractall(folder / "packages")
    return folder / "packages"


def run(site, cwd, *args):
    code = "import sys; sys.argv[0] = 'imbsam'; from imbsam.command import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site), "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done
    return done.stdout


def test_only_three_names_are_installed_into_site_packages(site):
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"imbsam", "lightning_modules", "datamodules"}
    configs = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "configs").rglob("*.yaml")}
    assert configs == {path.relative_to(site / "imbsam") for path in (site / "imbsam/configs").rglob("*.yaml")}
    assert {"page.css", "page.js"} <= {path.name for path in (site / "imbsam/report").iterdir()}
    assert (site / "imbsam/py.typed").exists()


def test_it_trains_and_reports_from_an_empty_folder(site, tmp_path):
    config = "configs/data/digits_lt.yaml"
    out = run(site, tmp_path, "fit", "--config", config, "--trainer.max_epochs=1")
    assert "log: logs/digits_lt/imbsam/version_0" in out
    table = run(site, tmp_path, "report", "logs", "--format", "md")
    assert "| digits_lt/imbsam |" in table
