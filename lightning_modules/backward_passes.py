"""The backward passes of a training: run eagerly, or replayed from CUDA graphs (the setting `capture`)."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from imbsam.capture.captured_step import CapturedStep
from imbsam.capture.checks import ChangedModuleError
from imbsam.capture.graphs import CaptureError, Graphs, graphs_on
from imbsam.errors import SettingError
from lightning_modules.perturbed_fraction import PerturbedFraction

if TYPE_CHECKING:
    from lightning_modules.base import SharpnessAwareModule

LossesOf = Callable[..., Tensor]
"""From the tensors of a batch to the losses of its rows, shape (R,)."""


class BackwardPasses:
    """Adds the method's gradient to ``.grad``, in place of ``loss.backward()``.

    There is a captured step for each form of batch, such as labels (B,) and probabilities (B, C). A batch with fewer
    rows than the largest so far, such as the last one of an epoch, runs eagerly. How many rows that is belongs in a
    checkpoint: a run that resumes with a small batch must not take it for a full one.

    Args:
        capture: False, to run eagerly; True; or ``"auto"``, to capture, and run eagerly with one warning where a step
            cannot be captured.
    """

    def __init__(self, capture: bool | Literal["auto"]) -> None:
        self._capture = capture
        self._captures = capture is not False
        self._rows = 0
        self._graphs: Graphs | None = None
        self._steps: dict[Any, CapturedStep] = {}

    def __call__(
        self,
        module: "SharpnessAwareModule",
        losses_of: LossesOf,
        batches: Sequence[tuple[Tensor, ...]],
        targets: Sequence[Tensor],
    ) -> Tensor:
        """Run the passes for micro-batches that count as one batch.

        Args:
            module: the module that is trained.
            losses_of: the same function in every step: graphs call the one that they were captured with.
            batches: the tensors of each micro-batch.
            targets: of each micro-batch, for the method; on the host, or it waits for the GPU.

        Returns:
            The mean weighted loss at w, detached.

        Raises:
            SettingError: where a step cannot be captured, unless `capture` is ``"auto"``.
        """
        loss = self._captured(module, losses_of, batches, targets) if self._captures else None
        return self._eager(module, losses_of, batches, targets) if loss is None else loss

    def release(self) -> None:
        """Free the memory of the graphs; the next step captures anew."""
        self._steps, self._graphs = {}, None

    def state_dict(self, batch_size: int | None) -> dict[str, int | None]:
        """How many rows a full batch has.

        Args:
            batch_size: the data's, if known.
        """
        return {"rows": self._rows, "batch_size": batch_size}

    def load_state_dict(self, state: dict[str, Any], batch_size: int | None) -> None:
        """Take over that number, unless the run resumes with another batch size."""
        if state["batch_size"] == batch_size:
            self._rows = state["rows"]

    def _eager(
        self,
        module: "SharpnessAwareModule",
        losses_of: LossesOf,
        batches: Sequence[tuple[Tensor, ...]],
        targets: Sequence[Tensor],
    ) -> Tensor:
        # in half precision rounding may remove the perturbation
        watched = module._half is not None and module.sam.rho > 0 and module.logs_this_batch
        perturbed = PerturbedFraction(module.sam.module) if watched else None
        if perturbed is not None:
            losses_of = perturbed.watch(losses_of)
        losses = [lambda rows, batch=batch: losses_of(*(t[rows] for t in batch)) for batch in batches]
        loss = module.sam.backward(list(zip(losses, targets, strict=True)), backward=_backward_of(module))
        if perturbed is not None:
            module.log("train/perturbed_fraction", perturbed.fraction)
        return loss

    def _captured(
        self,
        module: "SharpnessAwareModule",
        losses_of: LossesOf,
        batches: Sequence[tuple[Tensor, ...]],
        targets: Sequence[Tensor],
    ) -> Tensor | None:
        """The loss, or None where the batches have to run eagerly and nothing has been done."""
        sizes = [len(batch[0]) for batch in batches]
        forms = {tuple((t.dtype, t.shape[1:]) for t in batch) for batch in batches}
        if max(sizes) > self._rows:
            self._rows = max(sizes)
            self.release()
        if min(sizes) < self._rows or len(forms) > 1:
            return None
        (form,) = forms

        def run() -> Tensor:
            if form not in self._steps:
                self._steps[form] = self._capture_step(module, losses_of, batches[0])
            return self._steps[form](list(batches), targets=list(targets))

        try:
            try:
                return run()
            except ChangedModuleError:  # a callback has frozen, unfrozen or replaced parameters
                self.release()
                return run()
        except (CaptureError, SettingError) as error:
            reason = error if isinstance(error, CaptureError) else error.__cause__
            if not isinstance(reason, CaptureError):
                raise
            self._refuse(str(reason), error)
        return None

    def _capture_step(
        self, module: "SharpnessAwareModule", losses_of: LossesOf, example: tuple[Tensor, ...]
    ) -> CapturedStep:
        _check(module)
        device = next(module.sam.module.parameters()).device
        self._graphs = self._graphs or graphs_on(device)  # one pool of memory for all steps
        if self._graphs is None:
            raise CaptureError(f"CUDA graphs need a GPU, and the model is on {device}")
        return CapturedStep(module.sam, losses_of, example, graphs=self._graphs, scaler=module._scaler)

    def _refuse(self, reason: str, error: Exception) -> None:
        """Raise, or run eagerly from now on."""
        if self._capture is True:
            raise SettingError(
                f"model.capture is true, and the step cannot be captured: {reason}; set model.capture to auto, which "
                "then trains eagerly, or to false"
            ) from error
        rank_zero_warn(f"model.capture is auto, and this run trains eagerly: {reason}")
        self._captures = False
        self.release()


def _backward_of(module: "SharpnessAwareModule") -> Callable[..., Any]:
    """`manual_backward`, or `Tensor.backward` where that is all it does: no hook, no scaler, no profiler.

    To find that no callback has a hook, `manual_backward` takes as long as the backward pass of a small net.
    """
    trainer: Any = module.trainer
    hooks = ("on_before_backward", "on_after_backward")
    passes = ("pre_backward", "backward", "post_backward")
    bare = (
        _has_methods_of(LightningModule, module, "manual_backward", "backward", *hooks)
        and isinstance(trainer.profiler, PassThroughProfiler)
        and _has_methods_of(Strategy, trainer.strategy, *passes)
        and _has_methods_of(Precision, trainer.precision_plugin, *passes)
        and all(_has_methods_of(Callback, callback, *hooks) for callback in trainer.callbacks)
    )
    return Tensor.backward if bare else module.manual_backward


def _has_methods_of(base: type, owner: Any, *names: str) -> bool:
    """Whether these methods are the base class's, neither overridden nor replaced."""
    return all(getattr(getattr(owner, name), "__func__", None) is getattr(base, name) for name in names)


def _check(module: "SharpnessAwareModule") -> None:
    """Refuse what only an eager step can do.

    Raises:
        CaptureError: for what that is.
    """
    if module._half is not None:
        raise CaptureError(
            f"the weights are in {module._half}, and train/perturbed_fraction compares them between the passes"
        )
    callbacks: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
    for owner in (module, *callbacks):
        for hook in ("on_before_backward", "on_after_backward"):
            if is_overridden(hook, owner):
                raise CaptureError(f"{type(owner).__name__} has the hook {hook}, which a graph does not call")
