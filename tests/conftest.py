"""Where the tests find real data."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cifar100_root() -> Path:
    """The folder that holds ``cifar-100-python``: $IMBSAM_DATA, or shared/data beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("IMBSAM_DATA", default))
    if not (root / "cifar-100-python").is_dir():
        pytest.skip(f"no cifar-100-python in {root}; set IMBSAM_DATA to the folder that holds it")
    return root
