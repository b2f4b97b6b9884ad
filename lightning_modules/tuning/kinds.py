"""How many parameters of which kind are trained."""

from torch import nn

from imbsam.errors import SettingError
from imbsam.parameters import is_normalisation
from lightning_modules.backbones.heads import classifier_name
from lightning_modules.weight_files import is_adapter

KINDS = ("classifier", "adapters", "normalisation", "biases", "weights")


def count_by_kind(network: nn.Module) -> dict[str, tuple[int, int]]:
    """The number of trained and of frozen parameters of each kind, which are disjoint.

    Args:
        network: a classification network.

    Returns:
        For the kinds that there are, in the order of :data:`KINDS`.

    Example:
        >>> from lightning_modules.backbones import SmallCNN
        >>> count_by_kind(SmallCNN(num_classes=10, width=4).requires_grad_(False))["classifier"]
        (0, 90)
    """
    try:
        head = classifier_name(network) + "."
    except SettingError:  # it has none that can be replaced
        head = "."
    counts = {kind: [0, 0] for kind in KINDS}
    for prefix, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}"
            if full.startswith(head):
                kind = "classifier"
            elif is_adapter(full):
                kind = "adapters"
            elif is_normalisation(module):
                kind = "normalisation"
            else:
                kind = "biases" if name.endswith("bias") else "weights"
            counts[kind][not parameter.requires_grad] += parameter.numel()
    return {kind: (trained, frozen) for kind, (trained, frozen) in counts.items() if trained or frozen}
