"""Vision models of Hugging Face transformers."""

import difflib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from imbsam.errors import SettingError
from imbsam.messages import first_sentence
from lightning_modules.backbones.hub import hub
from lightning_modules.backbones.image_tower import HuggingFaceTower, LogitsOfOutput
from lightning_modules.backbones.library import LibraryNetwork, check_text_weights, tag_of

__all__ = ["HuggingFace"]

_OF_OTHER_CLASSES = ("id2label", "label2id", "num_labels", "architectures", "dtype", "torch_dtype", "_name_or_path")


@dataclass(frozen=True)
class HuggingFace(LibraryNetwork):
    """A vision model of transformers (the extra ``huggingface``): for image classification, or a CLIP's image tower.

    Of CLIP the classifier is a linear layer on the projected image features. The tags of its weights are revisions of
    the repository.

    Args:
        name: a folder that ``save_pretrained`` wrote; a repository of the hub, such as google/vit-base-patch16-224; or
            a kind of model, such as vit, with transformers' default sizes. Of the first two only the architecture is
            taken; the weights are ``backbone_weights``: the same folder, or pretrained.
        settings: of the model's configuration, such as ``image_size``.
        config: the configuration, read from the folder or repository if null; checkpoints hold it, so that testing and
            predicting need neither.
    """

    config: dict[str, Any] | None = None
    _unread: ClassVar[SettingError | None] = None
    """Why the configuration could not be read."""

    def __post_init__(self) -> None:
        if self.config is None and not self._is_kind:
            try:
                object.__setattr__(self, "config", self._read_config())
            except SettingError as error:  # raised again by whoever needs it: the parser would wrap it
                object.__setattr__(self, "_unread", error)

    @property
    def _is_kind(self) -> bool:
        return self.config is None and "/" not in self.name and not Path(self.name).exists()

    def _names(self) -> list[str]:
        return _kinds() if self._is_kind else [self.name]

    def _read_config(self) -> dict[str, Any]:
        if self._unread is not None:
            raise self._unread
        try:
            with hub(self.name):
                config = _transformers().AutoConfig.from_pretrained(self.name, trust_remote_code=False)
        except Exception as error:  # of the hub's client, of the file system, of the file's contents
            near = difflib.get_close_matches(Path(self.name).name.lower(), _kinds(), n=3, cutoff=0.4)
            kinds = f"; or a kind of model ({', '.join(near)})" if near else ""
            raise SettingError(
                f"backbone.name is {self.name}: its config.json cannot be read ({first_sentence(error)}): "
                f"name a folder of save_pretrained, or a repository that the hub or its cache has{kinds}"
            ) from error
        if config.model_type not in _kinds():
            raise SettingError(
                f"backbone.name is {self.name}, of kind {config.model_type}, which classifies no images: transformers "
                f"has {', '.join(_kinds())}"
            )
        plain: dict[str, Any] = config.to_diff_dict()
        return {key: value for key, value in plain.items() if key not in _OF_OTHER_CLASSES}

    def _configuration(self, num_classes: int | None = None) -> Any:
        values: dict[str, Any] = (
            {"model_type": self.name} if self._is_kind else dict(self.config or self._read_config())
        )
        for key, value in self.settings.items():
            nested = isinstance(value, dict) and isinstance(values.get(key), dict)
            values[key] = {**values[key], **value} if nested else value
        config = _transformers().AutoConfig.for_model(**values)
        own = config.vision_config if config.model_type == "clip" else config
        if unknown := [key for key in self.settings if not hasattr(type(config)(), key)]:
            raise SettingError(f"backbone.settings of {self.name} has {unknown[0]}, which {config.model_type} has not")
        own.dtype = torch.float32
        if num_classes is not None:
            config.num_labels = num_classes
        return config

    def _build(self, num_classes: int) -> nn.Module:
        hf, config = _transformers(), self._configuration(num_classes)
        if config.model_type == "clip":
            config.vision_config.projection_dim = config.projection_dim
            tower = hf.CLIPVisionModelWithProjection(config.vision_config)
            return HuggingFaceTower(tower, config.projection_dim, num_classes)
        return LogitsOfOutput(hf.AutoModelForImageClassification.from_config(config))

    def _pretrained(self, tag: str | None) -> dict[str, Tensor]:
        if self._is_kind:
            raise SettingError(
                f"backbone_weights is pretrained and backbone.name is {self.name}, a kind of model without weights: "
                "name a repository of the hub, such as google/vit-base-patch16-224, or a folder"
            )
        return self._read(self.name, {} if tag is None else {"revision": tag})

    def folder_of(self, path: Path) -> Path | None:
        """The folder of a file that has a config.json beside it: its names may be of an older transformers."""
        return path.parent if path.is_file() and (path.parent / "config.json").is_file() else super().folder_of(path)

    def read_folder(self, folder: Path) -> dict[str, Tensor]:
        """What ``save_pretrained`` wrote."""
        try:
            return self._read(str(folder), {})
        except SettingError:
            raise
        except Exception as error:  # of the file system, of the file's contents
            raise SettingError(
                f"backbone_weights is {folder}: transformers cannot read it ({first_sentence(error)})"
            ) from error

    def _read(self, source: str, options: dict[str, Any]) -> dict[str, Tensor]:
        """The weights by the names that transformers gives them now, without a head that is not there."""
        hf = _transformers()
        with hub(source):
            kind = hf.AutoConfig.from_pretrained(source, trust_remote_code=False, **options).model_type
            reader = hf.CLIPVisionModelWithProjection if kind == "clip" else hf.AutoModelForImageClassification
            model, found = reader.from_pretrained(source, output_loading_info=True, dtype=torch.float32, **options)
        missing = set(found["missing_keys"]) | {key for key, *_ in found["mismatched_keys"]}
        return {name: tensor for name, tensor in model.state_dict().items() if name not in missing}

    def preprocessing(self, weights: str) -> dict[str, Any]:
        """Those of preprocessor_config.json, beside the weights or the configuration; warns if there is none."""
        config = self._configuration()
        vision = getattr(config, "vision_config", config)
        folder = None if weights.partition(":")[0] == "pretrained" else self.folder_of(Path(weights))
        source = str(folder or self.name)
        known: dict[str, Any] = {}
        read: dict[str, Any] = {}
        if source != self.name or not self._is_kind:
            options = {} if (tag := tag_of(weights)) is None else {"revision": tag}
            try:
                with hub(source):
                    read = _transformers().AutoImageProcessor.from_pretrained(source, **options).to_dict()
            except Exception as error:  # of the hub's client, of the file system, of the file's contents
                rank_zero_warn(
                    f"backbone_weights is {weights}, and the preprocessor_config.json of {source} cannot be read "
                    f"({first_sentence(error)}): images keep the data's mean and std; if the weights were trained on "
                    "others, set data.mean and data.std"
                )
        sizes = [vision.image_size] if hasattr(vision, "image_size") else []
        sizes += [side for key in ("crop_size", "size") for side in (read.get(key) or {}).values()]
        if sizes:
            known["image_size"] = sizes[0] if isinstance(sizes[0], int) else sizes[0][0]
        if read.get("do_normalize", True) and read.get("image_mean"):
            known |= {"mean": list(read["image_mean"]), "std": list(read["image_std"])}
        return known

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str], weights: str | None) -> Tensor:
        """Of CLIP's text tower, from the folder or repository that the weights are from."""
        if self._configuration().model_type != "clip":
            return super().text_features(prompts, weights)
        check_text_weights(weights)
        from_hub = str(weights).partition(":")[0] == "pretrained"
        source = self.name if from_hub or not Path(str(weights)).is_dir() else str(weights)
        options = {} if (tag := tag_of(weights)) is None else {"revision": tag}
        hf = _transformers()
        try:
            with hub(source):
                tokenizer = hf.AutoTokenizer.from_pretrained(source, **options)
                model = hf.CLIPTextModelWithProjection.from_pretrained(source, dtype=torch.float32, **options).eval()
        except Exception as error:  # as in _read_config
            raise SettingError(
                f"head_init is TextFeatures, and the tokenizer or text tower of {source} cannot be read "
                f"({first_sentence(error)})"
            ) from error
        features = []
        for start in range(0, len(prompts), 256):
            tokens = tokenizer(list(prompts[start : start + 256]), padding=True, truncation=True, return_tensors="pt")
            features.append(model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).text_embeds.float())
        return torch.cat(features)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise SettingError(
            "backbone is HuggingFace, but transformers is not installed: pip install transformers"
        ) from error


def _kinds() -> list[str]:
    """The kinds of models of transformers that classify images."""
    return sorted(_transformers().models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
