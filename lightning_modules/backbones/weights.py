"""Weights of a network from a local file or folder, or from the library that it is of."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from imbsam.errors import SettingError
from imbsam.messages import first_few
from lightning_modules.backbones.heads import classifier_name
from lightning_modules.backbones.library import LibraryNetwork, MissingWeights, tag_of
from lightning_modules.backbones.network import BackboneCallable
from lightning_modules.backbones.positions import is_positional_embedding, resample_positions, why_not_interpolated
from lightning_modules.weight_files import FROZEN_WEIGHTS, is_adapter, mismatch, read_file

__all__ = ["PretrainedWeights", "copy_weights", "read_weights"]

PICKLE = "pickle:"
"""Before the path of a file that may run code."""


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights, and what is known of them.

    Attributes:
        source: where they are from, see :func:`read_weights`.
        tensors: by their names.
        backbone: what builds the network.
        checkpoint: what else is in a checkpoint of imbsam, None for other files.
    """

    source: str
    tensors: dict[str, Tensor]
    backbone: BackboneCallable | None = None
    checkpoint: Mapping[str, Any] | None = None

    @property
    def adapted(self) -> bool:
        """Whether LoRA or AdaptFormer have added some of them."""
        return any(map(is_adapter, self.tensors))

    @property
    def of_library(self) -> bool:
        """Whether they are the library's own."""
        return _is_pretrained(self.source)

    def preprocessing(self) -> dict[str, Any]:
        """Image size, mean and std that they were trained on, see :meth:`LibraryNetwork.preprocessing`; {} if unknown.

        A checkpoint has those of its training's images.
        """
        library = self.backbone if isinstance(self.backbone, LibraryNetwork) else None
        if self.checkpoint is None:
            return {} if library is None else library.preprocessing(self.source)
        known = dict(self.checkpoint.get("preprocessing") or {})
        if known and library is not None and (size := library.size_setting) is not None:
            known["image_size"] = size  # the positions are interpolated
        return known


def copy_weights(
    network: nn.Module, pretrained: PretrainedWeights, class_names: Sequence[str] | None = None
) -> list[str]:
    """Copy weights into a network, and print how many they are.

    A positional embedding of another image size is interpolated. Nothing is copied before everything fits.

    Args:
        network: a classification network, with any head; changed in place.
        pretrained: the weights.
        class_names: the data's, which a checkpoint of imbsam must share for its classifier to be taken; None for any.

    Returns:
        the tensors of the classifier that keep their initialisation. These are all of them if the others do not fit
        (another number of classes, another head, or none), are the library's, or are for other classes.

    Raises:
        SettingError: another tensor is missing, unknown or of another shape: they are of another network, or not of a
            whole one.
    """
    weights, own = dict(pretrained.tensors), network.state_dict()
    if hasattr(network, "from_library"):
        weights = network.from_library(weights)  # type: ignore[operator]
    head = classifier_name(network) + "."
    kept = {name: tensor for name, tensor in own.items() if name.startswith(head)}
    theirs = {name: tensor for name, tensor in weights.items() if name.startswith(head)}
    if why := _refused_classifier(theirs, kept, pretrained, class_names):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(head)}
    else:
        kept = {}
    resampled = _resample(weights, own)
    # files of torch before 0.4.1 have no num_batches_tracked
    optional = [name for name in own if name.endswith("num_batches_tracked") and name not in weights]
    needed = {n: t for n, t in own.items() if n not in kept and n not in optional}
    if wrong := mismatch(weights, needed):
        _refuse_tuned_part(weights.keys() - needed.keys(), pretrained)
        others = (n for n in needed if n in weights and weights[n].shape != needed[n].shape)
        reason = next(filter(None, map(why_not_interpolated, others)), "")
        raise SettingError(
            f"backbone_weights is {pretrained.source}, which does not fit {_kind_of(network, pretrained.backbone)}: "
            f"{wrong}{reason}"
        )
    network.load_state_dict(weights, strict=False)
    stays = f"; as initialised: {', '.join(kept)}{why if theirs else ''}" if kept else ""
    rank_zero_info(f"backbone_weights: {len(weights)} of {len(own)} tensors from {pretrained.source}{stays}")
    if not kept and pretrained.checkpoint is None:
        rank_zero_info(
            f"backbone_weights: its classifier too: {', '.join(theirs)}; if it was trained on these classes with more "
            "images than you have, as ImageNet's is for ImageNet-LT, remove it from the file"
        )
    elif not kept:
        rank_zero_info(f"backbone_weights: its classifier too: {', '.join(theirs)}, for the same classes")
    for line in resampled:
        rank_zero_info(f"backbone_weights: {line}")
    return list(kept)


def read_weights(source: str | Path, backbone: BackboneCallable | None = None) -> PretrainedWeights:
    """Read weights.

    Args:
        source: ``pretrained`` or ``pretrained:TAG``, the library's own, from its cache or downloaded; or a folder that
            the library saved; or a file: a state_dict (``.pt``, ``.pth``, read with ``weights_only=True``, or
            ``.safetensors``), on its own or under the key "state_dict" or "model", or a checkpoint of imbsam
            (``.ckpt``). ``pickle:FILE`` runs the code in the file. The prefix ``module.`` of ``DataParallel`` is
            removed.
        backbone: what builds the network, for the first two.

    Raises:
        SettingError: they cannot be read.
    """
    text = str(source)
    if _is_pretrained(text):
        if not isinstance(backbone, LibraryNetwork):
            raise SettingError(
                f"backbone_weights is {source}, and the backbone is of no library that has weights: name a file"
            )
        return PretrainedWeights(text, backbone.pretrained(tag_of(text)), backbone)
    if isinstance(backbone, LibraryNetwork) and (folder := backbone.folder_of(Path(source))) is not None:
        return PretrainedWeights(text, backbone.read_folder(folder), backbone)
    content = _read_content(text)
    of_imbsam = isinstance(content, Mapping) and {"class_names", "hyper_parameters"} <= content.keys()
    checkpoint = {key: value for key, value in content.items() if key != "state_dict"} if of_imbsam else None
    return PretrainedWeights(text, _tensors(content, text), backbone, checkpoint)


def _is_pretrained(source: str) -> bool:
    return source.partition(":")[0] == "pretrained"


def _refused_classifier(
    theirs: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    pretrained: PretrainedWeights,
    class_names: Sequence[str] | None,
) -> str:
    """Why a classifier is not taken, in parentheses; "" if it is."""
    number = len(next(iter(theirs.values()), ()))
    if mismatch(theirs, own):
        return f" (the head there has {number} classes)"
    if pretrained.of_library:  # for other classes; or for the data's, with the images that a long tail leaves out
        return f" (the head there is for the library's {number} classes)"
    trained = None if pretrained.checkpoint is None else list(pretrained.checkpoint["class_names"])
    if class_names is not None and trained is not None and trained != list(class_names):
        return f" (the head there is for other classes, or in another order: {first_few(trained, 3)})"
    return ""


def _refuse_tuned_part(unknown: Iterable[str], pretrained: PretrainedWeights) -> None:
    """Say that weights do not fit because a training with ``tune`` has left or added some."""
    saved = pretrained.checkpoint or {}
    if FROZEN_WEIGHTS in saved:
        raise SettingError(
            f"backbone_weights is {pretrained.source}: a checkpoint of the trained part alone (tune.save_frozen is "
            "false): resume that run with --ckpt_path, or let a run save all weights (tune.save_frozen: true)"
        )
    if any(map(is_adapter, unknown)):
        base = saved.get("hyper_parameters", {}).get("backbone_weights")
        raise SettingError(
            f"backbone_weights is {pretrained.source}, which has layers of LoRA or AdaptFormer: set model.tune as in "
            f"the run that trained them{f', or start from what it started from, {base}' if base else ''}"
        )


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


def _read_content(source: str) -> Any:
    """What is in a file."""
    path = source.removeprefix(PICKLE)
    if not Path(path).exists():
        raise MissingWeights(f"backbone_weights is {path}: there is no such file")
    trusted = f"save it again without that object, or, if you trust it, name it {PICKLE}{path}"
    return read_file(path, "backbone_weights", weights_only=path == source, instead=trusted)


def _tensors(content: Any, source: str) -> dict[str, Tensor]:
    """The network's tensors by their names in the network."""
    for key in ("state_dict", "model"):  # where training scripts save the network's state_dict
        if isinstance(content, Mapping) and isinstance(content.get(key), (Mapping, nn.Module)):
            content = content[key]
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise SettingError(
            f"backbone_weights is {source.removeprefix(PICKLE)}: it holds no state_dict; save model.state_dict()"
        )
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if any(name.startswith("backbone.") for name in weights):  # our checkpoints have more than the backbone
        weights = {n.removeprefix("backbone."): t for n, t in weights.items() if n.startswith("backbone.")}
    return {n.removeprefix("module."): t for n, t in weights.items()}


def _kind_of(network: nn.Module, backbone: BackboneCallable | None) -> str:
    """The name that a user knows."""
    if isinstance(backbone, LibraryNetwork):
        return f"{type(backbone).__name__} {backbone.name}"
    return type(network).__name__
