"""One call of the command: its runs, its signals, its exit code."""

import contextvars
import logging
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule

import imbsam
from imbsam import SettingError
from lightning_modules.callbacks.average_precision import ClassAveragePrecision
from lightning_modules.callbacks.class_table import ClassTable
from lightning_modules.callbacks.convergence import Convergence
from lightning_modules.callbacks.epoch_timer import EpochTimer
from lightning_modules.callbacks.evaluation_files import EvaluationFiles
from lightning_modules.callbacks.network_summary import NetworkSummary
from lightning_modules.callbacks.plain_weights import PlainWeights
from lightning_modules.callbacks.refused_run import DiscardRefusedRun
from lightning_modules.callbacks.result_tables import AccuracyTable, AnomalyTable
from lightning_modules.callbacks.run_facts import RunFacts
from lightning_modules.callbacks.weights_and_biases import WandbResults
from lightning_modules.cli.command_line import ImbSAMCLI, say
from lightning_modules.cli.errors import user_message
from lightning_modules.cli.loggers import CSV_LOGGER
from lightning_modules.cli.run_folder import SaveConfigOnce
from lightning_modules.cli.seeds import fresh_processes, split_seeds
from lightning_modules.cli.trainer import CommandTrainer
from lightning_modules.resuming.signals import Interrupted, StopSignals

PACKAGE = Path(imbsam.__file__).parent
"""`configs/` is inside the package in an installation, and beside it in a checkout."""

EXPECTED_WARNINGS = [
    ".*overridden `on_before_batch_transfer`.*",  # by LongTailedClassifier, on purpose
    ".*Total length of `list` across ranks is zero.*",  # no validation split
    ".*The dirpath has changed from.*",  # a test or prediction logs to a folder of its own
    ".*Couldn't infer the batch indices.*",  # our loaders have no batch sampler
    ".*module.s. in eval mode at the start of training.*",  # a frozen backbone is, on purpose
    ".*LeafSpec.*",  # Lightning calls a deprecated torch function
]


def main() -> None:
    """Run every command but `report`, see `imbsam/command.py`; `fit --seeds 0 1 2` trains once for each seed."""
    try:
        runs = split_seeds(_find_configs(sys.argv[1:]))
    except SettingError as error:
        print(f"imbsam: error: {error}", file=sys.stderr)
        sys.exit(2)
    for args in runs:
        sys.argv[1:] = args  # Lightning launches further processes with it
        with fresh_processes() if len(runs) > 1 else nullcontext():
            # jsonargparse leaves its parser in a context variable, and with it the network
            contextvars.copy_context().run(run)


def run() -> None:
    """Run `sys.argv`.

    An invalid setting prints one line and exits with code 2. A training that a signal stopped after a checkpoint prints
    one line and exits with code 0, or 130 for SIGINT (Ctrl-C); a signal that stopped the program at once, with 128 plus
    its number.
    """
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(text in record.getMessage() for text in ("Tip", "configured with model summary"))
    )
    signals = StopSignals(deferred=False)
    signals.install()
    try:
        ImbSAMCLI(
            signals,
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_class=CommandTrainer,
            trainer_defaults={
                "logger": {"class_path": CSV_LOGGER, "init_args": {"save_dir": "logs", "name": ""}},
                "callbacks": [
                    ClassTable(),
                    NetworkSummary(),
                    Convergence(),
                    ClassAveragePrecision(),
                    AccuracyTable(),
                    AnomalyTable(),
                    EvaluationFiles(),
                    RunFacts(),
                    PlainWeights(),
                    EpochTimer(),
                    WandbResults(),
                    DiscardRefusedRun(),
                ],
            },
            save_config_callback=SaveConfigOnce,
            parser_kwargs={"exit_on_error": False},
        )
        signals.await_launched()
    except Interrupted as interrupted:
        say(str(interrupted))
        if interrupted.at_once:
            signals.end_launched()
        sys.exit(interrupted.exit_code)  # also with 0: no further seed is trained
    except Exception as error:
        signals.end_launched()  # they would wait for this one
        if signals.received:  # another process stopped at once, and this one failed for lack of it
            sys.exit(128 + signals.received)
        line = user_message(error)
        if line is None:
            raise
        print(f"imbsam: error: {line}", file=sys.stderr)
        sys.exit(2)
    finally:
        signals.remove()


def _find_configs(args: list[str]) -> list[str]:
    """Look up `configs/...` in the installation or the checkout if the current folder has no such file."""

    def find(value: str) -> str:
        if value.startswith("configs/") and not Path(value).exists():
            return next((str(home / value) for home in (PACKAGE, PACKAGE.parent) if (home / value).exists()), value)
        return value

    return ["--config=" + find(a.removeprefix("--config=")) if a.startswith("--config=") else find(a) for a in args]
