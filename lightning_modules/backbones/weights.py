"""Weights of a network from a local file or folder, or from the library that it is of."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from imbsam.errors import SettingError
from lightning_modules.backbones.heads import classifier_name
from lightning_modules.backbones.library import LibraryNetwork, MissingWeights, tag_of
from lightning_modules.backbones.network import BackboneCallable
from lightning_modules.backbones.positions import is_positional_embedding, resample_positions
from lightning_modules.weight_files import mismatch, read_file

__all__ = ["load_weights", "read_weights"]

PICKLE = "pickle:"
"""Before the path of a file that may run code."""


def load_weights(network: nn.Module, source: str | Path, backbone: BackboneCallable | None = None) -> list[str]:
    """Copy weights into a network, and print how many they are.

    A positional embedding of another image size is interpolated. Nothing is copied before everything fits.

    Args:
        network: a classification network, with any head; changed in place.
        source: see :func:`read_weights`.
        backbone: what has built the network.

    Returns:
        the tensors of the classifier that keep their initialisation: all of them if the file's do not fit (another
        number of classes, another head, or none).

    Raises:
        SettingError: the weights cannot be read, or another tensor is missing, unknown or of another shape.
    """
    weights, own = read_weights(source, backbone), network.state_dict()
    if hasattr(network, "from_library"):
        weights = network.from_library(weights)  # type: ignore[operator]
    head = classifier_name(network) + "."
    kept = {name: tensor for name, tensor in own.items() if name.startswith(head)}
    theirs = {name: tensor for name, tensor in weights.items() if name.startswith(head)}
    if mismatch(theirs, kept):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(head)}
    else:
        kept = {}
    resampled = _resample(weights, own)
    # files of torch before 0.4.1 have no num_batches_tracked
    optional = [name for name in own if name.endswith("num_batches_tracked") and name not in weights]
    if wrong := mismatch(weights, {n: t for n, t in own.items() if n not in kept and n not in optional}):
        raise SettingError(f"backbone_weights is {source}, which does not fit {_kind_of(network)}: {wrong}")
    network.load_state_dict(weights, strict=False)
    stays = f"; as initialised: {', '.join(kept)}" if kept else ""
    if kept and theirs:
        stays += f" (the head there has {len(next(iter(theirs.values())))} classes)"
    rank_zero_info(f"backbone_weights: {len(weights)} of {len(own)} tensors from {source}{stays}")
    for line in resampled:
        rank_zero_info(f"backbone_weights: {line}")
    return list(kept)


def read_weights(source: str | Path, backbone: BackboneCallable | None = None) -> dict[str, Tensor]:
    """Read weights.

    Args:
        source: ``pretrained`` or ``pretrained:TAG``, the library's own, from its cache or downloaded; or a folder that
            the library saved; or a file: a state_dict (``.pt``, ``.pth``, read with ``weights_only=True``, or
            ``.safetensors``), on its own or under the key "state_dict" or "model", or a checkpoint of imbsam
            (``.ckpt``). ``pickle:FILE`` runs the code in the file. The prefix ``module.`` of ``DataParallel`` is
            removed.
        backbone: what builds the network, for the first two.

    Returns:
        Tensors by their names.

    Raises:
        SettingError: they cannot be read.
    """
    if str(source).partition(":")[0] == "pretrained":
        if not isinstance(backbone, LibraryNetwork):
            raise SettingError(
                f"backbone_weights is {source}, and the backbone is of no library that has weights: name a file"
            )
        return backbone.pretrained(tag_of(str(source)))
    if isinstance(backbone, LibraryNetwork) and (folder := backbone.folder_of(Path(source))) is not None:
        return backbone.read_folder(folder)
    return _read_state_dict(str(source))


def _resample(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Interpolate positional embeddings that are of another size, in place; returns a line for each."""
    lines = []
    for name, tensor in own.items():
        found = weights.get(name)
        if found is None or found.shape == tensor.shape or not is_positional_embedding(name):
            continue
        if found.dim() == tensor.dim() and found.shape[-1] == tensor.shape[-1]:
            resampled = resample_positions(found, tensor.shape[-2])
            if resampled is not None:
                weights[name] = resampled
                lines.append(f"{name} interpolated from {found.shape[-2]} positions to {tensor.shape[-2]}")
    return lines


def _read_state_dict(source: str) -> dict[str, Tensor]:
    """The network's tensors by their names in the network."""
    path = source.removeprefix(PICKLE)
    if not Path(path).exists():
        raise MissingWeights(f"backbone_weights is {path}: there is no such file")
    trusted = f"save it again without that object, or, if you trust it, name it {PICKLE}{path}"
    content = read_file(path, "backbone_weights", weights_only=path == source, instead=trusted)
    for key in ("state_dict", "model"):  # where training scripts save the network's state_dict
        if isinstance(content, Mapping) and isinstance(content.get(key), (Mapping, nn.Module)):
            content = content[key]
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise SettingError(f"backbone_weights is {path}: it holds no state_dict; save model.state_dict()")
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if any(name.startswith("backbone.") for name in weights):  # our checkpoints have more than the backbone
        weights = {n.removeprefix("backbone."): t for n, t in weights.items() if n.startswith("backbone.")}
    return {n.removeprefix("module."): t for n, t in weights.items()}


def _kind_of(network: nn.Module) -> str:
    """The class that a user knows."""
    inside = getattr(network, "model", None) if hasattr(network, "from_library") else None
    return type(inside if isinstance(inside, nn.Module) else network).__name__
