"""What a checkpoint is of: read without running code in it, and compared with the model that is to take its weights."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from imbsam import SettingError

NETWORK_SETTINGS = ("backbone", "head", "detector", "stage")
"""The models' settings that say what the weights are of."""

_OF_THE_RUN = ("_class_path", "_instantiator", "num_workers", "predict")
"""Saved settings that say nothing of the data: LightningCLI's marks, this machine's cores, what was predicted."""


def read_checkpoint(path: Path, weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint of Lightning; tensors stay on the disk until they are used.

    Args:
        path: A file, or the folder of a sharded checkpoint, of which everything but weights and optimizer is read.
        weights_only: As in torch.load: read tensors and plain data alone.

    Raises:
        SettingError: It is none: a folder of something else, a zip of something else, weights alone, or a pickle that
            could run code.
    """
    file = path
    if path.is_dir():
        file = path / "meta.pt"  # Lightning's name for it in a sharded checkpoint
        if not file.is_file():
            last = next((p for p in (path / "checkpoints/last.ckpt", path / "last.ckpt") if p.is_file()), None)
            fix = f"name the file: --ckpt_path {last}" if last else "name a file, such as a run's checkpoints/last.ckpt"
            raise SettingError(f"ckpt_path is {path}: it is a folder, not a checkpoint; {fix}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*TorchScript archive.*")  # refused below
            contents = torch.load(file, map_location="cpu", weights_only=weights_only, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise SettingError(
            f"ckpt_path is {path}: it holds {found[1] if found else 'a Python object'} beside tensors and plain data: "
            "reading that could run code, so it is refused; save the checkpoint again without that object"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise SettingError(f"ckpt_path is {path}: it is a file of something else, not a checkpoint") from error
    if isinstance(contents, Mapping) and "pytorch-lightning_version" in contents:
        return dict(contents)
    if isinstance(contents, Mapping) and any(isinstance(value, Tensor) for value in contents.values()):
        raise SettingError(
            f"ckpt_path is {path}: it holds weights alone (a state_dict), not a checkpoint of a run; to start a "
            "training from them set model.backbone_weights instead"
        )
    raise SettingError(f"ckpt_path is {path}: it was not written by Lightning; name a run's checkpoints/last.ckpt")


def class_path(instance: Any) -> str:
    """Where the class of a model or a DataModule is imported from."""
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def describe_classes(model: LightningModule) -> dict[str, str]:
    """For a checkpoint: the classes of the model and of its data, which Lightning keeps for a LightningCLI alone.

    Args:
        model: a model with a Trainer.
    """
    data = getattr(model.trainer, "datamodule", None)
    return {"model_class": class_path(model), **({} if data is None else {"datamodule_class": class_path(data)})}


def saved_classes(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The model and the data of a checkpoint as a configuration.

    Args:
        checkpoint: what :func:`read_checkpoint` gives.

    Returns:
        ``model`` and ``data``, each with ``class_path`` and ``init_args``; without those that the checkpoint does not
        name.
    """
    found = {}
    for name, key, prefix in (("model", "model_class", ""), ("data", "datamodule_class", "datamodule_")):
        settings = dict(checkpoint.get(f"{prefix}hyper_parameters", {}))
        path = settings.get("_class_path") or checkpoint.get(key)
        if path:
            found[name] = {
                "class_path": path,
                "init_args": {k: v for k, v in settings.items() if k not in _OF_THE_RUN},
            }
    return found


def check_model(model: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of another model, before its weights are loaded.

    Args:
        model: the model that is to take the weights.
        checkpoint: the checkpoint.

    Raises:
        SettingError: it is of another class, of another network, or not of imbsam.
    """
    if "class_counts" not in checkpoint:
        raise SettingError(
            f"ckpt_path is a checkpoint that was not written by imbsam: a {type(model).__name__} cannot take its "
            "weights; name a run's checkpoints/last.ckpt"
        )
    saved = saved_classes(checkpoint).get("model")
    if saved is not None:
        check_class(saved["class_path"], [of.__name__ for of in type(model).__mro__])
    settings = saved["init_args"] if saved is not None else checkpoint.get("hyper_parameters", {})
    check_network(settings, model.hparams)


def check_class(saved: str, known: list[str]) -> None:
    """Refuse the checkpoint of a model of another class.

    Args:
        saved: the class path of the checkpoint's model.
        known: names of the model's class and of the classes that it is derived from.

    Raises:
        SettingError: they differ.
    """
    name = saved.rpartition(".")[2]
    if name not in known:
        raise SettingError(
            f"ckpt_path is a checkpoint of {name}, and the model is {known[0]}: use the config.yaml in the "
            "checkpoint's run, or leave --config out where nothing is trained"
        )


def check_network(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse weights of another network.

    Args:
        saved: the model's settings in the checkpoint.
        given: the model's settings.

    Raises:
        SettingError: one of those that say what the weights are of differs.
    """
    for name in NETWORK_SETTINGS:
        if name in saved and name in given and (difference := _difference(name, saved[name], given[name])):
            key, theirs, ours = difference
            raise SettingError(
                f"model.{key} is {ours}, and the checkpoint's is {theirs}: use the config.yaml in the checkpoint's "
                "run, or leave --config out where nothing is trained"
            )


def _difference(key: str, saved: Any, given: Any) -> tuple[str, Any, Any] | None:
    """The first setting in which two choices differ, with both values."""
    if not isinstance(saved, Mapping) or not isinstance(given, Mapping) or saved["class_path"] != given["class_path"]:
        theirs, ours = (c["class_path"].rpartition(".")[2] if isinstance(c, Mapping) else c for c in (saved, given))
        return (key, theirs, ours) if saved != given else None
    settings = (
        (saved["init_args"].get(n), given["init_args"].get(n), n) for n in {**saved["init_args"], **given["init_args"]}
    )
    return next(((f"{key}.{n}", theirs, ours) for theirs, ours, n in settings if theirs != ours), None)


def check_weights(model: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit, in one line in the place of torch's one for each tensor.

    Args:
        model: the model, with its network.
        checkpoint: the checkpoint; one without ``state_dict`` (sharded) is left to torch.

    Raises:
        SettingError: tensors are missing, unknown, or of another shape; it counts them and names the first.
    """
    if "state_dict" not in checkpoint or not model.strict_loading:
        return
    found, own = checkpoint["state_dict"], model.state_dict()
    missing, unknown = [n for n in own if n not in found], [n for n in found if n not in own]
    reshaped = [
        f"{n} {tuple(found[n].shape)} in place of {tuple(own[n].shape)}"
        for n in own
        if n in found and isinstance(own[n], Tensor) and found[n].shape != own[n].shape
    ]
    wrong = {"missing": missing, "unknown": unknown, "of another shape": reshaped}
    if told := [f"{len(names)} {what} ({names[0]})" for what, names in wrong.items() if names]:
        raise SettingError(
            f"ckpt_path is a checkpoint of another {type(model).__name__}: of its weights {', '.join(told)}: use "
            "the config.yaml in the checkpoint's run"
        )
