"""What the LightningModules share: the method, the optimizer and its scheduler, precision, processes."""

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import SumMetric

from imbsam import ClassAwareSAM, ImbSAM, SettingError
from imbsam.checks import check_numbers
from lightning_modules.backward_passes import BackwardPasses
from lightning_modules.epoch_log import log_epoch
from lightning_modules.factories import called, plain_settings, restore, takes

SAMCallable = Callable[[nn.Module, Tensor], ClassAwareSAM]
"""A method's class, or a partial of one, which takes a module and its class counts."""


class _BuildModel(Callback):
    """Runs first: the ``setup`` of BackboneFinetuning freezes layers, that of ModelPruning looks them up."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the layers from the data, which are set up by now."""
        assert isinstance(pl_module, SharpnessAwareModule)
        pl_module.learn_from_data(stage)
        pl_module.configure_model()
        if isinstance(trainer.precision_plugin, DoublePrecision):
            # Lightning does it after it has loaded a checkpoint, whose weights would then be rounded to float32
            trainer.precision_plugin.convert_module(pl_module)
        pl_module.make_sam()
        pl_module.backward_passes = BackwardPasses(pl_module.capture)


class SharpnessAwareModule(LightningModule):
    """Manual optimization in which a sharpness-aware method takes the place of ``loss.backward()``.

    A subclass defines :meth:`learn_from_data`, ``configure_model`` and :meth:`make_sam`, which are called in this order
    before any callback's ``setup``; its ``training_step`` calls ``self.backward_passes``, then :meth:`step_optimizer`.

    Args:
        sam: the method: a class that takes ``(module, class_counts)``, such as ``Plain``, ``SAM``, ``ImbSAM``,
            ``FocalSAM`` or one of your own, or a partial of it; default: ``ImbSAM``. Callbacks may change its ``rho``
            and ``class_weight`` between steps.
        optimizer: any torch optimizer that steps without a closure; default: SGD.
        lr_scheduler: any torch scheduler. ReduceLROnPlateau monitors the validation loss, or the training loss where
            there is no validation.
        lr_interval: step the scheduler after every epoch or after every optimizer step.
        gradient_clip_val: clip the (unscaled) gradient to this norm.
        capture: replay the backward passes from CUDA graphs: true, false, or auto, which trains eagerly, with a
            warning, where there is no GPU or a step cannot be captured.
    """

    train_loss_name = "train/loss"
    """The metric that ReduceLROnPlateau monitors without a validation set."""

    def __init__(
        self,
        sam: SAMCallable | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        gradient_clip_val: float | None = None,
        capture: bool | Literal["auto"] = False,
    ) -> None:
        super().__init__()
        if not isinstance(capture, bool) and capture != "auto":
            raise SettingError(f"capture is {capture!r}: give true, false or auto")
        if gradient_clip_val is not None:
            check_numbers(above=True, finite=False, hint="null is no clipping", gradient_clip_val=gradient_clip_val)
        self.automatic_optimization = False
        # with a class as default in the signature, jsonargparse would pass its settings on to any other choice
        self.sam_factory: SAMCallable = restore(sam) or ImbSAM
        self.optimizer: OptimizerCallable = optimizer or torch.optim.SGD
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.lr: float | None = None
        """Overrides the optimizer's learning rate; set by Lightning's lr_find."""
        self.accumulate_grad_batches = 1
        """Batches in one optimizer step."""
        self.gradient_clip_val = gradient_clip_val
        self.capture = capture
        self.backward_passes = BackwardPasses(capture)
        self.sam: ClassAwareSAM
        # a metric, so that a run resumed mid-epoch continues the count; every rank skips the same steps
        self.skipped_steps = SumMetric(sync_on_compute=False)
        self._cosine_follows_run = False
        self._loss_scale = 0.0
        self._half: torch.dtype | None = None
        self._host_targets: Tensor | None = None

    @property
    def method(self) -> str:
        """The name of the method's class."""
        return getattr(called(self.sam_factory), "__name__", "")

    @property
    def data(self) -> Any:
        """The Trainer's DataModule, or None."""
        return getattr(self._trainer, "datamodule", None)

    @property
    def fitting(self) -> bool:
        """Whether the Trainer runs ``fit``, its validation included."""
        return self._trainer is not None and self.trainer.state.fn == "fit"

    @property
    def logs_this_batch(self) -> bool:
        """Whether the Trainer writes this batch's values: the others are not logged, which costs 0.3 ms a value."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.trainer.fit_loop.total_batch_idx + 1) % every == 0

    @abstractmethod
    def learn_from_data(self, stage: str) -> None:
        """Take class counts and shapes from the DataModule, instead of ``setup``.

        Args:
            stage: fit, validate, test or predict.
        """

    @abstractmethod
    def make_sam(self) -> None:
        """Create :attr:`sam` for a fit, before anything is printed or written: a wrong setting ends the run."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Keep a training batch's targets on the host: the engine picks the sharp samples there, without a sync."""
        if self.trainer.training:
            self._host_targets = batch[1].cpu()
        return batch

    def targets_on_host(self, targets: Tensor) -> Tensor:
        """The targets of the present training batch as the loader gave them; `targets` if they have changed since."""
        kept, self._host_targets = self._host_targets, None
        # a DataModule's own on_before_batch_transfer replaces ours, and its other hooks may mix the targets
        return targets if kept is None or kept.shape != targets.shape else kept

    def configure_callbacks(self) -> list[Callback]:
        """Build the layers before any callback's ``setup``, which comes before the module's."""
        if not any(isinstance(callback, _BuildModel) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            self.trainer.callbacks.insert(0, _BuildModel())  # type: ignore[attr-defined]
        return []

    def on_fit_start(self) -> None:
        """Let the engine reduce gradients over the processes, and warn of weights in half precision."""
        if self.sam.first_pass is None:
            self.sam.first_pass = "split"  # cheaper, and nothing here reads predictions from the first pass
        strategy: Any = self.trainer.strategy
        if getattr(strategy, "_ddp_comm_hook", None) is not None:
            raise SettingError(
                "the strategy has a ddp_comm_hook, which would see no gradient: the engine averages the gradients, in "
                "at most two all-reduces; remove the hook"
            )
        if self.trainer.world_size > 1:
            self.sam.no_sync = strategy.block_backward_sync
            self.sam.process_group = torch.distributed.group.WORLD
        half = (torch.bfloat16, torch.float16)
        self._half = next((p.dtype for p in self.sam.module.parameters() if p.requires_grad and p.dtype in half), None)
        if self._half is not None and self.sam.rho > 0:
            rank_zero_warn(
                f"trainer.precision is {self.trainer.precision}: with weights in {self._half} a perturbation of length "
                f"rho={self.sam.rho} is below the spacing of most weights and moves only some of them "
                "(train/perturbed_fraction logs how many); bf16-mixed keeps the weights in float32"
            )

    def parameter_groups(self) -> Any:
        """What the optimizer gets; a group may have ``lr_factor``, which its learning rate is multiplied by."""
        return self.parameters()

    def configure_optimizers(self) -> Any:
        """One optimizer, and the scheduler if there is one."""
        try:
            optimizer = self.optimizer(self.parameter_groups())
            for group in optimizer.param_groups:
                group["lr"] = (group["lr"] if self.lr is None else self.lr) * group.pop("lr_factor", 1.0)
            scheduler = self._scheduler(optimizer)
        except (TypeError, ValueError) as error:
            raise SettingError(f"optimizer or lr_scheduler: {error}") from error
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise SettingError(
                f"optimizer is {type(optimizer).__name__}, which evaluates the loss itself: choose one that needs only "
                ".grad, such as torch.optim.SGD or torch.optim.AdamW"
            )
        if isinstance(optimizer, torch.optim.SparseAdam):
            raise SettingError("optimizer is SparseAdam, which takes only sparse gradients: choose torch.optim.Adam")
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, ReduceLROnPlateau) and self.lr_interval == "step":
            raise SettingError("lr_interval is step: ReduceLROnPlateau monitors the loss of an epoch; set it to epoch")
        # manual optimization: Lightning saves the scheduler in checkpoints, and we step it
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.lr_interval}}

    def on_train_start(self) -> None:
        """Read the loss scale: a run may resume mid-epoch."""
        self._loss_scale = self._scaler.get_scale() if self._scaler else 0.0
        if schedulers := self.lr_schedulers():
            self._check_cosine(schedulers)  # by now with the state of the checkpoint

    def on_train_epoch_start(self) -> None:
        """Reset the count of steps that overflowed."""
        self.skipped_steps.reset()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients, which are unscaled by now."""
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.gradient_clip_val, gradient_clip_algorithm="norm")

    def step_optimizer(self) -> None:
        """After the backward pass: step the optimizer, and the scheduler if it counts steps."""
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        if self._scaler:
            scale = self._scaler.get_scale()  # no synchronisation of its own: the scaler's step has just waited
            self.skipped_steps.update(float(scale < self._loss_scale))
            if self.logs_this_batch:
                self.log("train/loss_scale", scale)
            self._loss_scale = scale
        if self.lr_interval == "step":
            self._step_scheduler()

    def on_train_epoch_end(self) -> None:
        """Log how many steps overflowed, and step the scheduler."""
        if self._scaler:
            log_epoch(self, {"train/skipped_steps": self.skipped_steps.compute()})
        if self.lr_interval == "epoch":
            self._step_scheduler()

    def check_loss(self, loss: Tensor) -> None:
        """End a run that has diverged: it does not recover from a mean loss that is not finite.

        Args:
            loss: mean training loss of an epoch, equal on all ranks.
        """
        if self._scaler is None and not bool(torch.isfinite(loss)):
            optimizer: Any = self.optimizers()
            raise SettingError(
                f"the training loss is {float(loss)} in epoch {self.current_epoch + 1}, at a learning rate of "
                f"{optimizer.param_groups[0]['lr']:g}: lower it, or set model.gradient_clip_val"
            )

    def on_validation_start(self) -> None:
        """Validate the same buffers on all ranks."""
        if self.fitting:
            self.sam.broadcast_buffers()

    def on_train_end(self) -> None:
        """Test the same buffers on all ranks, without the memory of the graphs."""
        self.sam.broadcast_buffers()
        self.backward_passes.release()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save which batches are captured."""
        checkpoint["backward_passes"] = self.backward_passes.state_dict(getattr(self.data, "batch_size", None))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Capture the same batches as before."""
        if state := checkpoint.get("backward_passes"):
            self.backward_passes.load_state_dict(state, getattr(self.data, "batch_size", None))

    @property
    def _scaler(self) -> Any:
        """The GradScaler of 16-mixed, which skips steps that overflow, or None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _step_scheduler(self) -> None:
        scheduler: Any = self.lr_schedulers()
        if isinstance(scheduler, ReduceLROnPlateau):
            metrics = self.trainer.callback_metrics
            scheduler.step(metrics.get("val/loss", metrics[self.train_loss_name]))
        elif scheduler is not None:
            try:
                scheduler.step()
            except ValueError as error:  # OneCycleLR after its last step
                raise SettingError(
                    f"lr_scheduler {type(scheduler).__name__} cannot step after step {self.trainer.global_step}: "
                    f"{' '.join(str(error).split())}; the run has {self._scheduler_steps()} {self.lr_interval}s"
                ) from error

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """The scheduler; without a T_max of its own it gets the length of the run."""
        factory: Any = self.lr_scheduler
        if factory is None:
            return None
        cosine = isinstance(called(factory), type) and takes(factory, "T_max")
        self._cosine_follows_run = cosine and plain_settings(factory).get("T_max") is None
        settings = {"T_max": self._scheduler_steps() or 1} if self._cosine_follows_run else {}
        return factory(optimizer, **settings)

    def _scheduler_steps(self) -> int | None:
        """How often the scheduler steps in this run, or None if only time ends it."""
        run = self.trainer
        epochs = run.max_epochs if run.max_epochs is not None and run.max_epochs >= 0 else None
        if self.lr_interval == "epoch":
            return epochs
        if epochs is None:
            return run.max_steps if run.max_steps > 0 else None
        steps = int(run.estimated_stepping_batches)  # which knows the number of batches, but not that we accumulate
        accumulated = self.accumulate_grad_batches
        return epochs * math.ceil(run.num_training_batches / accumulated) if accumulated > 1 else steps

    def _check_cosine(self, scheduler: Any) -> None:
        """A cosine that ends before or after the run is a common slip after changing max_epochs."""
        T_max, run = getattr(scheduler, "T_max", None), self.trainer
        if T_max is None or getattr(run, "fast_dev_run", False) or not run.max_epochs or run.max_epochs < 0:
            return
        steps = self._scheduler_steps()
        if self._cosine_follows_run:
            scheduler.T_max = steps
        elif T_max != steps:
            rank_zero_warn(
                f"the scheduler's T_max is {T_max} and the run has {steps} {self.lr_interval}s: "
                f"set lr_scheduler.init_args.T_max to {steps} for a cosine that ends with the run"
                + ("; this resumed run keeps the cosine it started with" if run.ckpt_path else "")
            )
