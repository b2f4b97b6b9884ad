"""What every LightningModule that trains with the engine shares: engine, optimizer, precision, processes, scheduler."""

import inspect
import math
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import SumMetric

from imbsam import SAM, ClassAwareSAM, FocalSAM, ImbSAM, Plain, SettingError
from imbsam.class_groups import tail_mask
from lightning_modules.build_network import BuildNetwork
from lightning_modules.epoch_log import log_epoch
from lightning_modules.moved_share import MovedShare

Method = Literal["sgd", "sam", "imbsam", "focal_sam"]
RhoSchedule = Literal["constant", "linear", "cosine"]


class SharpnessAwareModule(LightningModule):
    """Manual optimization with the engine in the place of ``loss.backward()``.

    A subclass makes the backward pass in :meth:`create_engine`, and in its ``training_step`` calls
    ``self.sam.backward`` and then :meth:`step_optimizer`, unless :attr:`only_updates_batch_norm`. Logs ``rho`` once an
    epoch where it has a schedule.

    Args:
        method: sgd (plain training), sam, imbsam or focal_sam.
        rho: length of the perturbation, at `start_epoch` where it has a schedule.
        start_epoch: first epoch, from 0, with a perturbation; before it training is plain.
        optimizer: any torch optimizer that steps without a closure.
        lr_scheduler: any torch scheduler. ReduceLROnPlateau watches the validation loss, or else the training loss.
        lr_interval: step the scheduler after every epoch or after every optimizer step.
        accumulate_grad_batches: batches that make up one step.
        gradient_clip_val: clip the (unscaled) gradient at this value.
        gradient_clip_algorithm: clip by norm or by value.
        rho_schedule: constant, or from rho at `start_epoch` to `rho_end` at the last epoch, linear in the epoch or by
            half a cosine. With a cosine learning rate, cosine is the schedule of GSAM, whose rho falls with the
            learning rate (Zhuang et al., ICLR 2022, arXiv 2203.08065).
        rho_end: length of the perturbation in the last epoch, where rho has a schedule; it may be above rho.
    """

    train_loss_name = "train/loss"
    """The metric that ReduceLROnPlateau watches where there is no validation."""

    def __init__(
        self,
        method: Method,
        rho: float,
        start_epoch: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        lr_interval: Literal["epoch", "step"],
        accumulate_grad_batches: int,
        gradient_clip_val: float | None,
        gradient_clip_algorithm: Literal["norm", "value"],
        rho_schedule: RhoSchedule = "constant",
        rho_end: float = 0.0,
    ) -> None:
        super().__init__()
        if start_epoch < 0:
            raise SettingError(f"start_epoch is {start_epoch}: give a number from 0")
        if accumulate_grad_batches < 1:
            raise SettingError(f"accumulate_grad_batches is {accumulate_grad_batches}: give a number from 1")
        if gradient_clip_val is not None and not gradient_clip_val > 0:
            raise SettingError(
                f"gradient_clip_val is {gradient_clip_val}: give a number above 0, or null for no clipping"
            )
        if method not in ("sgd", "sam", "imbsam", "focal_sam"):
            raise SettingError(f"method is {method!r}: choose sgd, sam, imbsam or focal_sam")
        if rho_schedule not in ("constant", "linear", "cosine"):
            raise SettingError(f"rho_schedule is {rho_schedule!r}: choose constant, linear or cosine")
        if not 0 <= rho_end < math.inf:
            raise SettingError(f"rho_end is {rho_end}: give a finite number from 0")
        if rho_schedule == "constant" and rho_end != 0:
            raise SettingError(
                f"rho_end is {rho_end} and rho_schedule constant: choose linear or cosine, or leave it out"
            )
        self.automatic_optimization = False
        self.method = method
        self.rho, self.rho_end = (0.0, 0.0) if method == "sgd" else (float(rho), float(rho_end))
        self.rho_schedule = rho_schedule
        self.start_epoch = start_epoch
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.sam: ClassAwareSAM
        # a metric, so that a run that goes on amid an epoch goes on counting; every rank skips the same steps
        self.skipped_steps = SumMetric(sync_on_compute=False)
        self._loss_scale = 0.0
        self._half: torch.dtype | None = None

    def engine(
        self,
        module: nn.Module,
        class_counts: Tensor,
        *,
        eta: float = 20,
        tail_classes: list[int] | None = None,
        tail_weight: float = 1.0,
        focal_lambda: float = 0.8,
        focal_gamma: float = 3.0,
        **settings: Any,
    ) -> ClassAwareSAM:
        """The backward pass of ``method`` for the parameters of ``module``.

        Args:
            module: what is perturbed.
            class_counts: training samples per class (C,).
            eta: classes with fewer than eta training samples are tail classes.
            tail_classes: the tail classes by index, in place of eta.
            tail_weight: multiplies the loss of the tail classes, for every method.
            focal_lambda: focal_sam's weight of the sharpness term.
            focal_gamma: how much less common classes count in focal_sam.
            **settings: further settings of :class:`ClassAwareSAM`.
        """
        strategy: Any = self.trainer.strategy
        if getattr(strategy, "_ddp_comm_hook", None) is not None:
            raise SettingError(
                "the strategy has a ddp_comm_hook, which would see none of the passes: the gradients are averaged by "
                "the engine, in at most two all-reduces; leave the hook out"
            )
        if self.rho_schedule != "constant" and self._max_epochs is None:
            raise SettingError(
                f"rho_schedule is {self.rho_schedule} and trainer.max_epochs {self.trainer.max_epochs}: the schedule "
                "ends with the last epoch, so say how many there are"
            )
        if self.trainer.world_size > 1:
            settings["no_sync"] = strategy.block_backward_sync
            settings["process_group"] = torch.distributed.group.WORLD
        if tail_weight != 1:
            settings["class_weight"] = torch.where(tail_mask(class_counts, eta, tail_classes), tail_weight, 1.0)
        self._watch_precision(module)
        if self.method == "imbsam":
            return ImbSAM(module, class_counts, eta=eta, tail_classes=tail_classes, rho=self.rho, **settings)
        if self.method == "focal_sam":
            return FocalSAM(
                module,
                class_counts,
                rho=self.rho,
                focal_lambda=focal_lambda,
                focal_gamma=focal_gamma,
                **settings,
            )
        if self.method == "sam":
            return SAM(module, rho=self.rho, **settings)
        return Plain(module, **settings)

    def configure_callbacks(self) -> list[Callback]:
        """Have the network built first, see :class:`BuildNetwork`."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, BuildNetwork) for callback in callbacks):
            callbacks.insert(0, BuildNetwork())
        return []

    def create_engine(self) -> ClassAwareSAM:
        """The backward pass, made by :meth:`engine` with the settings of the subclass."""
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        """One optimizer, and a scheduler where there is one; and the backward pass, which needs the network too."""
        self.sam = self.create_engine()
        try:
            optimizer = self.optimizer(self.parameters())
            scheduler = self.lr_scheduler(optimizer) if self.lr_scheduler else None
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
        """Start with the perturbation and the loss scale of this moment: a run may go on amid an epoch."""
        self._start_epoch()
        self._loss_scale = self._scaler.get_scale() if self._scaler else 0.0
        if schedulers := self.lr_schedulers():
            self._check_length(schedulers)  # by now that of the checkpoint

    def on_train_epoch_start(self) -> None:
        """Perturb from `start_epoch` on."""
        self._start_epoch()
        self.skipped_steps.reset()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here: gradients are unscaled by now."""
        if self.gradient_clip_val is not None:
            self.clip_gradients(
                optimizer,
                gradient_clip_val=self.gradient_clip_val,
                gradient_clip_algorithm=self.gradient_clip_algorithm,
            )

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
        if self.rho_schedule != "constant":
            log_epoch(self, {"rho": self.sam.rho})
        if self.lr_interval == "epoch":
            self._step_scheduler()

    def on_validation_start(self) -> None:
        """What is validated must not differ from rank to rank."""
        if self.trainer.state.fn == "fit":
            self.sam.broadcast_buffers()

    def on_train_end(self) -> None:
        """What is tested next must not differ from rank to rank."""
        self.sam.broadcast_buffers()

    def moved_share(self, module: nn.Module) -> MovedShare | None:
        """Watches how many weights the perturbation moves, where they are in half precision."""
        return MovedShare(module) if self._half is not None and max(self.rho, self.rho_end) > 0 else None

    @property
    def only_updates_batch_norm(self) -> bool:
        """Whether this epoch is StochasticWeightAveraging's, which passes the data through the averaged weights."""
        return bool(self.trainer.fit_loop._skip_backward)

    @property
    def _scaler(self) -> Any:
        """The GradScaler of 16-mixed, which skips steps that overflowed, or None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @property
    def _max_epochs(self) -> int | None:
        """The run's epochs, or None where only steps or time end it."""
        epochs = self.trainer.max_epochs
        return epochs if epochs is not None and epochs >= 0 else None

    def _start_epoch(self) -> None:
        """Set what goes by the epoch, from the epoch alone: a run may go on amid one."""
        self.sam.rho = self._rho_of(self.current_epoch)

    def _rho_of(self, epoch: int) -> float:
        if epoch < self.start_epoch:
            return 0.0
        if self.rho_schedule == "constant":
            return self.rho
        assert self._max_epochs is not None
        done = (epoch - self.start_epoch) / max(1, self._max_epochs - 1 - self.start_epoch)
        if self.rho_schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.rho + (self.rho_end - self.rho) * done

    def _watch_precision(self, module: nn.Module) -> None:
        half = (torch.bfloat16, torch.float16)
        self._half = next((p.dtype for p in module.parameters() if p.dtype in half), None)
        rho = max(self.rho, self.rho_end)
        if self._half is not None and rho > 0:
            rank_zero_warn(
                f"trainer.precision is {self.trainer.precision}: with weights in {self._half} a perturbation of length "
                f"rho={rho} is below the spacing of most weights and moves only some of them (train/moved_share "
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
            except ValueError as error:  # OneCycleLR, stepped beyond its end
                raise SettingError(
                    f"lr_scheduler is {type(scheduler).__name__}, which steps every {self.lr_interval}: {error}; give "
                    "it as many steps as the run has"
                ) from error

    def _check_length(self, scheduler: Any) -> None:
        """A cosine that ends before or after the run is a common slip after changing max_epochs."""
        end, run = getattr(scheduler, "T_max", None), self.trainer
        if end is None or getattr(run, "fast_dev_run", False) or not run.max_epochs or run.max_epochs < 0:
            return
        steps = run.max_epochs
        if self.lr_interval == "step":
            steps = int(run.estimated_stepping_batches)  # knows the number of batches, but not that we accumulate them
            if self.accumulate_grad_batches > 1:
                steps = run.max_epochs * -(-int(run.num_training_batches) // self.accumulate_grad_batches)
        if end != steps:
            rank_zero_warn(
                f"the scheduler's T_max is {end} and the run has {steps} {self.lr_interval}s: "
                f"set lr_scheduler.init_args.T_max to {steps} for a cosine that ends with the run"
            )
