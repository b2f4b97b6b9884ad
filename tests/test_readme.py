"""The README's Python blocks run unchanged, one after another."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def namespaces() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, namespace)
        found.append(dict(namespace))
    return found


def test_plain_loop(namespaces):
    model, x, y = (namespaces[0][name] for name in ("model", "x", "y"))
    assert namespaces[0]["loss"].isfinite()
    with torch.no_grad():
        assert torch.nn.functional.cross_entropy(model(x), y) < 0.6  # it was 1.1 before


def test_grad_scaler_and_clipping(namespaces):
    assert len(BLOCKS) == 2
    assert namespaces[1]["scaler"].get_scale() > 0
    assert all(p.isfinite().all() for p in namespaces[1]["model"].parameters())
    # the scale was applied and taken away again: the last clipped gradient has been stepped and cleared
    assert all(p.grad is None for p in namespaces[1]["model"].parameters())


def test_first_commands_are_those_of_the_makefile():
    commands = re.findall(r"```bash\n(make \w+)\n```", README)
    assert commands == ["make run", "make test"]
    makefile = (REPOSITORY / "Makefile").read_text()
    assert all(f"\n{command.split()[1]}:" in makefile for command in commands)


def test_no_placeholder_is_left():
    assert "@@" not in README
    assert "@@" not in (REPOSITORY / "docs/results.md").read_text()


def test_config_files_named_here_exist():
    names = set(re.findall(r"configs/[\w/]+\.yaml", README))
    assert len(names) >= 4
    assert all((REPOSITORY / name).exists() for name in names)
