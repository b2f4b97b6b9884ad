"""The console script `imbsam`: `report` is answered at once, everything else by LightningCLI, which takes seconds to import."""

import sys


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["report"]:
        from report.command import main as report

        report(sys.argv[2:])
    else:
        from lightning_modules.cli import main as lightning

        lightning()
