"""How close is the cheap gradient to the published one? Compares corrections from few samples with the whole batch's.

    python benchmarks/agreement.py --root data                   # CIFAR-100-LT if it is in data/: an hour on one core
    python benchmarks/agreement.py --root "" --json digits.json  # long-tailed digits, part of scikit-learn: a minute

ImbSAM's gradient is the plain one plus a correction, g - g_all = g_s(w + e) - g_s(w). At several steps of one training
run this script computes the correction for several `context_rows` from the same weights, batch and random numbers, and
compares each with the reference: the correction of `context_rows="batch"` in float32, the published gradient. The run
itself trains with `"auto"` at the smallest eta, with SGD 0.1, momentum 0.9 and weight decay 5e-4.

Columns:
    length   length of the correction / length of the reference
    cosine   between the two corrections
    whole    cosine between the two whole gradients: always near 1, because plain SGD's is; judge by the others

Three nets: one with BatchNorm, where context rows matter; one with dropout and GroupNorm, where they do not, and where
the passes draw other masks than the published ones, so that "batch" with other masks is the best possible; and the
first under bfloat16 autocast, where each correction is relative to bfloat16's own plain gradient.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules import CIFAR100LTDataModule, DigitsLTDataModule, LongTailedDataModule
from imbsam import ClassAwareSAM, ImbSAM
from imbsam.snapshot import Buffers
from lightning_modules.backbones import CifarResNet20, SmallCNN

ContextRows = int | Literal["auto", "batch"]
RHO = 0.05


def nets(images: Tensor, num_classes: int) -> dict[str, Callable[[], nn.Module]]:
    """The nets by name, for images of this shape."""
    channels, height = images.shape[1:3]

    def batch_norm() -> nn.Module:
        if height == 32:
            return CifarResNet20(num_classes=num_classes)
        return SmallCNN(num_classes, channels, norm="batch")

    return {
        "BatchNorm": batch_norm,
        "dropout": lambda: SmallCNN(num_classes, channels, dropout=0.3),
        "BatchNorm, bfloat16": batch_norm,
    }


def batches(data: LongTailedDataModule) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless training batches, without the last, smaller one of each epoch."""
    while True:
        for x, y in data.train_dataloader():
            if len(y) == data.batch_size:
                yield x, y


def per_sample_losses(
    model: nn.Module, x: Tensor, y: Tensor, rows: Tensor, autocast: AbstractContextManager[Any] | None = None
) -> Tensor:
    """Cross-entropy of each of `rows`, shape (R,)."""
    with autocast or nullcontext():
        return F.cross_entropy(model(x[rows]), y[rows], reduction="none")


def gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    sam: ClassAwareSAM | None,
    seed: int,
    autocast: AbstractContextManager[Any],
) -> Tensor:
    """The gradient of `sam`, or the plain one, as one vector; the buffers are left unchanged."""
    buffers = Buffers(model)
    model.zero_grad()
    torch.manual_seed(seed)

    losses = functools.partial(per_sample_losses, model, x, y, autocast=autocast)
    if sam is None:
        torch.autograd.backward(losses(torch.arange(len(y))).mean())
    else:
        sam.backward(losses, y)
    buffers.restore()
    vector = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
    model.zero_grad()
    return vector


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two vectors."""
    return float(a @ b / (a.norm() * b.norm()))


def compare(
    model: nn.Module, x: Tensor, y: Tensor, sams: Mapping[str, ClassAwareSAM], low_precision: bool, seed: int
) -> dict[str, tuple[float, float, float]]:
    """Length ratio, cosine of the correction and of the whole gradient, for each of `sams` on one batch."""

    def evaluate(sam: ClassAwareSAM | None, low: bool = low_precision, seed: int = seed) -> Tensor:
        return gradient(model, x, y, sam, seed, torch.autocast("cpu", torch.bfloat16) if low else nullcontext())

    g_reference = evaluate(sams["batch"], low=False)
    reference = g_reference - evaluate(None, low=False)
    plain = evaluate(None)
    agreement = {}
    for name, sam in sams.items():
        if name == "batch" and not low_precision:
            continue
        if "other masks" in name:
            g = evaluate(sam, seed=seed + 1)
            correction = g - evaluate(None, seed=seed + 1)
        else:
            g = evaluate(sam)
            correction = g - plain
        length = float(correction.norm() / reference.norm())
        agreement[name] = length, cosine(correction, reference), cosine(g, g_reference)
    return agreement


def trajectory(
    net: str,
    model: nn.Module,
    data: LongTailedDataModule,
    etas: list[float],
    context_rows: list[int],
    measured: range,
) -> list[dict[str, Any]]:
    """Train up to the last of the `measured` steps; one dict for each eta and choice of context rows."""
    masks = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    ways: dict[str, ContextRows] = {"batch": "batch"}
    if masks:
        ways |= {"0": 0, "batch, other masks": "batch"}
    else:
        ways |= {str(k): k for k in context_rows if k < data.batch_size}
    sams = {
        eta: {way: ImbSAM(model, data.class_counts, eta=eta, rho=RHO, context_rows=k) for way, k in ways.items()}
        for eta in etas
    }
    trainer = ImbSAM(model, data.class_counts, eta=min(etas), rho=RHO)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    agreements: dict[tuple[float, str], list[tuple[float, float, float]]] = {}
    sharp: dict[float, list[int]] = {eta: [] for eta in etas}
    for step, (x, y) in enumerate(batches(data)):
        if step in measured:
            state = torch.get_rng_state()
            for eta in etas:
                tail_rows = int((data.class_counts[y] < eta).sum())
                if tail_rows:
                    sharp[eta].append(tail_rows)
                    for way, numbers in compare(model, x, y, sams[eta], "bfloat16" in net, seed=step).items():
                        agreements.setdefault((eta, way), []).append(numbers)
            torch.set_rng_state(state)
        if step + 1 >= measured.stop:
            break
        trainer.backward(functools.partial(per_sample_losses, model, x, y), y)
        optimizer.step()
        optimizer.zero_grad()
    return [
        {
            "net": net,
            "batch": data.batch_size,
            "eta": eta,
            "sharp": statistics.median(sharp[eta]),
            "context_rows": way,
            **{
                name: statistics.median(column)
                for name, column in zip(("length", "cosine", "whole"), zip(*numbers, strict=True), strict=True)
            },
            "cosine_quartiles": statistics.quantiles([n[1] for n in numbers], n=4) if len(numbers) > 1 else None,
            "steps": len(numbers),
        }
        for (eta, way), numbers in agreements.items()
    ]


def markdown(table: list[dict[str, Any]]) -> str:
    """One Markdown table."""
    lines = [
        "| net | batch | eta | sharp rows | context_rows | length | cosine (quartiles) | whole | batches |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table:
        q = row["cosine_quartiles"]
        quartiles = f" ({q[0]:.2f} to {q[2]:.2f})" if q else ""
        lines.append(
            f"| {row['net']} | {row['batch']} | {row['eta']:g} | {row['sharp']:.0f} | {row['context_rows']} | "
            f"{row['length']:.2f} | {row['cosine']:.2f}{quartiles} | {row['whole']:.4f} | {row['steps']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with cifar-100-python; without it the digits are used")
    parser.add_argument("--nets", nargs="+", default=["BatchNorm", "dropout", "BatchNorm, bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes; default: 64 and 128, for the digits 64")
    parser.add_argument("--etas", nargs="+", type=float, default=[20, 100], help="for the digits only the first")
    parser.add_argument("--context-rows", nargs="+", type=int, default=[0, 8, 16, 32, 64])
    parser.add_argument("--start", type=int, default=60, help="first measured step")
    parser.add_argument("--stop", type=int, default=241, help="end of the measured steps")
    parser.add_argument("--every", type=int, default=15, help="steps from one measurement to the next")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    real = (Path(arguments.root) / "cifar-100-python").is_dir() and arguments.root != ""
    etas = arguments.etas if real else arguments.etas[:1]
    measured = range(arguments.start, arguments.stop, arguments.every)
    table: list[dict[str, Any]] = []
    for batch in arguments.batches or ([64, 128] if real else [64]):
        for net in arguments.nets:
            torch.manual_seed(0)
            data: LongTailedDataModule = (
                CIFAR100LTDataModule(arguments.root, augment=False, batch_size=batch)
                if real
                else DigitsLTDataModule(batch_size=batch)
            )
            data.prepare_data()
            data.setup("fit")
            model = nets(next(batches(data))[0], len(data.class_counts))[net]()
            table += trajectory(net, model, data, etas, arguments.context_rows, measured)
            if arguments.json:
                arguments.json.write_text(json.dumps(table, indent=1))
    print(f"{'CIFAR-100-LT, ratio 100' if real else 'long-tailed digits, ratio 50'}; steps {measured}; rho {RHO}\n")
    print(markdown(table))


if __name__ == "__main__":
    main()
