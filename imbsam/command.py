"""The console script `imbsam`: answers help, version and `report` at once, and leaves the rest to LightningCLI.

LightningCLI and torch take seconds to import; a list of the commands should not wait for them.
"""

import difflib
import os
import platform
import signal
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from types import FrameType

COMMANDS = {
    "fit": "train a model, then test the last epoch's weights",
    "check": "check the data without training: list the classes, and files that cannot be read",
    "validate": "evaluate a checkpoint on the validation set",
    "test": "evaluate a checkpoint on the test set",
    "predict": "write a checkpoint's predictions to a CSV file",
    "decide": "choose thresholds, costs or calibration of a trained model again, without training",
    "sharpness": "measure how flat the loss of each class group is at a checkpoint",
    "export": "write a checkpoint as ONNX or torch.export, checked against its predictions",
    "features": "compute the features of a frozen network once, to train classifiers on them in seconds",
    "report": "compare runs in a table, a web page or a picture",
}

CONFIG = ("--config FILE", "settings from a file, such as configs/data/digits_lt.yaml; of several files, the last wins")

SETTINGS = {
    "--model.sam": (
        "ImbSAM",
        "the method: Plain (plain training), SAM, ImbSAM, FocalSAM, CCSAM, SSESAM, GSAM, or your own class",
    ),
    "--model.sam.rho": ("0.05", "length of the perturbation; choose it on a validation split"),
    "--model.sam.eta": ("20", "classes with fewer training samples than eta are the tail"),
    "--model.sam.tail_weight": ("2", "multiply the loss of the tail classes, for every method"),
    "--model.sam.context_rows": ("auto", "samples in the extra passes besides the tail's: auto, batch or a number"),
    "--model.optimizer.lr": ("0.05", "learning rate"),
    "--data.batch_size": ("32", "samples per training batch"),
    "--data.val_share": ("0.2", "share of the training samples to hold out for validation"),
    "--calibration.method": (
        "prior",
        "calibrate on the validation split: prior, temperature, vector or isotonic",
    ),
    "--decisions.recall": (
        "0.9",
        "choose thresholds there; precision, false_alarms, costs and coverage too",
    ),
    "--data.seed": ("0", "seed of the split and of drawing the samples"),
    "--seed_everything": ("0", "seed of weights, order and augmentation"),
    "--trainer.max_epochs": ("200", "epochs; ImbSAM shows its effect once the rare classes are learned"),
    "--trainer.devices": ("1", "processes, one per GPU"),
}
"""The settings that matter most for training, each with an example."""

CHECKPOINT = ("--ckpt_path FILE", "the checkpoint; `last` is that of the newest run of this config")

OPTIONS = {
    "fit": [
        ("--data.root FOLDER", "folder of the data set"),
        *((f"{name} {example}", text) for name, (example, text) in SETTINGS.items()),
        ("--seeds 0 1 2", "train once per seed, which is that of the run and of the data"),
        ("--ckpt_path last", "resume the newest run of this config"),
        ("--print_config", "print every setting with its value, and stop"),
    ],
    "check": [("--data.root FOLDER", "folder of the data set")],
    "validate": [CHECKPOINT],
    "test": [CHECKPOINT],
    "predict": [CHECKPOINT, ("--predictions.path FILE", "CSV file to write")],
    "decide": [
        CHECKPOINT,
        *(
            (f"{name} {SETTINGS[name][0]}", SETTINGS[name][1])
            for name in ("--calibration.method", "--decisions.recall")
        ),
        ("--output FILE", "the new checkpoint; by default decided.ckpt beside the old one, which stays"),
    ],
    "sharpness": [
        CHECKPOINT,
        ("--split train", "the training samples, or test"),
        ("--samples 1000", "at most this many samples of each class group"),
        ("--slices true", "also write slices of the loss"),
    ],
    "export": [
        CHECKPOINT,
        ("--path model.onnx", "the file to write, .onnx or .pt2 (torch.export), or a list of both"),
        ("--split test", "whose samples its predictions are compared on: test or val"),
    ],
    "features": [
        ("--model.backbone_weights FILE", "the weights of the network; or --ckpt_path, a trained network's checkpoint"),
        ("--folder features", "where the file is written; its name holds a hash of what the features depend on"),
        ("--copies 0", "augmented copies of every training sample"),
    ],
}


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGINT, _stop)  # until the command line has handlers of its own
    command, args = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if command in ("", "-h", "--help", "help"):
        print(overview())
    elif command == "--version":
        print(versions())
    elif command == "report":
        from imbsam.report.command import main as report

        report(args)
    elif not command.startswith("-") and command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"imbsam: error: unknown command {command}: {meant}", file=sys.stderr)
        sys.exit(2)
    elif {"-h", "--help"} & set(args):
        print(command_help(command))
    elif command in COMMANDS and not args:
        print(
            f"imbsam: error: {command} needs settings: give --config FILE, see imbsam {command} --help", file=sys.stderr
        )
        sys.exit(2)
    else:
        sys.argv[1:] = ["--help" if arg == "--help-all" else arg for arg in sys.argv[1:]]
        sys.path.append(os.getcwd())  # for class paths in the user's code; at the end, where it shadows nothing
        from lightning_modules.cli.run import (
            main as lightning,  # the one import of lightning_modules, see tests/test_imports.py
        )

        lightning()


def overview() -> str:
    """The help text that lists the commands."""
    return "\n".join(
        [
            "usage: imbsam COMMAND [--SETTING VALUE ...]",
            "",
            "Sharpness-aware training for imbalanced data.",
            "",
            *_columns(COMMANDS.items()),
            "",
            "imbsam COMMAND --help shows the settings that matter, imbsam --version the versions.",
            "To start: imbsam fit --config configs/data/digits_lt.yaml --config configs/method/imbsam.yaml",
        ]
    )


def command_help(command: str) -> str:
    """The help text of a command: the settings that matter, and how to list the others."""
    rest = [
        (f"imbsam {command} --help-all", "every setting of the command"),
        (f"imbsam {command} --model.help CLASS", "every setting of a model, such as LongTailedClassifier"),
        (f"imbsam {command} --data.help CLASS", "every setting of a data set, such as ImageFolderLTDataModule"),
    ]
    return "\n".join(
        [
            f"usage: imbsam {command} --config FILE [--config FILE ...] [--SETTING VALUE ...]",
            "",
            f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}.",
            "",
            *_columns([CONFIG, *OPTIONS[command]]),
            "",
            "All settings:",
            "",
            *_columns(rest),
        ]
    )


def versions() -> str:
    """The versions of imbsam, torch and Lightning, without importing them."""
    installed = {}
    for name in ("imbsam", "torch", "lightning"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    others = ", ".join(f"{name} {installed[name]}" for name in ("torch", "lightning"))
    return f"imbsam {installed['imbsam']} ({others}, Python {platform.python_version()})"


def _columns(lines: Iterable[tuple[str, str]]) -> list[str]:
    lines = list(lines)
    width = max(len(name) for name, _ in lines)
    return [f"  {name:{width}}  {text}" for name, text in lines]


def _stop(number: int, frame: FrameType | None) -> None:
    """Ctrl-C during the imports: an exception there would look like a broken library, with a long traceback."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"imbsam: interrupted by SIGINT\n")
    os._exit(128 + number)
