"""Pieces of configs/: as arguments of the command, and merged."""

from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def configs(*pieces: str) -> list[str]:
    """`--config` for each piece, such as "data/digits_lt"."""
    return [f"--config=configs/{piece}.yaml" for piece in pieces]


def anomaly(detector: str, method: str) -> list[str]:
    """A detector trained on the table of digits."""
    return configs("data/anomaly_table", f"detector/{detector}", f"method/{method}")


def merged(*pieces: str) -> dict[str, Any]:
    """The merged settings of several pieces, without the defaults of classes."""
    config: dict[str, Any] = {}
    for piece in pieces:
        _merge(config, yaml.safe_load((CONFIGS / f"{piece}.yaml").read_text()))
    return config


def _merge(into: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        if key.endswith("+"):
            into.setdefault(key[:-1], []).extend(value)
        elif isinstance(value, dict):
            into[key] = _merge(into.get(key) or {}, value)
        else:
            into[key] = value
    return into
