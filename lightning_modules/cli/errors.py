"""What an error of the user's says: one line."""

import argparse
import errno
import re
import sys

from lightning.fabric.utilities.exceptions import MisconfigurationException

from imbsam import SettingError
from lightning_modules.cli.parser_messages import did_you_mean, one_line

_ELSEWHERE = "set trainer.logger.init_args.save_dir, checkpoint.dirpath or predictions.path to a folder for writing"
_FULL = "free some space, and resume a training with --ckpt_path last"
UNWRITABLE = dict.fromkeys((errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EROFS), _ELSEWHERE)
UNWRITABLE |= dict.fromkeys((errno.EDQUOT, errno.EFBIG, errno.ENOSPC), _FULL)
"""What an error of the file system asks for."""


def user_message(error: BaseException | None) -> str | None:
    """What a wrong setting or argument says, or None where the error is a bug and its traceback is wanted."""
    if isinstance(error, OSError) and error.errno in UNWRITABLE:  # of the error itself, not of what led to it
        return f"{error.filename or 'a file of the run'}: {error.strerror}: {UNWRITABLE[error.errno]}"
    while error is not None:
        if isinstance(error, SettingError):  # jsonargparse wraps what a constructor raises
            return str(error)
        if isinstance(error, MisconfigurationException):
            return _GPU if "No supported gpu backend" in str(error) else " ".join(str(error).split())
        if isinstance(error, getattr(sys.modules.get("wandb"), "Error", ())):
            return f"trainer.logger is WandbLogger: {' '.join(str(error).split())} (offline: true needs no account)"
        if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric"):
            return _unknown_metric(str(error))
        if isinstance(error, argparse.ArgumentError) and not isinstance(error.__cause__, SettingError):
            return one_line(str(error))
        error = error.__cause__ or error.__context__
    return None


_GPU = (
    "trainer.accelerator is gpu, and PyTorch finds no GPU here: leave configs/trainer/gpu.yaml out, or set it to auto "
    "(python -c 'import torch; print(torch.cuda.is_available())' must say True)"
)


def _unknown_metric(message: str) -> str:
    """What EarlyStopping says of a metric that is not logged."""
    metric, *known = re.findall("`([^`]+)`", message.replace("`EarlyStopping`", ""))
    near = did_you_mean(metric, known) or f"; there are {', '.join(known)}"
    return f"EarlyStopping's monitor is {metric}, which is not logged{near}"
