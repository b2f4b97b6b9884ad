"""One backward pass: the gradients of a loss, out of `.grad` and into a list."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from imbsam.errors import SettingError
from imbsam.gradients import Gradients
from imbsam.reduce_overhead import outlive_pass

_REENTRANT = (
    "module has activation checkpoints with use_reentrant=True, which compute no gradient of some parameters alone: "
    'set use_reentrant=False there, or perturb to "all"'
)


class BackwardPass:
    """Runs backward passes by way of `.grad`, as every scaler and strategy does.

    Args:
        module: the owner of the parameters.
        params: its trained parameters.
        run: what runs one: ``Tensor.backward``, or a scaler's.
    """

    def __init__(self, module: nn.Module, params: Sequence[nn.Parameter], run: Callable[..., Any]) -> None:
        self._module = module
        self._params = params
        self._run = run

    def gradient(self, loss: Tensor, add_to: Gradients | None = None, **options: Any) -> Gradients:
        """The gradient of `loss` added to `add_to`, as the backward pass accumulates it; `.grad` is None afterwards.

        Args:
            loss: a scalar.
            add_to: earlier gradients, used up.
            **options: of ``Tensor.backward``, where they are not None.
        """
        into = (Gradients.none(len(self._params)) if add_to is None else add_to).tensors
        for p, grad in zip(self._params, into, strict=True):
            p.grad = grad
        options = {name: value for name, value in options.items() if value is not None}
        try:
            self._run_with(loss, options)
        except RuntimeError as error:
            if "use_reentrant" not in str(error) or "inputs" not in options:
                raise
            raise SettingError(_REENTRANT) from error
        if any(p.grad is None for p in options.get("inputs", ())) and _holds_checkpoint(loss):
            raise SettingError(_REENTRANT)
        gradients = Gradients(p.grad for p in self._params)
        if any(grad is not None and grad.is_sparse for grad in gradients.tensors):
            sparse = (n for n, p in self._module.named_parameters() if p.grad is not None and p.grad.is_sparse)
            raise SettingError(
                f"{next(sparse)} has a sparse gradient, which cannot be perturbed: build it with sparse=False"
            )
        for p in self._params:
            p.grad = None  # or it would keep g_s alive through the pass at w + e
        return outlive_pass(gradients, self._params[0].device) if add_to is None else gradients

    def retained_gradient(self, loss: Tensor, **options: Any) -> Gradients | None:
        """The gradient of `loss` with its graph kept, or None if the graph does not allow that (torch.compile)."""
        try:
            return self.gradient(loss, retain_graph=True, **options)
        except RuntimeError as error:
            if "donated buffer" not in str(error):
                raise
            return None

    def _run_with(self, loss: Tensor, options: dict[str, Any]) -> None:
        try:
            self._run(loss, **options)
        except TypeError as error:
            refused = next((name for name in options if name in str(error)), None)
            if refused is None:
                raise
            raise SettingError(
                f"backward= does not take {refused}: forward keyword arguments, "
                "as in lambda loss, **kw: scaler.scale(loss).backward(**kw)"
            ) from error


def _holds_checkpoint(loss: Tensor) -> bool:
    """Whether its graph has an activation checkpoint of the reentrant kind, which hides the parameters inside it."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if "CheckpointFunction" in node.name():
            return True
        seen.add(node)
        nodes += [above for above, _ in node.next_functions]
    return False
