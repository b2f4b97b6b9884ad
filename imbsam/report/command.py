"""`imbsam report`: compare runs on the terminal, as a web page, Markdown, CSV or a picture; a model's card."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from imbsam.messages import first_few
from imbsam.report.comparison import baseline_first, group_runs
from imbsam.report.exports import comma_separated, markdown, notes, picture, print_tables
from imbsam.report.runs import read_runs


def main(args: Sequence[str]) -> None:
    """Run `imbsam report` with the given arguments; an error is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="imbsam report",
        description="Compare finished runs with a baseline: plain training if it is among them, else the first run. "
        "Runs that differ only in their seeds are averaged.",
        epilog="Without --output and --format the table is printed. --format card is the model card of one group of "
        "runs, in Markdown.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folders of runs, or folders that contain some",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to this file, in the format of its ending")
    parser.add_argument(
        "--format",
        choices=["html", "md", "csv", "png", "card"],
        help="md, csv and card are printed where there is no --output",
    )
    parser.add_argument("--baseline", metavar="NAME", help="compare with this run, named as in the table")
    given = parser.parse_args(args)
    form = given.format or (given.output.suffix[1:] if given.output else None)
    if form not in (None, "html", "md", "csv", "png", "card"):
        _stop(f"output is {given.output}: end it with .html, .md, .csv or .png, or give --format")
    if form in ("html", "png") and given.output is None:
        _stop(f"format is {form}: name the file with --output report.{form}")
    runs, skipped = read_runs(given.runs)
    for folder, reason in skipped.items():
        print(f"skipped {folder}: {reason}", file=sys.stderr)
    if not runs:
        _stop("no run to report")
    try:
        groups = baseline_first(group_runs(runs), given.baseline)
    except ValueError as error:
        _stop(str(error))
    if others := {group.task.model for group in groups} - {groups[0].task.model}:
        _stop(f"the runs are of {groups[0].task.model} and {', '.join(others)}: report them separately")
    if form == "card" and len(groups) > 1:
        names = first_few([group.name for group in groups])
        _stop(f"format is card, which is of one model, and these are {len(groups)}: name the folder of {names}")
    if form not in (None, "md"):  # which have them
        for note in notes(groups):
            print(note, file=sys.stderr)
    try:
        if form is None:
            print_tables(groups)
        elif form == "png":
            picture(groups, given.output)
        elif form == "html":
            from imbsam.report.page import page

            given.output.write_text(page(groups, skipped), encoding="utf-8")
        elif form == "card":
            from imbsam.report.card import card

            _write(card(groups[0]), given.output)
        else:
            text = comma_separated(groups) if form == "csv" else markdown(groups)
            _write(text, given.output)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        _stop(f"{form} needs {library}: pip install {library}")
    except OSError as error:
        _stop(f"output is {given.output}: {error.strerror}")
    if given.output is not None:
        print(f"report: {given.output}")


def _write(text: str, output: Path | None) -> None:
    if output is None:
        print(text, end="")
    else:
        output.write_text(text, encoding="utf-8")


def _stop(line: str) -> NoReturn:
    print(f"imbsam: error: {line}", file=sys.stderr)
    sys.exit(2)
