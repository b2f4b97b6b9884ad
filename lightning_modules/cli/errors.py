"""One-line messages for errors that the user can fix."""

import argparse
import errno
import os
import re
import sys

from lightning.fabric.utilities.exceptions import MisconfigurationException

from imbsam import SettingError
from lightning_modules.cli.parser_messages import did_you_mean, one_line

_ELSEWHERE = "set trainer.logger.init_args.save_dir, checkpoint.dirpath or predictions.path to a writable folder"
_FULL = "free some space, and resume a training with --ckpt_path last"
UNWRITABLE = dict.fromkeys((errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EROFS), _ELSEWHERE)
UNWRITABLE |= dict.fromkeys((errno.EDQUOT, errno.EFBIG, errno.ENOSPC), _FULL)
"""The fix for an error of the file system."""


def user_message(error: BaseException | None) -> str | None:
    """The message for an invalid setting or argument; None if the error is a bug, whose traceback is needed."""
    if isinstance(error, OSError) and error.errno in UNWRITABLE:  # only the error itself, not its causes
        return f"{error.filename or 'a file of the run'}: {error.strerror}: {UNWRITABLE[error.errno]}"
    while error is not None:
        if isinstance(error, SettingError):  # jsonargparse wraps what a constructor raises
            return str(error)
        if isinstance(error, MisconfigurationException):
            if "No supported gpu backend" in str(error):
                return (
                    "trainer.accelerator is gpu, and PyTorch finds no GPU here: leave configs/trainer/gpu.yaml out, or "
                    "set it to auto (python -c 'import torch; print(torch.cuda.is_available())' must print True)"
                )
            return " ".join(str(error).split())
        if isinstance(error, getattr(sys.modules.get("wandb"), "Error", ())):
            return f"trainer.logger is WandbLogger: {' '.join(str(error).split())} (offline: true needs no account)"
        if isinstance(error, RuntimeError) and "EADDRINUSE" in str(error):  # torch's store of the processes' addresses
            port = os.environ.get("MASTER_PORT")
            return f"MASTER_PORT is {port}, which another program uses: start again, or set another"
        if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric"):
            metric, *known = re.findall("`([^`]+)`", str(error).replace("`EarlyStopping`", ""))
            fix = did_you_mean(metric, known) or f"; choose one of {', '.join(known)}"
            return f"EarlyStopping's monitor is {metric}, which is not logged{fix}"
        if isinstance(error, argparse.ArgumentError) and not isinstance(error.__cause__, SettingError):
            return one_line(str(error))
        error = error.__cause__ or error.__context__
    return None
