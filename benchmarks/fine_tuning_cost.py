"""What a step of fine-tuning costs: each way of choosing what is trained (`model.tune`), with each method.

    python benchmarks/fine_tuning_cost.py
    python benchmarks/fine_tuning_cost.py --network tf_efficientnet_lite0 --rounds 5 --image-size 64

Networks are timm's, with random weights, which cost what pretrained ones do. Labels are drawn from CIFAR-100-LT's class
counts, ratio 100; eta is 20. A step is the backward pass of the method, the step of SGD with momentum and
``zero_grad``. All rows take turns on the same batch, so that a busy machine slows them equally; a ratio is a row's time
over that of SGD on the whole network in the same round, and the table gives its median. Times are the process's CPU
time, one thread.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules import imbalanced_class_counts
from imbsam import SAM, ImbSAM, Plain
from lightning_modules.backbones import Timm
from lightning_modules.tuning import AdaptFormer, All, HeadOnly, LastBlocks, LoRA, Norm, Tuning

CLASSES = 100
TUNINGS: dict[str, Tuning] = {
    "everything": All(),
    "last block": LastBlocks(n=1),
    "norm": Norm(),
    "lora": LoRA(rank=8, alpha=16),
    "adaptformer": AdaptFormer(bottleneck=4, scale=1.0, learn_scale=True),
    "head": HeadOnly(),
}
METHODS: dict[str, Callable[..., Any]] = {"SGD": Plain, "SAM": SAM, "ImbSAM": ImbSAM}


class Row:
    """A network, tuned in one way, with an optimizer and a method.

    Args:
        network: of random weights.
        tuning: what is trained.
        method: the class of the engine.
        counts: of the classes.
    """

    def __init__(self, network: nn.Module, tuning: Tuning, method: Callable[..., Any], counts: Tensor) -> None:
        self.network, self.tuning = network, tuning
        tuning.apply(network)
        tuning.set_modes(network.train())
        self.trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, lr=1e-3, momentum=0.9)
        self.engine = method(network, class_counts=counts, **({"eta": 20} if method is ImbSAM else {}))

    def step(self, x: Tensor, y: Tensor) -> float:
        """Its CPU time in seconds."""
        start = time.process_time()
        self.engine.backward(lambda rows: F.cross_entropy(self.network(x[rows]), y[rows], reduction="none"), y)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def fits(name: str, tuning: Tuning, network: nn.Module) -> bool:
    """Whether the network has what the tuning adapts; the reason is printed if not."""
    try:
        tuning.apply(copy.deepcopy(network))
    except ValueError as error:
        print(f"{name} is left out: {error}")
        return False
    return True


def main() -> None:
    """Measure, and print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="vit_small_patch16_224", help="timm's name")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = {"img_size": arguments.image_size} if "vit" in arguments.network else {}
    network = Timm(arguments.network, settings)(CLASSES)
    counts = torch.as_tensor(imbalanced_class_counts(500, CLASSES, 100, "exponential"))
    rows = {
        (name, title): Row(copy.deepcopy(network), tuning, method, counts)
        for name, tuning in TUNINGS.items()
        if fits(name, tuning, network)
        for title, method in METHODS.items()
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in rows}
    for round_ in range(-1, arguments.rounds):
        x = torch.rand(arguments.batch, 3, arguments.image_size, arguments.image_size)
        y = torch.multinomial(counts.double(), arguments.batch, replacement=True)
        for key, row in rows.items():
            taken = row.step(x, y)
            if round_ >= 0:  # the first one warms up
                seconds[key].append(taken)
    whole = seconds["everything", "SGD"]
    print(f"{arguments.network}, {arguments.image_size} pixels, batch {arguments.batch}, ", end="")
    print(f"SGD on everything {1000 * statistics.median(whole):,.0f} ms a step, {arguments.rounds} rounds\n")
    print("| trained | parameters | " + " | ".join(METHODS) + " |\n| :-- |" + " --: |" * (1 + len(METHODS)))
    for name in dict.fromkeys(key[0] for key in rows):
        trained = sum(parameter.numel() for parameter in rows[name, "SGD"].trained)
        of_methods = (seconds[name, title] for title in METHODS)
        ratios = (statistics.median(a / b for a, b in zip(of, whole, strict=True)) for of in of_methods)
        print(f"| {name} | {trained:,} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
