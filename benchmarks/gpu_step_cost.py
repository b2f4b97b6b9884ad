"""The cost of a training step on a GPU: eager, captured, compiled and both; `gpu_step_table.py` makes the table of it.

bfloat16 autocast, channels-last for the convolutional networks, fused SGD with momentum; images are on the GPU, labels
on the host. Labels are drawn with CIFAR-100-LT's class counts at ratio 100, eta is 20, and a batch without a tail
sample gets one, so that every step of ImbSAM perturbs. Every method trains its own network, alone on the GPU: it sees
all batches once, which compiles and captures, and then again, timed.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
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
    """A network, its images and a batch; it is sent to other processes."""

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
    "ResNet-34 at 32, 64": Size(partial(CifarResNet34, num_classes=100), 32, 64),
    "ResNet-34 at 32, 128": Size(partial(CifarResNet34, num_classes=100), 32, 128),
    "ResNet-34 at 32, 256": Size(partial(CifarResNet34, num_classes=100), 32, 256),
    "ResNet-50 at 224, 256": Size(_resnet50, 224, 256),
    "ViT-B/16 at 224, 128": Size(_vit, 224, 128, channels_last=False),
}
METHODS: dict[str, Callable[[nn.Module], ClassAwareSAM]] = {
    "SGD": lambda m: Plain(m),
    "SAM": lambda m: SAM(m),
    "ImbSAM, auto": lambda m: ImbSAM(m, COUNTS, eta=20),
    "ImbSAM, norm": lambda m: ImbSAM(m, COUNTS, eta=20, perturb="norm"),
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
