"""What a checkpoint holds, compared with the model that loads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from imbsam import SettingError
from imbsam.report.runs import flatten
from lightning_modules.weight_files import mismatch, read_file

NETWORK_SETTINGS = ("backbone", "head", "tune", "detector", "stage")
"""The models' settings that decide which weights there are."""


def read_checkpoint(path: Path, weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint of Lightning; tensors stay on the disk until they are used.

    Args:
        path: A file, or the folder of a sharded checkpoint, of which everything but weights and optimizer is read.
        weights_only: As in torch.load: read only tensors and plain data.

    Raises:
        SettingError: It is not one: another folder or file, only weights, or a pickle that could run code.
    """
    file = path
    if path.is_dir():
        file = path / "meta.pt"  # Lightning's name for it in a sharded checkpoint
        if not file.is_file():
            last = next((p for p in (path / "checkpoints/last.ckpt", path / "last.ckpt") if p.is_file()), None)
            fix = f"name the file: --ckpt_path {last}" if last else "name a file, such as a run's checkpoints/last.ckpt"
            raise SettingError(f"ckpt_path is {path}: it is a folder, not a checkpoint; {fix}")
    contents = read_file(file, "ckpt_path", weights_only, mmap=True)
    if isinstance(contents, Mapping) and "pytorch-lightning_version" in contents:
        return dict(contents)
    if isinstance(contents, Mapping) and any(isinstance(value, Tensor) for value in contents.values()):
        raise SettingError(
            f"ckpt_path is {path}: it holds only weights (a state_dict), not a checkpoint of a run; to start a "
            "training from them set model.backbone_weights instead"
        )
    raise SettingError(f"ckpt_path is {path}: it was not written by Lightning; name a run's checkpoints/last.ckpt")


def describe_classes(model: LightningModule) -> dict[str, str]:
    """The class paths of a model and its data, for its checkpoint: Lightning saves them only for a LightningCLI.

    Args:
        model: a model with a Trainer.
    """
    parts = {"model_class": model, "datamodule_class": getattr(model.trainer, "datamodule", None)}
    return {
        key: f"{type(part).__module__}.{type(part).__qualname__}" for key, part in parts.items() if part is not None
    }


def saved_classes(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The model and the data of a checkpoint as a config.

    Args:
        checkpoint: from :func:`read_checkpoint`.

    Returns:
        ``model`` and ``data``, each with ``class_path`` and ``init_args``, if the checkpoint has them.
    """
    # LightningCLI's marks, the cores of the machine, what was predicted
    left_out = ("_class_path", "_instantiator", "num_workers", "predict")
    classes = {}
    for name, key, prefix in (("model", "model_class", ""), ("data", "datamodule_class", "datamodule_")):
        settings = checkpoint.get(f"{prefix}hyper_parameters", {})
        if path := settings.get("_class_path") or checkpoint.get(key):
            init_args = {k: v for k, v in settings.items() if k not in left_out}
            classes[name] = {"class_path": path, "init_args": init_args}
    return classes


def check_model(model: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of another model or network, before its weights are loaded.

    Args:
        model: the model that loads the checkpoint.
        checkpoint: the checkpoint.

    Raises:
        SettingError: it is of another class, of another network, or not of imbsam.
    """
    if "class_counts" not in checkpoint:
        raise SettingError(
            f"ckpt_path is a checkpoint that was not written by imbsam: a {type(model).__name__} cannot load its "
            "weights; name a run's checkpoints/last.ckpt"
        )
    if "model" in (saved := saved_classes(checkpoint)):
        check_class(saved["model"]["class_path"], [cls.__name__ for cls in type(model).__mro__])
    settings, own = checkpoint.get("hyper_parameters", {}), model.hparams
    names = [name for name in NETWORK_SETTINGS if name in settings and name in own]
    theirs, ours = (flatten({name: choices[name] for name in names}, "model") for choices in (settings, own))
    for key in {**theirs, **ours}:
        if theirs.get(key) != ours.get(key):
            raise SettingError(
                f"{key} is {ours.get(key)}, and the checkpoint's is {theirs.get(key)}: use the config.yaml in the "
                "checkpoint's run, or leave --config out if nothing is trained"
            )


def check_class(saved: str, known: list[str]) -> None:
    """Refuse the checkpoint of a model of another class.

    Args:
        saved: the class path of the checkpoint's model.
        known: names of the model's class and of its base classes.

    Raises:
        SettingError: they differ.
    """
    name = saved.rpartition(".")[2]
    if name not in known:
        raise SettingError(
            f"ckpt_path is a checkpoint of {name}, and the model is {known[0]}: use the config.yaml in the "
            "checkpoint's run, or leave --config out if nothing is trained"
        )


def check_weights(model: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit, in one line instead of torch's many.

    Args:
        model: the model, with its network.
        checkpoint: the checkpoint; one without ``state_dict`` (sharded) is left to torch.

    Raises:
        SettingError: tensors are missing, unknown, or of another shape; it counts them and names the first.
    """
    if "state_dict" not in checkpoint or not model.strict_loading:
        return
    if wrong := mismatch(checkpoint["state_dict"], model.state_dict()):
        raise SettingError(
            f"ckpt_path is a checkpoint of another {type(model).__name__}: of its weights {wrong}: use the config.yaml "
            "in the checkpoint's run"
        )
