"""``torch.compile(mode="reduce-overhead")``: its graphs write the outputs of every pass to the same memory."""

import sys
from typing import Any

import torch

from imbsam.gradients import Gradients, clones


def begin_pass(device: torch.device) -> None:
    """Tell torch.compile's CUDA graphs that the outputs of the passes before may be overwritten."""
    if _manager(device) is not None:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def outlive_pass(gradients: Gradients, device: torch.device) -> Gradients:
    """The gradients in memory of their own where torch.compile's CUDA graphs have written them."""
    if _manager(device) is None:
        return gradients
    copies = iter(clones([g for g in gradients.tensors if g is not None]))
    return Gradients(None if g is None else next(copies) for g in gradients.tensors)


def _manager(device: torch.device) -> Any:
    """What torch.compile keeps of its CUDA graphs on this GPU; None where there are none."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")  # seconds to import, and no use before
    if trees is None or device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return trees.get_manager(index, create_if_none_exists=False)
