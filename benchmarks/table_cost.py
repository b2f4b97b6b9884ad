"""The cost of a training step on small tables: every method relative to SGD, in a bare loop and under Lightning.

    python benchmarks/table_cost.py ADBENCH_FOLDER
    python benchmarks/table_cost.py ADBENCH_FOLDER --data Classical/6_cardio --rounds 5

The detectors and their settings are those of `configs/detector`. A step is everything a training does between two
batches: the backward pass of the method, the optimizer's step (Adam, fused) and ``zero_grad``; under Lightning also the
loader, the hooks and, once every 50 steps, the validation. All methods run the same number of steps on the same batches
and take turns, so that a busy machine slows all of them equally; a ratio is a method's time over SGD's in the same
round, and the table gives its median and quartiles. SGD is ``losses.mean().backward()`` in the bare loop, and
`Plain` under Lightning. "By hand" is the same three passes without the engine and its guarantees: nothing restores
generators and buffers or undoes an interrupted step. Times are the process's CPU time, one thread.
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules import AnomalyDataModule
from imbsam import SAM, ClassAwareSAM, ImbSAM, Plain
from lightning_modules import AnomalyDetector, RestoringEarlyStopping
from lightning_modules.detectors import DeepSAD, Detector, DevNet, PReNet, WeightedClassifier
from lightning_modules.quiet_process import quiet_process

DETECTORS: dict[str, tuple[Callable[..., Detector], str]] = {
    "DevNet, balanced": (DevNet, "balanced"),
    "DeepSAD, natural": (DeepSAD, "natural"),
    "PReNet, pairs": (PReNet, "pairs"),
    "classifier, natural": (WeightedClassifier, "natural"),
    "unweighted classifier, natural": (functools.partial(WeightedClassifier, weighted=False), "natural"),
}
METHODS: dict[str, type] = {"SGD": Plain, "SAM": SAM, "ImbSAM": ImbSAM}
BY_HAND = "ImbSAM by hand"
BATCHES_PER_EPOCH = 50
OPTIMIZER = functools.partial(torch.optim.Adam, lr=2e-3, fused=True)


def data_module(path: Path, sampling: str) -> AnomalyDataModule:
    """As in configs/data/anomaly_table.yaml, with 10 % of the anomalies labelled."""
    data = AnomalyDataModule(
        path=path,
        sampling=sampling,  # type: ignore[arg-type]
        batch_size=256,
        batches_per_epoch=BATCHES_PER_EPOCH,
        labelled_share=0.1,
        val_share=0.2,
        min_rows=1000,
        max_rows=10000,
    )
    data.setup()
    return data


def bare_loop(detector: Callable[..., Detector], data: AnomalyDataModule, method: str) -> Iterator[None]:
    """Train without Lightning; yields after every step."""
    torch.manual_seed(0)
    model = detector(tuple(data.train_features.shape[1:]))
    model.prepare(data.train_features, data.train_labels)
    optimizer = OPTIMIZER(model.parameters())
    batches = [(x, y, y.amax(dim=1) if y.dim() == 2 else y) for x, y in data.train_dataloader()]
    sam: ClassAwareSAM = SAM(model, rho=0.1)
    if method == "ImbSAM":
        sam = ImbSAM(model, data.class_counts, tail_classes=[1], rho=0.1)

    def losses(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return model.losses(x[rows], y[rows])

    for x, y, tail in itertools.cycle(batches):
        if method == "SGD":
            torch.autograd.backward(model.losses(x, y).mean())
        elif method == BY_HAND:
            by_hand(model, x, y, tail)
        else:
            sam.backward(functools.partial(losses, x, y), tail)
        optimizer.step()
        optimizer.zero_grad()
        yield


def by_hand(model: Detector, x: Tensor, y: Tensor, tail: Tensor, rho: float = 0.1) -> None:
    """ImbSAM's gradient in `.grad`: three passes, and nothing else."""
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    rows = tail.nonzero().flatten()

    def gradient(losses: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(losses.sum() / len(x), params))

    g = gradient(model.losses(x, y))
    if len(rows):
        g_s = gradient(model.losses(x[rows], y[rows]))
        with torch.no_grad():
            torch._foreach_sub_(g, g_s)
            weights = [p.clone() for p in params]
            torch._foreach_mul_(g_s, rho / torch.stack(torch._foreach_norm(g_s)).norm())
            torch._foreach_add_(params, g_s)
        at_w_plus_e = gradient(model.losses(x[rows], y[rows]))
        with torch.no_grad():
            torch._foreach_add_(g, at_w_plus_e)
            torch._foreach_copy_(params, weights)
    for p, grad in zip(params, g, strict=True):
        p.grad = grad


class Clock(Callback):
    """CPU seconds from the first step to the last."""

    seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The detector is built and prepared."""
        self.seconds = -time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last step and its validation."""
        self.seconds += time.process_time()


def fit_seconds(detector: Callable[..., Detector], data: AnomalyDataModule, method: str, epochs: int) -> float:
    """CPU seconds of so many epochs under Lightning."""
    torch.manual_seed(0)
    clock = Clock()
    module = AnomalyDetector(
        detector,
        sam=functools.partial(METHODS[method], **({} if method == "SGD" else {"rho": 0.1})),
        optimizer=OPTIMIZER,
    )
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[clock, RestoringEarlyStopping(patience=epochs)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    return clock.seconds


def measure(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round; they take turns, and the first round warms up."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed = runs[name]()
            if round_:
                seconds[name].append(elapsed)
    return seconds


def bare_runs(detector: Callable[..., Detector], data: AnomalyDataModule, steps: int) -> dict[str, Callable[[], float]]:
    """For each method, so many steps of a bare loop."""

    def run(loop: Iterator[None]) -> float:
        start = time.process_time()
        for _ in range(steps):
            next(loop)
        return time.process_time() - start

    return {method: functools.partial(run, bare_loop(detector, data, method)) for method in (*METHODS, BY_HAND)}


def trainer_runs(
    detector: Callable[..., Detector], data: AnomalyDataModule, epochs: int
) -> dict[str, Callable[[], float]]:
    """For each method, a fit of so many epochs."""
    return {method: functools.partial(fit_seconds, detector, data, method, epochs) for method in METHODS}


def table_row(name: str, seconds: dict[str, list[float]], steps: int, of: str = "SGD") -> str:
    """Milliseconds of a step of SGD, and the other methods' ratios to it."""
    cells = [name, f"{1000 * statistics.median(seconds[of]) / steps:.2f}"]
    for method in seconds:
        if method != of:
            ratios = [a / b for a, b in zip(seconds[method], seconds[of], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="ADBench's npz files in folders (Classical, ...)")
    parser.add_argument("--data", nargs="+", default=["Classical/6_cardio", "Classical/2_annthyroid"])
    parser.add_argument("--detectors", nargs="+", choices=list(DETECTORS), default=list(DETECTORS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=100, help="of a bare loop before another takes its turn")
    parser.add_argument("--epochs", type=int, default=3, help=f"of a fit, each of {BATCHES_PER_EPOCH} steps")
    arguments = parser.parse_args()
    quiet_process()
    for where, steps, make in (
        ("bare loop", arguments.steps, functools.partial(bare_runs, steps=arguments.steps)),
        ("Lightning", BATCHES_PER_EPOCH * arguments.epochs, functools.partial(trainer_runs, epochs=arguments.epochs)),
    ):
        print(f"**{where}, {arguments.rounds} rounds of {steps} steps**\n")
        ratios = ["SAM / SGD", "ImbSAM / SGD", *([f"{BY_HAND} / SGD"] if where == "bare loop" else [])]
        print(f"| table, detector | SGD, ms a step | {' | '.join(ratios)} |\n|{' --- |' * (len(ratios) + 2)}")
        for name, detector in itertools.product(arguments.data, arguments.detectors):
            kind, sampling = DETECTORS[detector]
            data: Any = data_module(arguments.folder / f"{name}.npz", sampling)
            seconds = measure(make(kind, data), arguments.rounds)
            print(table_row(f"{name.split('/')[-1]}, {detector}", seconds, steps), flush=True)
        print()


if __name__ == "__main__":
    main()
