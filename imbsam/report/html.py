"""Pieces of the page's HTML: sections, tables, places for figures."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from imbsam.report.figures import Figure


def plots(title: str, note: str, shown: Sequence[Figure], figures: dict[str, Figure], below: str = "") -> str:
    """A section of figures, empty without any; those with an option share one place, and a list chooses among them."""
    if not shown:
        return ""
    places: list[str] = []
    options: list[str] = []
    for figure in shown:
        key = f"figure{len(figures)}"
        figures[key] = figure
        heading = f"<h3>{escape(figure.title)}</h3>" if figure.title else ""
        hidden = " hidden" if figure.option and options else ""
        places.append(f'<div{hidden}>{heading}<div class="plot" id="{key}"></div></div>')
        if figure.option:
            options.append(f'<option value="{key}">{escape(figure.option)}</option>')
    choice = f'<p><select aria-label="run">{"".join(options)}</select></p>' if len(options) > 1 else ""
    return section(title, note, f'{choice}<div class="figures">{"".join(places)}</div>{below}')


def section(title: str, note: str, content: str = "") -> str:
    """A heading, a paragraph of plain text and HTML."""
    paragraph = f'<p class="quiet">{escape(note.strip())}</p>' if note.strip() else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{paragraph}{content}\n</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """A table; what follows a line break in a cell is small."""

    def cell(tag: str, content: str) -> str:
        text, _, below = escape(content).partition("\n")
        return f"<{tag}>{text}{f'<small>{below}</small>' if below else ''}</{tag}>"

    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = [f"<tr>{cell('th', row[0])}{''.join(cell('td', c) for c in row[1:])}</tr>" for row in rows]
    return (
        '<p class="swipe quiet" hidden>Wider than the screen: scroll sideways →</p>'
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{chr(10).join(body)}\n</tbody></table></div>"
    )


def count(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def as_json(value: Any) -> str:
    """JSON that ends no script element: HTML's marks as escapes, which mean the same in JSON."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), default=vars)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
