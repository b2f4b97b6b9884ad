"""Several processes: what they must do together, and the mean of their gradients."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imbsam.errors import SettingError
from imbsam.gradients import Gradients
from imbsam.rows import to_device


@dataclass(frozen=True)
class Agreement:
    """What all ranks decide alike, from the settings alone, before they look at their rows."""

    perturbs: bool
    """Whether some rank may have sharp rows."""
    every_pass: bool
    """Whether a rank without sharp rows runs the extra passes too, because a pass waits for the other ranks."""
    all_sharp: bool
    """Whether every row has c = 1 whatever its class, so that g_s is g_all."""
    one_graph: bool
    """Whether the graph of the first forward serves g_s(w) too."""
    group: Any
    """Average gradients over this process group; None where there is one process, or FSDP2 does it."""


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def _any(module: nn.Module, kind: str) -> bool:
    """Whether a submodule is of a class of torch.distributed.fsdp, which takes a second to import."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, getattr(fsdp, kind)) for m in module.modules())


def fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 (``fully_shard``) holds parameters of the module: it then reduces the gradients of every pass."""
    return _several() and _any(module, "FSDPModule")


def forward_communicates(module: nn.Module) -> bool:
    """Whether a forward waits for the other processes, so that all of them must run the same passes."""
    return fully_sharded(module) or (
        _several() and any(isinstance(m, nn.SyncBatchNorm) and m.training for m in module.modules())
    )


def check_module(module: nn.Module, perturbation: str) -> None:
    """Refuse what would run in each of the three passes, or between them.

    Raises:
        SettingError: for a hook on accumulated gradients (an optimizer in the backward pass), a DDP communication
            hook, FSDP1, and ``per_rank`` under FSDP2.
    """
    if any(p._post_accumulate_grad_hooks or hasattr(p, "_in_backward_optimizers") for p in module.parameters()):
        hooked = (n for n, p in module.named_parameters() if p._post_accumulate_grad_hooks)
        raise SettingError(
            f"{next(hooked, 'module')} has a hook on its accumulated gradient (an optimizer in the backward pass?), "
            "which would run after each of the three passes: step the optimizer after backward() instead"
        )
    if not _several():
        return
    if any(isinstance(m, nn.parallel.DistributedDataParallel) and m._comm_hooks for m in module.modules()):
        raise SettingError(
            "module has a DDP communication hook, which would see none of the passes: the gradients are averaged "
            "here, in at most two all-reduces; leave the hook out"
        )
    if _any(module, "FullyShardedDataParallel"):
        raise SettingError("module is FullyShardedDataParallel (FSDP1): shard it with fully_shard (FSDP2)")
    if perturbation == "per_rank" and fully_sharded(module):
        raise SettingError(
            'perturbation is "per_rank" and module is sharded by FSDP2, where no rank has its own gradient: '
            'set "global"'
        )


@torch.no_grad()
def mean(grads: Gradients, params: Sequence[Tensor], group: Any, *, keep_none: bool = False) -> Gradients:
    """The mean of the ranks' gradients, in one all-reduce.

    Every rank brings every parameter, zeros where it has no gradient, so that none waits in vain.

    Args:
        grads: this rank's gradients.
        params: the parameters, in the same order.
        group: the process group.
        keep_none: leave a parameter that no rank reached at None, as ``backward()`` does, instead of at 0.
    """
    pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
    reached = torch.tensor([float(g is not None) for g in grads], dtype=pieces[0].dtype)
    flat = torch.cat([*(piece.reshape(-1) for piece in pieces), to_device(reached, pieces[0].device)])
    flat /= dist.get_world_size(group)  # before the sum: that of half-precision gradients could overflow
    dist.all_reduce(flat, group=group)
    *parts, reached = torch.split(flat, [*(piece.numel() for piece in pieces), len(pieces)])
    means: Gradients = [part.view_as(piece).to(piece.dtype) for part, piece in zip(parts, pieces, strict=True)]
    if keep_none and any(g is None for g in grads):  # only then does the host have to know, and wait
        means = [g if r > 0 else None for g, r in zip(means, reached.tolist(), strict=True)]
    return means


@torch.no_grad()
def broadcast_buffers(module: nn.Module, group: Any) -> None:
    """Copy rank 0's buffers to every rank of the group."""
    source = dist.get_process_group_ranks(group)[0]
    for buffer in module.buffers():
        dist.broadcast(buffer, source, group=group)
