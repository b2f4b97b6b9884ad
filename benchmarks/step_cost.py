"""The cost of a training step: time and peak memory of every method relative to SGD, measured in one run.

    python benchmarks/step_cost.py                    # the whole table: an hour on one CPU core
    python benchmarks/step_cost.py --short            # about a minute; `make bench`
    python benchmarks/step_cost.py --models resnet32_batchnorm --batches 128 256 --etas 20 --json cost.json

On a GPU it prints the table of `gpu_step_table.py` instead (`--sizes`, `--modes`, `--rounds`, `--json`), unless
CUDA_VISIBLE_DEVICES is empty.

The methods take turns on the same batch, step by step, so that a busy machine slows all of them equally; a ratio is a
method's step over SGD's in the same round, and the table gives its median and quartiles. With one thread on the CPU
(the default) a step's time is the process's CPU time, which other programs do not affect; otherwise it is wall time.
Labels are drawn with CIFAR-100-LT's class counts at ratio 100, so the number of tail samples varies as in training;
images are random. The medians include rounds whose batch has no tail sample.

Columns:
    rows        sharp rows, as a share of the batch (mean over the rounds), and rows of an extra pass (median)
    time        ratio to SGD: median (first to third quartile)
    bookkeeping ascend, restore and everything else outside the passes, as a share of an SGD step (median); not for "by
                hand", which runs its backward passes itself
    memory      peak beyond SGD's peak, in MB; SGD reads its batch directly, the others through `x[rows]`, a copy of it
    copies      parameter-sized copies beyond SGD's one (the gradient), at their peak, between the passes
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_step_cost
import gpu_step_table
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from datamodules import imbalanced_class_counts
from imbsam import CCSAM, GSAM, SAM, SSESAM, ClassAwareSAM, FocalSAM, ImbSAM, reference
from imbsam.class_groups import tail_mask
from lightning_modules.backbones import CifarResNet32

COUNTS = imbalanced_class_counts(500, 100, 100, "exponential")
RHO = 0.05


class SmallViT(nn.Module):
    """A vision transformer for 32 x 32 images: 64 patches of 4 x 4, 4 layers of width 96; 0.5 million parameters."""

    def __init__(self, num_classes: int, width: int = 96, layers: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(64, width))
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) to logits (B, num_classes)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.fc(self.layers(tokens).mean(dim=1))
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet32_batchnorm": lambda: CifarResNet32(num_classes=100),
    "resnet32_groupnorm": lambda: CifarResNet32(num_classes=100, norm="group"),
    "vit": lambda: SmallViT(num_classes=100),
}


class Passes:
    """The forward and backward passes of a step, and their time."""

    def __init__(self, model: nn.Module, clock: Callable[[], float]) -> None:
        self.model = model
        self.seconds = 0.0
        self.rows = 0
        self._clock = clock

    @contextmanager
    def timed(self, graph_alive: bool) -> Iterator[None]:
        """Time the block as a pass, which leaves a graph alive or not."""
        start = self._clock()
        with record_function("pass, graph alive" if graph_alive else "pass, graph freed"):
            yield
        self.seconds += self._clock() - start

    def losses(self, x: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
        """Per-sample losses of `rows`, shape (R,), or of all rows without indexing."""
        with self.timed(graph_alive=True):
            if rows is not None:
                x, y = x[rows], y[rows]
            self.rows = len(x)
            return F.cross_entropy(self.model(x), y, reduction="none")

    def backward(self, loss: Tensor, **options: Any) -> None:
        """The backward pass of `loss`."""
        with self.timed(graph_alive="retain_graph" in options):
            torch.autograd.backward(loss, **options)


CHEAPER: dict[str, dict[str, Any]] = {
    "split": {"first_pass": "split"},
    "norm": {"perturb": "norm"},
    "classifier": {"perturb": "classifier"},
    "split, norm": {"first_pass": "split", "perturb": "norm"},
    "split, classifier": {"first_pass": "split", "perturb": "classifier"},
}

Step = Callable[[Passes, Tensor, Tensor], None]
"""Leaves in `.grad` the gradient for images (B, 3, 32, 32) and labels (B,)."""


def plain(passes: Passes, x: Tensor, y: Tensor) -> None:
    """A step of SGD."""
    passes.backward(passes.losses(x, y).mean())


def engine(sam: ClassAwareSAM) -> Step:
    """A step of this library."""

    def step(passes: Passes, x: Tensor, y: Tensor) -> None:
        sam.backward(lambda rows: passes.losses(x, y, rows), y, backward=passes.backward)

    return step


def by_hand(tail: Tensor) -> Step:
    """The published algorithm without this library, `imbsam.reference`: the yardstick of `context_rows="batch"`."""

    def step(passes: Passes, x: Tensor, y: Tensor) -> None:
        if not tail[y].any():
            plain(passes, x, y)
            return
        reference.backward(lambda: passes.losses(x, y), list(passes.model.parameters()), tail[y].float(), rho=RHO)

    return step


def methods(model: nn.Module, etas: list[int], context_rows: list[int]) -> dict[str, Step]:
    """The steps to compare, SGD first, by their names in the table."""
    batch_norm = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    steps = {"SGD": plain, "SAM": engine(SAM(model, rho=RHO)), "Focal-SAM": engine(FocalSAM(model, COUNTS, rho=RHO))}
    family = {"GSAM": GSAM, "SSE-SAM": SSESAM, "CC-SAM": CCSAM}
    steps |= {name: engine(method(model, COUNTS, rho=RHO)) for name, method in family.items()}
    for eta in etas:
        steps[f"eta {eta}: published, by hand"] = by_hand(tail_mask(torch.tensor(COUNTS), eta))
        for k in ("batch", "auto", *(context_rows if batch_norm else [])):
            steps[f"eta {eta}: ImbSAM, {k}"] = engine(ImbSAM(model, COUNTS, eta=eta, rho=RHO, context_rows=k))
        for name, settings in CHEAPER.items():
            steps[f"eta {eta}: ImbSAM, {name}"] = engine(ImbSAM(model, COUNTS, eta=eta, rho=RHO, **settings))
    return steps


@dataclass
class Cost:
    """The measurements of one method."""

    seconds: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    """Seconds outside the passes, without the optimizer's step."""
    rows: list[int] = field(default_factory=list)
    """Rows of the last pass."""
    peak: int = 0
    """Bytes at the peak of a step."""
    peak_between: int = 0
    """Bytes at the peak while no graph is alive."""


def host_memory(step: Callable[[], object]) -> tuple[int, int]:
    """Peak bytes that a step allocates on the CPU, and their peak while no graph is alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    passes = sorted((e.start_ns(), e.duration_ns(), e.name()) for e in events if e.name().startswith("pass, "))
    live = peak = between = 0
    for e in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += e.nbytes()
        peak = max(peak, live)
        start, duration, name = max((p for p in passes if p[0] <= e.start_ns()), default=(0, 0, "pass, graph freed"))
        # at an allocation: a pass along some parameters alone leaves its graph to be freed right after it
        if e.nbytes() > 0 and e.start_ns() > start + duration and name == "pass, graph freed":
            between = max(between, live)
    return peak, between


def measure(
    model: nn.Module, steps: dict[str, Step], batch: int, rounds: int, seed: int = 0
) -> tuple[dict[str, Cost], list[Tensor]]:
    """Let the methods take turns, `rounds` times.

    Returns:
        The cost of each method, and the labels of each round.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor(COUNTS, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    costs = {name: Cost() for name in steps}
    drawn: list[Tensor] = []

    def run(name: str, x: Tensor, y: Tensor) -> tuple[Passes, float, float]:
        passes = Passes(model, clock)
        start = clock()
        steps[name](passes, x, y)
        outside = clock() - start - passes.seconds
        optimizer.step()
        optimizer.zero_grad()
        return passes, clock() - start, outside

    def draw() -> tuple[Tensor, Tensor]:
        y = torch.multinomial(shares, batch, replacement=True, generator=generator)
        return torch.randn(batch, 3, 32, 32, generator=generator), y

    names = list(steps)
    for round_ in range(-1, rounds):
        x, y = draw()
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            passes, seconds, outside = run(name, x, y)
            if round_ >= 0:  # the first round warms up
                costs[name].seconds.append(seconds)
                costs[name].outside.append(outside)
                costs[name].rows.append(passes.rows)
        if round_ >= 0:
            drawn.append(y)
    # memory with the usual number of tail rows: 3 % of classes below 20, 16 % of classes from 20 to 99
    y = torch.full((batch,), 60).index_fill(0, torch.arange(max(1, 3 * batch // 100)), 99)
    y[19 * batch // 100 :] = 0
    for name, cost in costs.items():
        step = functools.partial(run, name, x, y)
        cost.peak, cost.peak_between = host_memory(step)
    return costs, drawn


def table_rows(
    setting: dict[str, Any], model: nn.Module, costs: dict[str, Cost], drawn: list[Tensor]
) -> list[dict[str, Any]]:
    """The measurements as ratios to SGD, one dict for each method."""
    sgd = costs["SGD"]
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    table = []
    for name, cost in costs.items():
        ratios = [a / b for a, b in zip(cost.seconds, sgd.seconds, strict=True)]
        eta = int(name.split()[1].rstrip(":")) if name.startswith("eta") else None
        tail = tail_mask(torch.tensor(COUNTS), eta) if eta else torch.full((len(COUNTS),), name != "SGD")
        shares = [float(tail[y].double().mean()) for y in drawn]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        table.append(
            {
                **setting,
                "method": name,
                "sharp": statistics.mean(shares),
                "pass_rows": statistics.median(cost.rows),
                "seconds": statistics.median(cost.seconds),
                "time": statistics.median(ratios),
                "mean_time": sum(cost.seconds) / sum(sgd.seconds),
                "quartiles": [quartiles[0], quartiles[2]],
                "bookkeeping": None
                if "by hand" in name
                else statistics.median(a / b for a, b in zip(cost.outside, sgd.seconds, strict=True)),
                "memory_mb": (cost.peak - sgd.peak) / 1e6,
                "copies": cost.peak_between / parameters - 1 if cost.peak_between else None,
            }
        )
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """One Markdown table for each model and batch."""
    lines: list[str] = []
    last = None
    for row in table:
        heading = (
            f"{row['model']}, batch {row['batch']}, {row['device']}: SGD {1000 * row['sgd_seconds']:,.1f} ms a step, "
            f"{row['sgd_peak_mb']:,.1f} MB at its peak, parameters {row['parameters_mb']:.2f} MB, "
            f"{row['rounds']} rounds"
        )
        if heading != last:
            lines += ["", f"**{heading}**", ""]
            lines += ["| method | sharp rows | rows of a pass | time / SGD | bookkeeping | memory | copies |"]
            lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
            last = heading
        low, high = row["quartiles"]
        copies = "" if row["copies"] is None else f"{row['copies']:.2f}"
        bookkeeping = "" if row["bookkeeping"] is None else f"{100 * row['bookkeeping']:.1f} %"
        lines.append(
            f"| {row['method']} | {100 * row['sharp']:.0f} % | {row['pass_rows']:.0f} | {row['time']:.2f} "
            f"({low:.2f} to {high:.2f}) | {bookkeeping} | {row['memory_mb']:+.1f} MB | {copies} |"
        )
    return "\n".join(lines).strip()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--etas", nargs="+", type=int, default=[20, 100])
    parser.add_argument("--context-rows", nargs="*", type=int, default=[16, 64], help="in addition to batch and auto")
    parser.add_argument("--methods", nargs="+", help="only the methods whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--short", action="store_true", help="about a minute: one batch size, few methods")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--sizes", nargs="+", choices=list(gpu_step_cost.SIZES), default=list(gpu_step_cost.SIZES))
    parser.add_argument("--modes", nargs="+", choices=gpu_step_cost.MODES, default=gpu_step_cost.MODES, help="on a GPU")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        sizes = {name: gpu_step_cost.SIZES[name] for name in arguments.sizes}
        rows = gpu_step_table.table(sizes, arguments.modes, arguments.rounds, torch.device("cuda", 0))
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1))
        return
    if arguments.short:
        arguments.batches, arguments.etas, arguments.context_rows, arguments.rounds = [64], [20], [], 3
        arguments.methods = arguments.methods or ["ImbSAM", "by hand"]
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler on standard error
    device = f"CPU, {arguments.threads} thread(s)"
    table: list[dict[str, Any]] = []
    for name in arguments.models:
        for batch in arguments.batches:
            torch.manual_seed(0)
            model = MODELS[name]()
            steps = methods(model, arguments.etas, arguments.context_rows)
            if arguments.methods:
                wanted = ("SGD", *arguments.methods)
                steps = {k: v for k, v in steps.items() if any(part in k for part in wanted)}
            costs, drawn = measure(model, steps, batch, arguments.rounds)
            setting = {
                "model": name,
                "batch": batch,
                "device": device,
                "rounds": arguments.rounds,
                "sgd_seconds": statistics.median(costs["SGD"].seconds),
                "sgd_peak_mb": costs["SGD"].peak / 1e6,
                "parameters_mb": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
            }
            new = table_rows(setting, model, costs, drawn)
            print(markdown(new) + "\n", flush=True)
            table += new
            if arguments.json:
                arguments.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
