"""Several processes: averaging the gradients of the ranks, and refusing what cannot work with several passes."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from imbsam.batch import to_device
from imbsam.errors import SettingError
from imbsam.gradients import Gradients


class Reduction:
    """One process: nothing to average.

    Args:
        params: the trained parameters.
    """

    waits = False
    """Whether `mean_g_s` waits for the other ranks, so that every rank must call it, with sharp rows or without."""
    keeps_g_s = False
    """Whether g_s(w) serves for more than the direction of e, so that all its parts are needed."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params

    def mean_g_s(self, g_s: Gradients) -> Gradients:
        """The g_s that the weights ascend."""
        return g_s

    def mean(self, g: Gradients) -> Gradients:
        """The gradient that the optimizer sees."""
        return g


class Averaged(Reduction):
    """Ranks with whole copies of the model: one all-reduce for each g_s, one for the gradient.

    Args:
        params: the trained parameters.
        group: the ranks' process group.
        waits: whether some rank may have sharp rows.
        perturbed: whether each parameter is perturbed; the others' g_s is not averaged.
    """

    def __init__(self, params: Sequence[Tensor], group: Any, waits: bool, perturbed: Sequence[bool]) -> None:
        super().__init__(params)
        self.group = group
        self.waits = waits
        self._perturbed = perturbed

    def mean_g_s(self, g_s: Gradients) -> Gradients:
        """The mean of all ranks' g_s: they ascend together."""
        if all(self._perturbed):
            return mean(g_s, self.params, self.group)
        chosen = [i for i, perturbed in enumerate(self._perturbed) if perturbed]
        means = mean(Gradients(g_s.tensors[i] for i in chosen), [self.params[i] for i in chosen], self.group)
        for i, found in zip(chosen, means.tensors, strict=True):
            g_s.tensors[i] = found
        return g_s

    def mean(self, g: Gradients) -> Gradients:
        """The mean of all ranks' gradients."""
        return mean(g, self.params, self.group, keep_none=True)


class PerRank(Averaged):
    """Like `Averaged`, but each rank ascends along its own g_s: one all-reduce."""

    def mean_g_s(self, g_s: Gradients) -> Gradients:
        """This rank's own g_s."""
        return g_s


def reduction_over(
    group: Any, params: Sequence[Tensor], perturbation: str, perturbs: bool, perturbed: Sequence[bool] | None = None
) -> Reduction:
    """The reduction over the ranks of `group`, which is None for one process, or if FSDP2 reduces."""
    perturbed = [True] * len(params) if perturbed is None else perturbed
    if group is None:
        return Reduction(params)
    if perturbation == "per_rank":
        return PerRank(params, group, waits=False, perturbed=perturbed)
    return Averaged(params, group, waits=perturbs, perturbed=perturbed)


@torch.no_grad()
def mean(grads: Gradients, params: Sequence[Tensor], group: Any, *, keep_none: bool = False) -> Gradients:
    """The mean of the ranks' gradients, in one all-reduce.

    Every rank sends every parameter, zeros where it has no gradient, so that no rank waits forever.

    Args:
        grads: this rank's gradients.
        params: the parameters, in the same order.
        group: the process group.
        keep_none: leave a parameter that no rank reached at None, as ``backward()`` does, instead of at 0.
    """
    pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads.tensors, strict=True)]
    reached = torch.tensor([float(g is not None) for g in grads.tensors], dtype=pieces[0].dtype, device="cpu")
    flat = torch.cat([*(piece.reshape(-1) for piece in pieces), to_device(reached, pieces[0].device)])
    flat /= dist.get_world_size(group)  # before the sum: that of half-precision gradients could overflow
    dist.all_reduce(flat, group=group)
    *parts, reached = torch.split(flat, [*(piece.numel() for piece in pieces), len(pieces)])
    means: list[Tensor | None] = [
        part.view_as(piece).to(piece.dtype) for part, piece in zip(parts, pieces, strict=True)
    ]
    if keep_none and any(g is None for g in grads.tensors):  # only then the host has to wait for the answer
        means = [g if r > 0 else None for g, r in zip(means, reached.tolist(), strict=True)]
    return Gradients(means)


@torch.no_grad()
def union(numbers: set[int], device: torch.device, most: int, group: Any) -> set[int]:
    """The numbers in [0, most) that any rank of the group has; the host waits for the answer."""
    held = torch.tensor([float(number in numbers) for number in range(most)], device="cpu")
    held = to_device(held, device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX, group=group)
    return {number for number, somewhere in enumerate(held.tolist()) if somewhere > 0}


def communication_of(module: nn.Module) -> tuple[Callable[[], AbstractContextManager[Any]], Any]:
    """`no_sync` and the process group of DistributedDataParallel, if the module is one or wraps one; or none."""
    # Fabric and torch.compile wrap it
    ddp = next((m for m in module.modules() if isinstance(m, nn.parallel.DistributedDataParallel)), None)
    return (nullcontext, None) if ddp is None else (ddp.no_sync, ddp.process_group)


def fsdp_modules(modules: Sequence[nn.Module]) -> list[Any]:
    """Those under FSDP2 (``fully_shard``), which reduces the gradients of every pass itself."""
    return _fsdp_instances(modules, "FSDPModule") if _several() else []


def forward_communicates(modules: Sequence[nn.Module]) -> bool:
    """Whether a forward waits for the other processes, so that all of them must run the same passes."""
    return _several() and (
        bool(fsdp_modules(modules)) or any(isinstance(m, nn.SyncBatchNorm) and m.training for m in modules)
    )


def check_modules(modules: Sequence[nn.Module], perturbation: str, group: Any) -> None:
    """Refuse what would run in each of the three passes, or between them.

    Raises:
        SettingError: for a hook on a parameter's gradient (such as an optimizer in the backward pass), cached
            parametrizations, and, on several processes, what :func:`_check_processes` names.
    """
    check_hooks(modules)
    if parametrize._cache_enabled and any(parametrize.is_parametrized(m) for m in modules):
        raise SettingError(
            "module has parametrizations under parametrize.cached(), which caches the weights at w, so the pass at "
            "w + e would not see e: call backward() outside of it"
        )
    if _several():
        _check_processes(modules, perturbation, group)


def check_hooks(modules: Sequence[nn.Module]) -> None:
    """Refuse a hook on a parameter's gradient, such as an optimizer in the backward pass."""
    for owner in modules:
        for name, p in owner._parameters.items():
            if p is not None:
                check_hook(modules, p, name)


def check_hook(modules: Sequence[nn.Module], p: Tensor, name: str) -> None:
    """Refuse it on one parameter, which its module calls `name`."""
    if p._post_accumulate_grad_hooks or p._backward_hooks or "_in_backward_optimizers" in vars(p):
        raise SettingError(_hooked(modules, p, name))


def _check_processes(modules: Sequence[nn.Module], perturbation: str, group: Any) -> None:
    for ddp in (m for m in modules if isinstance(m, nn.parallel.DistributedDataParallel)):
        if ddp._comm_hooks:
            raise SettingError(
                "module has a DDP communication hook, which would never run, since the engine averages the gradients: "
                "remove the hook"
            )
        if ddp.static_graph:
            raise SettingError(
                "module is DistributedDataParallel with static_graph=True, but the extra passes have "
                "another graph: leave static_graph out"
            )
        if ddp._join_config.enable:
            raise SettingError(
                "module is under DistributedDataParallel.join(), which waits for the reductions of its "
                "own backward: leave join() out and give every rank the same number of batches"
            )
    if _fsdp_instances(modules, "FullyShardedDataParallel"):
        raise SettingError("module is FullyShardedDataParallel (FSDP1): shard it with fully_shard (FSDP2)")
    sharded = fsdp_modules(modules)
    if sharded and perturbation == "per_rank":
        raise SettingError(
            'perturbation is "per_rank", but module is sharded by FSDP2, where no rank has its own gradient: '
            'set "global"'
        )
    groups = [g for m in sharded for g in _fsdp_parameter_groups(m)]
    if any(not (g.reduce_grads and g.all_reduce_grads) for g in groups):
        raise SettingError(
            "module has set_requires_gradient_sync(False), but the perturbation needs the gradient of all ranks: leave "
            "it out and give micro-batches as a list, backward([(losses, targets), ...])"
        )
    spread = any(hasattr(p, "placements") for m in modules for p in m._parameters.values())
    if group is None and not sharded and not spread and dist.get_world_size() > 1:
        raise SettingError(
            "process_group is None on several processes, so their gradients would not be averaged: build the engine "
            "from the DistributedDataParallel module, or set process_group=torch.distributed.group.WORLD"
        )


@torch.no_grad()
def broadcast_buffers(module: nn.Module, group: Any) -> None:
    """Copy rank 0's buffers to every rank of the group."""
    source = dist.get_process_group_ranks(group)[0]
    for buffer in module.buffers():
        dist.broadcast(buffer, source, group=group)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def _fsdp_instances(modules: Sequence[nn.Module], kind: str) -> list[nn.Module]:
    """Instances of a class of torch.distributed.fsdp, without importing it, which takes a second."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in modules if isinstance(m, getattr(fsdp, kind))]


def _fsdp_parameter_groups(module: Any) -> list[Any]:
    """FSDP2's own records, which have no public getter; one per module until torch 2.12."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _hooked(modules: Sequence[nn.Module], p: Tensor, name: str) -> str:
    """The message for a parameter with a hook."""
    name = next((n for n, q in modules[0].named_parameters() if q is p), name)
    if p._backward_hooks:
        return (
            f"{name} has a hook on its gradient (register_hook), which would run in each of the three passes: "
            "change .grad after backward() instead"
        )
    return (
        f"{name} has a hook on its accumulated gradient (an optimizer in the backward pass?), "
        "which would run after each of the three passes: step the optimizer after backward() instead"
    )
