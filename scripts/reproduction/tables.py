"""The tables of configs/tables.yaml, and the published numbers of configs/published.yaml."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

NOT_COMPARED = "trainer/"
"""Pieces of this folder do not change the result, so that published numbers do not name them."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        table: the table that its runs belong to; another one where they are shared.
        title: its name in the table.
        pieces: its files under configs/, the table's first, without ".yaml".
        settings: further arguments of ``imbsam fit``.
        name: its folder.
        comparable: whether published numbers of its pieces are of the same computation.
    """

    table: str
    title: str
    pieces: tuple[str, ...]
    settings: tuple[str, ...]
    name: str
    comparable: bool

    @property
    def published(self) -> dict[str, float]:
        """The published accuracies of exactly these pieces, by group; empty if there are none."""
        pieces = [piece for piece in self.pieces if not piece.startswith(NOT_COMPARED)]
        found = (entry["accuracy"] for entry in published() if entry["pieces"] == pieces)
        return next(found, {}) if self.comparable else {}


def tables() -> dict[str, list[Row]]:
    """The rows of every table, by its name."""
    contents = _read("tables.yaml")["tables"]
    return {
        name: [_row(name, content["pieces"], settings) for settings in _flat(content["rows"])]
        for name, content in contents.items()
    }


def published() -> list[dict[str, Any]]:
    """The entries of configs/published.yaml."""
    entries: list[dict[str, Any]] = _read("published.yaml")
    return entries


def published_table() -> str:
    """The published numbers and their configs, in Markdown."""
    lines = ["| pieces of `configs/` | published, all classes | by |", "| :-- | --: | :-- |"]
    for entry in published():
        pieces = ", ".join(f"`{piece}`" for piece in entry["pieces"])
        lines.append(f"| {pieces} | {entry['accuracy']['all']:.1f} | {entry['source']} |")
    return "\n".join(lines)


def _row(table: str, shared: list[str], row: dict[str, Any]) -> Row:
    parts = [piece.rpartition("/")[2] for piece in row["pieces"]] + [row.get("variant", "")]
    return Row(
        table=row.get("of", table),
        title=row["title"],
        pieces=(*shared, *row["pieces"]),
        settings=tuple(row.get("settings", ())),
        name="_".join(filter(None, parts)),
        comparable=row.get("comparable", "settings" not in row),
    )


def _flat(rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The rows, with lists that stand for several of them unpacked."""
    for row in rows:
        yield from row if isinstance(row, list) else [row]


def _read(name: str) -> Any:
    return yaml.safe_load((CONFIGS / name).read_text())
