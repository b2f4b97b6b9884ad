"""The folder of a run: its name, and the config that is saved in it."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn


def experiment_name(files: Sequence[Path], method: str) -> str:
    """The folder of the runs of these configs.

    Args:
        files: the configs in their order.
        method: the name of the method, for configs without one.

    Example:
        >>> pieces = ["data/cifar100_lt.yaml", "method/sam.yaml", "ratio/50.yaml", "trainer/gpu.yaml"]
        >>> experiment_name([Path(piece) for piece in pieces], "sam")
        'cifar100_lt/sam_ratio_50'
        >>> experiment_name([Path("my.yaml")], "sam")
        'my'
    """
    first, kinds = files[0], [file.parent.name for file in files]
    if kinds[0] != "data":
        return str(Path(first.parent.name) / first.stem)
    choices = [file for file in files[1:] if file.parent.name not in ("trainer", "logger")]
    names = [f.stem if f.stem[:1].isalpha() else f"{f.parent.name}_{f.stem}" for f in choices]
    return str(Path(first.stem) / "_".join(names if "method" in kinds else [method, *names]))


def run_of(checkpoint: Path) -> Path:
    """The run's folder, which has the checkpoint in its folder ``checkpoints``."""
    return checkpoint.parent.parent


class SaveConfigOnce(SaveConfigCallback):
    """Save ``config.yaml`` unless it exists: some loggers use one folder for all runs, or the current one."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the file in the first stage."""
        path = Path(trainer.log_dir or "") / self.config_filename  # every rank takes part in log_dir
        if not self.already_saved and trainer.strategy.broadcast(path.exists()):
            rank_zero_warn(f"{path} already exists and is kept: the settings of this run are not saved")
            self.already_saved = True
        super().setup(trainer, pl_module, stage)
