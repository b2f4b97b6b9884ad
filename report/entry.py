"""The console script `imbsam`: `report` is answered at once, the rest by LightningCLI, which takes long to import."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGINT, _stop)  # until the command line has handlers of its own
    if sys.argv[1:2] == ["report"]:
        from report.command import main as report

        report(sys.argv[2:])
    else:
        from lightning_modules.cli import main as lightning

        lightning()


def _stop(number: int, frame: FrameType | None) -> None:
    """Ctrl-C amid the imports: an exception there would be taken for a broken library, in many lines."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"imbsam: interrupted by SIGINT\n")
    os._exit(128 + number)
