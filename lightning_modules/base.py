"""What every LightningModule that trains with the engine shares: engine, optimizer, precision, processes, scheduler."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import SumMetric

from imbsam import ClassAwareSAM, ImbSAM, SettingError
from lightning_modules.epoch_log import log_epoch
from lightning_modules.factories import called, describe, restore, takes
from lightning_modules.perturbed_fraction import PerturbedFraction

SAMCallable = Callable[[nn.Module, Tensor], ClassAwareSAM]
"""What makes the backward pass of a module and its class counts: a method's class, or a partial of one."""


class _BuildModel(Callback):
    """Comes first: BackboneFinetuning freezes the layers in its ``setup``, ModelPruning looks them up there."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the layers; the data are set up by now."""
        pl_module.configure_model()


class SharpnessAwareModule(LightningModule):
    """Manual optimization with the engine in the place of ``loss.backward()``.

    A subclass calls :meth:`make_sam` at the end of its ``configure_model``, and in its ``training_step``
    ``self.sam.backward`` and then :meth:`step_optimizer`.

    Args:
        sam: the method: a class of ``(module, class_counts)``, such as ``Plain``, ``SAM``, ``ImbSAM``, ``FocalSAM`` or
            one of your own, or a partial of it; default: ``ImbSAM``. Callbacks may change its ``rho`` and
            ``class_weight`` between steps.
        optimizer: any torch optimizer that steps without a closure; default: SGD.
        lr_scheduler: any torch scheduler. ReduceLROnPlateau watches the validation loss, or else the training loss.
        lr_interval: step the scheduler after every epoch or after every optimizer step.
        gradient_clip_val: clip the (unscaled) gradient at this norm.
    """

    train_loss_name = "train/loss"
    """The metric that ReduceLROnPlateau watches where there is no validation."""

    def __init__(
        self,
        sam: SAMCallable | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        gradient_clip_val: float | None = None,
    ) -> None:
        super().__init__()
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise SettingError(
                f"gradient_clip_val is {gradient_clip_val}: give a number above 0, or null for no clipping"
            )
        self.automatic_optimization = False
        # with a class as default in the signature, jsonargparse would pass its settings on to any other choice
        self.sam_factory: SAMCallable = restore(sam) or ImbSAM
        self.optimizer: OptimizerCallable = optimizer or torch.optim.SGD
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.lr: float | None = None
        """Learning rate in place of the optimizer's own: Lightning's lr_find sets it."""
        self.accumulate_grad_batches = 1
        """Batches that make up one step."""
        self.gradient_clip_val = gradient_clip_val
        self.sam: ClassAwareSAM
        # a metric, so that a run resumed mid-epoch continues the count; every rank skips the same steps
        self.skipped_steps = SumMetric(sync_on_compute=False)
        self._follows = False
        self._loss_scale = 0.0
        self._half: torch.dtype | None = None

    @property
    def method(self) -> str:
        """The name of the method's class."""
        return getattr(called(self.sam_factory), "__name__", "")

    def make_sam(self, module: nn.Module, class_counts: Tensor, **settings: Any) -> None:
        """Make :attr:`sam`, the backward pass of ``module``, where a training begins.

        It is made before anything is printed or written, so that a wrong setting ends the run at once.

        Args:
            module: what is perturbed.
            class_counts: training samples per class (C,).
            **settings: what the model itself knows, such as ``tail_classes``.
        """
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self.sam = self.sam_factory(module, class_counts, **settings)

    def configure_callbacks(self) -> list[Callback]:
        """Build the layers before any callback's ``setup``, which comes before the module's."""
        if not any(isinstance(callback, _BuildModel) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            self.trainer.callbacks.insert(0, _BuildModel())  # type: ignore[attr-defined]
        return []

    def on_fit_start(self) -> None:
        """Join the other processes."""
        strategy: Any = self.trainer.strategy
        if getattr(strategy, "_ddp_comm_hook", None) is not None:
            raise SettingError(
                "the strategy has a ddp_comm_hook, which would see none of the passes: the gradients are averaged by "
                "the engine, in at most two all-reduces; leave the hook out"
            )
        if self.trainer.world_size > 1:
            self.sam.no_sync = strategy.block_backward_sync
            self.sam.process_group = torch.distributed.group.WORLD
        self._watch_precision(self.sam.module)

    def configure_optimizers(self) -> Any:
        """One optimizer, and a scheduler where there is one."""
        try:
            optimizer = self.optimizer(self.parameters())
            if self.lr is not None:
                for group in optimizer.param_groups:
                    group["lr"] = self.lr
            scheduler = self._scheduler(optimizer)
        except (TypeError, ValueError) as error:
            raise SettingError(f"optimizer or lr_scheduler: {error}") from error
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if isinstance(optimizer, torch.optim.LBFGS) or (closure and closure.default is closure.empty):
            raise SettingError(
                f"optimizer is {type(optimizer).__name__}, which evaluates the loss itself: choose one that steps by "
                ".grad, such as torch.optim.SGD or torch.optim.AdamW"
            )
        if isinstance(optimizer, torch.optim.SparseAdam):
            raise SettingError("optimizer is SparseAdam, which takes sparse gradients alone: choose torch.optim.Adam")
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, ReduceLROnPlateau) and self.lr_interval == "step":
            raise SettingError("lr_interval is step: ReduceLROnPlateau watches a loss of whole epochs; set it to epoch")
        # manual optimization: Lightning keeps the scheduler in checkpoints, and we step it
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.lr_interval}}

    def on_train_start(self) -> None:
        """Start with the loss scale of this moment: a run may resume mid-epoch."""
        self._loss_scale = self._scaler.get_scale() if self._scaler else 0.0
        if schedulers := self.lr_schedulers():
            self._check_length(schedulers)  # by now that of the checkpoint

    def on_train_epoch_start(self) -> None:
        """Count the epoch's steps that overflow."""
        self.skipped_steps.reset()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here: gradients are unscaled by now."""
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.gradient_clip_val, gradient_clip_algorithm="norm")

    def step_optimizer(self) -> None:
        """After the backward pass: one optimizer step, and the scheduler's where it counts steps."""
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        if self._scaler:
            scale = self._scaler.get_scale()  # no wait of its own: the scaler's step has just waited
            self.skipped_steps.update(float(scale < self._loss_scale))
            self.log("train/loss_scale", scale)
            self._loss_scale = scale
        if self.lr_interval == "step":
            self._step_scheduler()

    def on_train_epoch_end(self) -> None:
        """Log the steps that overflowed, and step the scheduler."""
        if self._scaler:
            log_epoch(self, {"train/skipped_steps": self.skipped_steps.compute()})
        if self.lr_interval == "epoch":
            self._step_scheduler()

    def check_loss(self, loss: Tensor) -> None:
        """End a run whose weights are lost: a mean loss that is not finite never recovers.

        Args:
            loss: mean training loss of an epoch, alike on all ranks.
        """
        if self._scaler is None and not bool(torch.isfinite(loss)):
            optimizer: Any = self.optimizers()
            raise SettingError(
                f"the training loss is {float(loss)} in epoch {self.current_epoch + 1}, at a learning rate of "
                f"{optimizer.param_groups[0]['lr']:g}: lower it, or set model.gradient_clip_val"
            )

    def on_validation_start(self) -> None:
        """What is validated must not differ from rank to rank."""
        if self.trainer.state.fn == "fit":
            self.sam.broadcast_buffers()

    def on_train_end(self) -> None:
        """What is tested next must not differ from rank to rank."""
        self.sam.broadcast_buffers()

    def perturbed_fraction(self, module: nn.Module) -> PerturbedFraction | None:
        """Watches how many weights the perturbation moves, where they are in half precision."""
        return PerturbedFraction(module) if self._half is not None and self.sam.rho > 0 else None

    @property
    def _scaler(self) -> Any:
        """The GradScaler of 16-mixed, which skips steps that overflowed, or None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _watch_precision(self, module: nn.Module) -> None:
        half = (torch.bfloat16, torch.float16)
        self._half = next((p.dtype for p in module.parameters() if p.dtype in half), None)
        rho = self.sam.rho
        if self._half is not None and rho > 0:
            rank_zero_warn(
                f"trainer.precision is {self.trainer.precision}: with weights in {self._half} a perturbation of length "
                f"rho={rho} is below the spacing of most weights and moves only some of them (train/perturbed_fraction "
                "logs how many); bf16-mixed keeps the weights in float32"
            )

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
                    f"{' '.join(str(error).split())}; the run has {self._length()} {self.lr_interval}s"
                ) from error

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """The scheduler; a T_max that nobody gave is the length of the run."""
        factory: Any = self.lr_scheduler
        if factory is None:
            return None
        given = describe(factory)["init_args"].get("T_max") if takes(factory, "T_max") else 0
        self._follows = given is None and getattr(called(factory), "__name__", "") not in ("", "<lambda>")
        return factory(optimizer, T_max=self._length() or 1) if self._follows else factory(optimizer)

    def _length(self) -> int | None:
        """How often the scheduler steps in this run, or None where only time ends it."""
        run, limited = self.trainer, self.trainer.max_steps is not None and self.trainer.max_steps > 0
        epochs = run.max_epochs if run.max_epochs is not None and run.max_epochs >= 0 else None
        if self.lr_interval == "epoch":
            return epochs
        if limited and epochs is None:
            return int(run.max_steps)
        if epochs is None:
            return None
        steps = int(run.estimated_stepping_batches)  # knows the number of batches, but not that we accumulate them
        if self.accumulate_grad_batches > 1:
            steps = epochs * -(-int(run.num_training_batches) // self.accumulate_grad_batches)
        return steps

    def _check_length(self, scheduler: Any) -> None:
        """A cosine that ends before or after the run is a common slip after changing max_epochs."""
        end, run = getattr(scheduler, "T_max", None), self.trainer
        if end is None or getattr(run, "fast_dev_run", False) or not run.max_epochs or run.max_epochs < 0:
            return
        steps = self._length()
        if self._follows:
            scheduler.T_max = steps
        elif end != steps:
            rank_zero_warn(
                f"the scheduler's T_max is {end} and the run has {steps} {self.lr_interval}s: "
                f"set lr_scheduler.init_args.T_max to {steps} for a cosine that ends with the run"
                + (", in a run of its own: this one keeps the cosine that it began with" if run.ckpt_path else "")
            )
