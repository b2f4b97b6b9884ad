"""Weights of a network from a local file."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from imbsam.errors import SettingError
from lightning_modules.backbones.heads import classifier_name
from lightning_modules.weight_files import mismatch, read_file

__all__ = ["load_weights"]


def load_weights(network: nn.Module, path: str | Path) -> list[str]:
    """Copy a file's weights into a network, and print how many they are.

    Args:
        network: a classification network, with any head; changed in place.
        path: a state_dict (``.pt``, ``.pth``, read with ``weights_only=True``, or ``.safetensors``), on its own or
            under the key "state_dict" or "model"; or a checkpoint of imbsam (``.ckpt``). The prefix ``module.`` of
            ``DataParallel`` is removed.

    Returns:
        the tensors of the classifier that keep their initialisation: all of them if the file's do not fit (another
        number of classes, another head, or none).

    Raises:
        SettingError: the file cannot be read, or another tensor is missing, unknown or of another shape.
    """
    weights, own = _read_state_dict(path), network.state_dict()
    head = classifier_name(network) + "."
    kept = {name: tensor for name, tensor in own.items() if name.startswith(head)}
    if mismatch({name: tensor for name, tensor in weights.items() if name.startswith(head)}, kept):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(head)}
    else:
        kept = {}
    # files of torch before 0.4.1 have no num_batches_tracked
    optional = [name for name in own if name.endswith("num_batches_tracked") and name not in weights]
    if wrong := mismatch(weights, {n: t for n, t in own.items() if n not in kept and n not in optional}):
        raise SettingError(f"backbone_weights is {path}, which does not fit {type(network).__name__}: {wrong}")
    network.load_state_dict(weights, strict=False)
    stays = f"; as initialised: {', '.join(kept)}" if kept else ""
    rank_zero_info(f"backbone_weights: {len(weights)} of {len(own)} tensors from {path}{stays}")
    return list(kept)


def _read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The network's tensors by their names in the network."""
    content = read_file(path, "backbone_weights")
    for key in ("state_dict", "model"):  # where training scripts save the network's state_dict
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise SettingError(f"backbone_weights is {path}: it holds no state_dict; save model.state_dict()")
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if any(name.startswith("backbone.") for name in weights):  # our checkpoints have more than the backbone
        weights = {n.removeprefix("backbone."): t for n, t in weights.items() if n.startswith("backbone.")}
    return {n.removeprefix("module."): t for n, t in weights.items()}
