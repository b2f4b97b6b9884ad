"""Which samples a process sees in which order, and what is random about them."""

from datamodules.sampling.loaders import EvalLoader, TrainLoader, eval_loader, train_loader
from datamodules.sampling.samplers import ranks

__all__ = ["EvalLoader", "TrainLoader", "eval_loader", "ranks", "train_loader"]
