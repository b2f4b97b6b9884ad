"""Where the tests find real data, and how they run the command in processes of its own."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def cifar100_root() -> Path:
    """The folder that holds ``cifar-100-python``: $IMBSAM_DATA, or shared/data beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("IMBSAM_DATA", default))
    if not (root / "cifar-100-python").is_dir():
        pytest.skip(f"no cifar-100-python in {root}; set IMBSAM_DATA to the folder that holds it")
    return root


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of CIFAR-10's layout with 100 training images of each class (the real one is not at hand)."""
    root = tmp_path_factory.mktemp("cifar10")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = np.arange(10).repeat(20).tolist()
        pixels = random.integers(0, 256, (200, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    return root


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tensors here are small: a second thread costs more than it brings, the more so on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run_imbsam() -> Iterator[Callable[..., dict[str, Any]]]:
    """Run `imbsam` in processes of its own, see tests/lightning_modules/run_server.py."""
    repository = Path(__file__).resolve().parents[1]
    server = subprocess.Popen(
        [sys.executable, str(repository / "tests/lightning_modules/run_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
    )
    assert server.stdin is not None
    assert server.stdout is not None
    stdin, stdout = server.stdin, server.stdout
    assert stdout.readline() == "ready\n"

    def run(cwd: Path, *args: str, **settings: Any) -> dict[str, Any]:
        stdin.write(json.dumps({"cwd": str(cwd), "args": args, **settings}) + "\n")
        stdin.flush()
        answer: dict[str, Any] = json.loads(stdout.readline())
        return answer

    yield run
    stdin.close()
    server.wait()
