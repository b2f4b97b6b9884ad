"""The cost of a training step on a GPU: eager, captured, compiled and both; the part of `step_cost.py` that needs one.

    python benchmarks/step_cost.py --modes eager captured --sizes "ResNet-34 at 32, 64" --rounds 30 --json gpu.json

bfloat16 autocast, channels-last for the convolutional networks, fused SGD with momentum; images are on the GPU, labels
on the host. Labels are drawn with CIFAR-100-LT's class counts at ratio 100, eta is 20, and a batch without a tail
sample gets one, so that every step of ImbSAM perturbs. Every method trains its own network, alone on the GPU: it sees
all batches once, which compiles and captures, and then again, timed.

Columns:
    ms          median time of a step, including the optimizer's
    / SGD       multiple of SGD in the same mode
    / eager SGD multiple of eager SGD
    first pass  seconds for seeing the batches the first time, including compilation, warm-up and capture
    memory      peak memory of the caching allocator, in MB
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from datamodules import imbalanced_class_counts
from imbsam import SAM, ClassAwareSAM, ImbSAM, Plain
from imbsam.capture.captured_step import CapturedStep
from imbsam.capture.graphs import CudaGraphs, DirectCalls
from lightning_modules.backbones import CifarResNet34

COUNTS = imbalanced_class_counts(500, 100, 100, "exponential")


@dataclass(frozen=True)
class Size:
    """A network, its images and a batch."""

    model: Callable[[], nn.Module]
    pixels: int
    batch: int
    channels_last: bool = True


def _vit() -> nn.Module:
    model: nn.Module = torchvision.models.vit_b_16(num_classes=100)
    return model


def _resnet50() -> nn.Module:
    model: nn.Module = torchvision.models.resnet50(num_classes=100)
    return model


SIZES = {
    "ResNet-34 at 32, 64": Size(lambda: CifarResNet34(num_classes=100), 32, 64),
    "ResNet-34 at 32, 128": Size(lambda: CifarResNet34(num_classes=100), 32, 128),
    "ResNet-34 at 32, 256": Size(lambda: CifarResNet34(num_classes=100), 32, 256),
    "ResNet-50 at 224, 256": Size(_resnet50, 224, 256),
    "ViT-B/16 at 224, 128": Size(_vit, 224, 128, channels_last=False),
}
METHODS: dict[str, Callable[[nn.Module], ClassAwareSAM]] = {
    "SGD": lambda m: Plain(m),
    "SAM": lambda m: SAM(m),
    "ImbSAM, auto": lambda m: ImbSAM(m, COUNTS, eta=20),
    "ImbSAM, batch": lambda m: ImbSAM(m, COUNTS, eta=20, context_rows="batch"),
}
MODES = ("eager", "captured", "compiled", "captured + compiled")


def draw(size: Size, rounds: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Images of one batch on the device, and labels of every round on the host, each with a tail sample."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size.batch, 3, size.pixels, size.pixels, generator=generator).to(device)
    shares = torch.tensor(COUNTS, dtype=torch.float64)
    labels = [torch.multinomial(shares, size.batch, replacement=True, generator=generator) for _ in range(rounds)]
    for y in labels:
        y[0] = len(COUNTS) - 1
    return x.to(memory_format=torch.channels_last) if size.channels_last else x, labels


def stepper(method: str, mode: str, model: nn.Module, x: Tensor) -> Callable[[Tensor, Tensor], Any]:
    """A function from images and labels to a step's gradient in `.grad`."""
    device = x.device
    cuda = device.type == "cuda"

    def losses_of(x: Tensor, y: Tensor) -> Tensor:
        autocast: AbstractContextManager[Any] = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()
        with autocast:
            logits = model(x)
        return F.cross_entropy(logits.float(), y, reduction="none")

    if "captured" in mode:
        graphs = CudaGraphs(device) if cuda else DirectCalls(device)
        y = torch.zeros(len(x), dtype=torch.int64)
        return CapturedStep(METHODS[method](model), losses_of, (x, y), graphs=graphs)
    if method == "SGD":  # without this library
        return lambda x, y: torch.autograd.backward(losses_of(x, y.to(device, non_blocking=True)).mean())
    sam = METHODS[method](model)

    def step(x: Tensor, y: Tensor) -> None:
        labels = y.to(device, non_blocking=True)
        sam.backward(lambda rows: losses_of(x[rows], labels[rows]), y)

    return step


def measure(method: str, mode: str, size: Size, rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of every step but the first of each batch; the seconds of the first ones; the peak memory."""
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    model = size.model().to(device)
    if size.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if "compiled" in mode:
        torch.compiler.reset()  # type: ignore[no-untyped-call]
        # a captured step meets few shapes; an eager one meets more, and automatic dynamic shapes serve them
        model.compile(dynamic=False if "captured" in mode else None)
    x, labels = draw(size, rounds, device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step = stepper(method, mode, model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=cuda)

    def run(y: Tensor) -> float:
        start = time.perf_counter()
        step(x, y)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = sum(run(y) for y in labels)
    seconds = [run(y) for y in labels]
    quartiles = statistics.quantiles(seconds, n=4) if rounds > 1 else [seconds[0]] * 3
    return {
        "ms": 1000 * statistics.median(seconds),
        "low": 1000 * quartiles[0],
        "high": 1000 * quartiles[2],
        "first_s": first,
        "memory_mb": torch.cuda.max_memory_reserved() / 1e6 if cuda else 0.0,
    }


def table(sizes: Sequence[str], modes: Sequence[str], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Measure and print one Markdown table per size; a mode that fails is a line with the reason."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU: the passes are called, not captured"
    rows: list[dict[str, Any]] = []
    for size in sizes:
        print(f"\n**{size}, {name}, torch {torch.__version__}, {rounds} rounds**\n")
        print("| mode | method | ms (quartiles) | / SGD | / eager SGD | first pass | memory |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
        sgd: dict[str, float] = {}
        for mode in modes:
            for method in METHODS:
                try:
                    found = measure(method, mode, SIZES[size], rounds, device)
                except Exception as error:  # the other rows are worth having
                    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
                    print(f"| {mode} | {method} | {type(error).__name__}: {reason} | | | | |", flush=True)
                    continue
                finally:
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                rows.append({"size": size, "device": name, "mode": mode, "method": method, **found})
                if method == "SGD":
                    sgd[mode] = found["ms"]
                own, eager = (f"{found['ms'] / sgd[m]:.2f}" if m in sgd else "" for m in (mode, "eager"))
                print(
                    f"| {mode} | {method} | {found['ms']:.2f} ({found['low']:.2f} to {found['high']:.2f}) | {own} | "
                    f"{eager} | {found['first_s']:.1f} s | {found['memory_mb']:,.0f} MB |",
                    flush=True,
                )
    return rows
