"""Features of every sample by a network, and the file that keeps them."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from datamodules.base.long_tailed import LongTailedDataModule
from datamodules.features.files import Features, read_features, write_features
from imbsam.errors import SettingError
from lightning_modules.features.weights import weights_digest
from lightning_modules.weight_files import digest, is_adapter

AS_USED = ("root", "num_workers", "batch_size", "eval_batch_size", "predict", "sampling", "mixup", "cutmix")
"""Settings of the data that features without augmentation do not depend on: where they are, and how they are drawn."""

AUGMENTATION = ("augment", "color_jitter")

COMPARED = 8
"""Inputs of training and test part whose pixels are in the hash: another size or normalization makes another file."""


class FeatureExtraction:
    """The inputs of a network's classifier, for all parts of a DataModule.

    Args:
        model: a classifier (LongTailedClassifier) with its network.
        data: the DataModule, set up.
        copies: augmented copies of every training sample, beside the one without augmentation.
        device: where the network runs.
        context: a context manager for the forward, of the Trainer's precision.

    Raises:
        SettingError: the data cannot give what is asked for.
    """

    def __init__(
        self, model: Any, data: Any, copies: int, device: torch.device, context: Callable[[], Any], show: bool
    ) -> None:
        if not hasattr(data, "train_eval_dataloader"):
            raise SettingError(
                f"the data ({type(data).__name__}) has no train_eval_dataloader: use a LongTailedDataModule, or give "
                "yours one that neither shuffles nor augments"
            )
        if copies and not isinstance(data, LongTailedDataModule):
            raise SettingError(f"copies is {copies}: only a LongTailedDataModule has augmented copies: set it to 0")
        self.model, self.data, self.copies = model, data, copies
        self.device, self.context, self.show = device, context, show

    def description(self) -> dict[str, Any]:
        """What the features depend on."""
        data, model = self.data, self.model
        left_out = (*AS_USED, *(() if self.copies else AUGMENTATION), "_class_path", "_instantiator")
        settings = {name: value for name, value in data.hparams.items() if name not in left_out}
        first = {name: next(iter(loader))[0][:COMPARED] for name, loader in self._loaders() if name != "val"}
        groups = getattr(data, "group_counts", None)
        return {
            "data": {"class_path": f"{type(data).__module__}.{type(data).__qualname__}", "init_args": settings},
            "inputs": digest({name: inputs.float() for name, inputs in first.items()}),
            "input_shape": list(first["test"].shape[1:]),
            "class_names": list(data.class_names),
            "class_counts": torch.as_tensor(data.class_counts).tolist(),
            "group_counts": None if groups is None else groups.tolist(),
            "backbone": model.hparams["backbone"],
            "weights": weights_digest(model.backbone, model.head_name),
            "copies": self.copies,
        }

    def parts(self) -> dict[str, Features]:
        """The features of all parts."""
        found = {name: self._features(loader, name) for name, loader in self._loaders()}
        copies = [
            found["train"].features,
            *(self._copy(number, found["train"].labels) for number in range(self.copies)),
        ]
        return {**found, "train": Features(torch.cat(copies, dim=1), found["train"].labels)}

    def _loaders(self) -> Iterator[tuple[str, Iterable[Any]]]:
        yield "train", self.data.train_eval_dataloader()
        validation = self.data.val_dataloader()
        if not isinstance(validation, list):  # which is empty: there is none
            yield "val", validation
        yield "test", self.data.test_dataloader()

    def _copy(self, number: int, labels: Tensor) -> Tensor:
        """One augmented copy of the training samples, float32 (N, 1, d): those of one epoch, put in order."""
        data = self.data
        drawn = data.sampling, data.mixup, data.cutmix
        data.sampling, data.mixup, data.cutmix = "instance_balanced", 0, 0  # every image once, unmixed
        try:
            loader = data.train_dataloader()
        finally:
            data.sampling, data.mixup, data.cutmix = drawn
        loader.sampler.set_epoch(number)
        order = torch.tensor([draw for _, draw in loader.sampler])
        found = self._features(loader, f"copy {number + 1}")
        if len(found.labels) != len(labels) or not torch.equal(found.labels, labels[order]):
            raise SettingError(
                "the training samples with and without augmentation differ (unreadable images?): run imbsam check"
            )
        return found.features[order.argsort()]

    @torch.no_grad()
    def _features(self, loader: Iterable[Any], name: str) -> Features:
        """The features of one loader's samples, float32 (N, 1, d)."""
        network, kept = self.model.backbone.to(self.device).eval(), []
        labels: list[Tensor] = []
        hook = self.model.head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].float().cpu()))
        try:
            for batch in tqdm(loader, f"features of {name}", leave=False, disable=None if self.show else True):
                with self.context():
                    network(batch[0].to(self.device))
                labels.append(batch[1])
        finally:
            hook.remove()
        features = torch.cat(kept)
        if features.shape[:-1] != (sum(map(len, labels)),):
            shape = tuple(features.shape)
            raise SettingError(
                f"backbone is {type(network).__name__}, whose classifier takes {shape}, no vector a sample"
            )
        return Features(features[:, None], torch.cat(labels))


def features_file(extraction: FeatureExtraction, folder: Path, weights: str | None) -> Path:
    """Compute the features, unless their file is there, and write it with a piece of config that trains on it.

    Args:
        extraction: what to compute.
        folder: of the file, whose name holds a hash of all that the features depend on.
        weights: the file of the network's weights, for the config.

    Returns:
        The path of the features, a .npz; the config is beside it, a .yaml of the same name.
    """
    description = extraction.description()
    key = digest({json.dumps(description, sort_keys=True): torch.empty(0)})[:12]
    data, model = extraction.data, extraction.model
    path = folder / f"{type(data).__name__.removesuffix('DataModule')}_{_network_name(model)}_{key}.npz"
    if path.exists():
        read_features(path)
        print(f"features: {path}, computed before")
    else:
        parts = extraction.parts()
        # not in the hash, which is of the images themselves
        write_features(path, parts, {**description, "preprocessing": getattr(data, "used_preprocessing", None)})
        sizes = ", ".join(f"{len(part.labels):,} {name}" for name, part in parts.items())
        copies = f" and {extraction.copies} augmented copies" if extraction.copies else ""
        length = parts["test"].features.shape[-1]
        print(f"features: {path}: {length} of each of {sizes}{copies}; {path.stat().st_size / 1e6:,.1f} MB")
    piece = path.with_suffix(".yaml")
    adapted = any(map(is_adapter, model.backbone.state_dict()))
    given = ("backbone", "head", "many", "few", *(("tune",) if adapted else ()))
    choices = {name: model.hparams[name] for name in given if model.hparams.get(name) is not None}
    settings = {**choices, **({"backbone_weights": weights} if weights else {})}
    content = {
        "model": {"init_args": settings},
        "data": {"class_path": "FeaturesDataModule", "init_args": {"path": str(path)}},
    }
    text = yaml.safe_dump(content, sort_keys=False)
    piece.write_text(f"# The network and its features, by imbsam features; after configs/data/features.yaml.\n{text}")
    return path


def _network_name(model: Any) -> str:
    """The name of the backbone's class, or of its network in a library."""
    choice = model.hparams["backbone"]
    if isinstance(choice, str):
        return choice.rpartition(".")[2]
    name = choice["init_args"].get("name") or choice["class_path"].rpartition(".")[2]
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in str(name))
