"""What a captured step refuses, before it touches anything."""

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from imbsam.capture.graphs import CaptureError
from imbsam.distributed import check_hook, check_modules, forward_communicates
from imbsam.errors import SettingError
from imbsam.parameters import trained_parameters

if TYPE_CHECKING:
    from imbsam.batch import Batch
    from imbsam.class_aware_sam import ClassAwareSAM


def check_signature(losses_of: Any, example: Any) -> None:
    """Refuse what is no function of the tensors of a batch, such as the closure over row indices of `backward`."""
    if not isinstance(example, (tuple, list)) or not example or not all(isinstance(t, Tensor) for t in example):
        raise SettingError(f"example is a {type(example).__name__}: give the tensors of one batch, as in (x, y)")
    rows = [len(t) if t.dim() else 0 for t in example]
    if min(rows) == 0 or min(rows) != max(rows):
        raise SettingError(f"example has tensors of {rows} rows: give those of one full batch")
    if not callable(losses_of):
        raise SettingError(f"losses_of is a {type(losses_of).__name__}: give a function losses_of(x, y)")
    try:
        signature = inspect.signature(losses_of)
    except (TypeError, ValueError):
        return  # not every callable shows it
    try:
        signature.bind(*example)
    except TypeError as error:
        raise SettingError(
            f"losses_of{signature} does not take the {len(example)} tensors of a batch: give a function of the rows "
            "themselves, losses_of(x, y), not of their indices as for backward()"
        ) from error


def check_method(sam: "ClassAwareSAM") -> None:
    """Refuse a method whose step is not the one that is captured: some class of it overrides what the engine does."""
    for cls in type(sam).__mro__:
        if cls.__name__ == "ClassAwareSAM":
            return
        engine = {name for base in cls.__mro__[1:] for name, value in vars(base).items() if inspect.isfunction(value)}
        own = [name for name, value in vars(cls).items() if name in engine and not name.startswith("__")]
        if own:
            raise CaptureError(f"{cls.__name__} has a step of its own ({', '.join(own)})")


def check_module(sam: "ClassAwareSAM", modules: Sequence[nn.Module], params: Sequence[nn.Parameter]) -> None:
    """Refuse what :meth:`ClassAwareSAM.backward` refuses.

    Raises:
        CaptureError: for what works there, and cannot be part of a graph.
    """
    if forward_communicates(modules) or any(hasattr(p, "placements") for p in params):
        raise CaptureError("a forward of module waits for other processes: SyncBatchNorm or sharded parameters")
    check_modules(modules, sam.perturbation, sam.process_group)
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        raise CaptureError(f"module lies on several devices, {' and '.join(devices)}")


def check_compiled(modules: Sequence[nn.Module], losses_of: Any) -> None:
    """Refuse what ``torch.compile`` replays from CUDA graphs of its own, which cannot be launched inside a capture."""
    wrapped = [m for m in modules if "_orig_mod" in m._modules]  # what torch.compile(module) returns
    for compiled in (losses_of, *wrapped, *(m._compiled_call_impl for m in modules)):
        config = getattr(compiled, "get_compiler_config", lambda: None)()
        if isinstance(config, dict) and config.get("triton.cudagraphs"):
            raise CaptureError(
                'torch.compile makes CUDA graphs of its own (mode="reduce-overhead" or "max-autotune"): compile '
                "without that mode inside a captured step"
            )


class ChangedModuleError(SettingError):
    """The module is no longer what was captured, and has to be captured again."""


class Captured:
    """What must not change from the capture on: submodules, their hooks, the trained parameters, where all of them lie.

    Args:
        modules: the module's submodules, itself first.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.params = trained_parameters(modules)
        self._then = _look(modules)

    def check(self, modules: Sequence[nn.Module]) -> None:
        """Refuse a module that has changed, with :class:`ChangedModuleError`, and what the engine refuses at any time.

        A hook on a parameter's gradient would not run in a replay.
        """
        now = _look(modules)
        if not _same(now.params, self.params):
            raise ChangedModuleError(
                f"module has {len(now.params)} trained parameters that are not the {len(self.params)} it was captured "
                "with (one was added, replaced, frozen or unfrozen): call capture() again"
            )
        if not _same(modules, self.modules):
            raise ChangedModuleError("module has other submodules than it was captured with: call capture() again")
        if now.hooks != self._then.hooks:
            raise ChangedModuleError("module has other hooks than it was captured with: call capture() again")
        if now.addresses != self._then.addresses:
            raise ChangedModuleError(
                "module's parameters have moved since capture() (device, dtype, .data): call it again"
            )


class _Seen(NamedTuple):
    params: list[nn.Parameter]
    """The trained ones, in the order of :func:`trained_parameters`."""
    addresses: list[int]
    """Of all parameters."""
    hooks: list[int]
    """The numbers of the submodules' hooks, never used again; pruning puts a mask on the same parameter by a hook."""


def _look(modules: Sequence[nn.Module]) -> _Seen:
    """All that is checked in every step, in one walk; refuses hooks on the parameters themselves."""
    params: dict[int, nn.Parameter] = {}
    addresses: list[int] = []
    hooks: list[int] = []
    for m in modules:
        for name, p in m._parameters.items():
            if p is not None:
                check_hook(modules, p, name)
                addresses.append(p.data_ptr())
                if p.requires_grad:
                    params[id(p)] = p
        for kind in (m._forward_pre_hooks, m._forward_hooks, m._backward_pre_hooks, m._backward_hooks):
            if kind:
                hooks.extend(kind)
    return _Seen(list(params.values()), addresses, hooks)


def _same(now: Sequence[Any], then: Sequence[Any]) -> bool:
    return len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))


def check_batches(micro: Sequence[Any], example: Sequence[Tensor]) -> bool:
    """Refuse batches unlike the example's.

    Returns:
        Whether all of them have its number of rows; one with fewer has to run eagerly.
    """
    if not micro:
        raise SettingError("the list of micro-batches is empty: give at least one")
    for batch in micro:
        if len(batch) != len(example) or not all(isinstance(t, Tensor) for t in batch):
            found = ", ".join(type(t).__name__ for t in batch)
            raise SettingError(f"the batch is ({found}): give {len(example)} tensors, as in the example of capture()")
        for i, (t, like) in enumerate(zip(batch, example, strict=True)):
            if t.dtype != like.dtype or t.shape[1:] != like.shape[1:] or len(t) > len(like):
                raise SettingError(
                    f"tensor {i} of the batch has shape {tuple(t.shape)} and dtype {t.dtype}, captured were "
                    f"{tuple(like.shape)} and {like.dtype}: call capture() with such a batch (fewer rows run eagerly)"
                )
        rows = [len(t) for t in batch]
        if min(rows) != max(rows):
            raise SettingError(f"the batch has tensors of {rows} rows: give as many in each")
    return all(len(t) == len(like) for batch in micro for t, like in zip(batch, example, strict=True))


def check_rows(name: str, value: Any, batch: Sequence[Tensor]) -> None:
    """Refuse targets or sharpness weights of another number of rows than the batch has; None is left out."""
    if value is not None and len(value) != len(batch[0]):
        raise SettingError(f"{name} has {len(value)} rows and the batch {len(batch[0])}: give one for each row")


def check_one_loss_a_row(decided: "Sequence[Batch]") -> None:
    """Refuse multi-label targets."""
    if any(batch.c.dim() == 2 for batch in decided):
        raise CaptureError("targets are multi-label, and a captured step takes one loss a row")


Losses = Callable[..., Any]
"""From the tensors of a batch to its losses (R,), or to these and one tensor to keep of the first pass."""
