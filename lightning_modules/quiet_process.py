"""A process that trains small networks, one of several side by side: one thread, and nothing on the screen."""

import logging
import os
import warnings

import torch


def quiet_process() -> None:
    """Set this process up so: threads of torch, warnings, and Lightning's messages."""
    # Lightning sets it to 1: every optimizer step on a machine without a GPU then looks for NVML again
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
