"""Image towers of open_clip."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from imbsam.errors import SettingError
from imbsam.messages import first_sentence
from lightning_modules.backbones.hub import hub
from lightning_modules.backbones.image_tower import ImageTower
from lightning_modules.backbones.library import LibraryNetwork, check_text_weights, tag_of
from lightning_modules.backbones.weights import read_weights

__all__ = ["OpenCLIP"]


class OpenCLIP(LibraryNetwork):
    """The image tower of a CLIP of open_clip (the extra ``clip``), such as ViT-B-16, with its projection.

    The classifier is a linear layer on the projected features. OpenAI's weights were trained with another activation:
    their names end in ``-quickgelu``. The tags of its weights are open_clip's, such as openai or laion2b_s34b_b88k.

    Args:
        name: the model's name in open_clip.
        settings: of ``open_clip.create_model``, such as ``force_image_size``.

    Source:
        Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, ICML 2021,
        arXiv 2103.00020.
    """

    def _names(self) -> list[str]:
        try:
            import open_clip
        except ImportError as error:
            raise SettingError(
                "backbone is OpenCLIP, but open_clip is not installed: pip install open_clip_torch"
            ) from error
        names: list[str] = open_clip.list_models()
        return names

    def _build(self, num_classes: int) -> nn.Module:
        if self.settings.get("pretrained"):
            raise SettingError(
                f"backbone.settings.pretrained is {self.settings['pretrained']}: leave it out and set "
                f"model.backbone_weights to a local file or to pretrained:{self.settings['pretrained']}"
            )
        model = self._model()
        return ImageTower(model.visual, self._config()["embed_dim"], num_classes)

    def _config(self) -> dict[str, Any]:
        import open_clip

        config: dict[str, Any] = open_clip.get_model_config(self.name)
        return config

    def _model(self, tag: str | None = None) -> Any:
        import open_clip

        settings = {"pretrained_text": tag is not None, **self.settings}  # a text tower of transformers, downloaded
        of_hub = tag is not None or self._config()["text_cfg"].get("hf_model_name")  # whose configuration is there
        disabled = logging.root.manager.disable
        logging.disable(logging.ERROR)  # that it has loaded no weights: we do; that it cannot: we say so
        try:
            with hub() if of_hub else nullcontext():
                return open_clip.create_model(self.name, pretrained=tag, load_weights=tag is not None, **settings)
        finally:
            logging.disable(disabled)

    def _tokenizer(self) -> Any:
        import open_clip

        of_hub = self._config()["text_cfg"].get("hf_tokenizer_name")
        with hub(of_hub) if of_hub else nullcontext():
            return open_clip.get_tokenizer(self.name)

    def _check_tag(self, tag: str | None) -> None:
        import open_clip

        if tag not in (tags := open_clip.list_pretrained_tags_by_model(self.name)):
            given = "pretrained" if tag is None else f"pretrained:{tag}"
            known = ", ".join(f"pretrained:{t}" for t in tags) or "none"
            raise SettingError(f"backbone_weights is {given}: open_clip's of {self.name} are {known}")
        wanted = bool(open_clip.get_pretrained_cfg(self.name, tag).get("quick_gelu"))
        if wanted != bool(self._config().get("quick_gelu") or self.settings.get("force_quick_gelu")):
            name = f"{self.name}-quickgelu" if wanted else self.name.removesuffix("-quickgelu")
            raise SettingError(
                f"backbone_weights is pretrained:{tag}, whose activation is {'QuickGELU' if wanted else 'GELU'}, and "
                f"that of {self.name} is not: set model.backbone.name to {name}"
            )

    def _pretrained(self, tag: str | None) -> dict[str, Tensor]:
        self._check_tag(tag)
        weights: dict[str, Tensor] = self._model(tag).state_dict()
        return weights

    def preprocessing(self, weights: str) -> dict[str, Any]:
        """open_clip's for these weights; for a file CLIP's."""
        import open_clip

        tag = tag_of(weights)
        config = open_clip.get_pretrained_cfg(self.name, tag) if tag else {}
        size = self.settings.get("force_image_size") or self._config()["vision_cfg"].get("image_size", 224)
        return {
            "image_size": size,
            "mean": list(config.get("mean", open_clip.OPENAI_DATASET_MEAN)),
            "std": list(config.get("std", open_clip.OPENAI_DATASET_STD)),
        }

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str], weights: str | None) -> Tensor:
        """Of the text tower, whose weights are in the same file or under the same tag."""
        self._check_name()
        check_text_weights(weights)
        tag = tag_of(weights)
        try:
            model, tokenize = self._model(tag).eval(), self._tokenizer()
        except Exception as error:  # of the hub's client, of the file system, of the file's contents
            raise SettingError(
                f"head_init is TextFeatures, and the tokenizer or text tower of {self.name} cannot be read "
                f"({first_sentence(error)})"
            ) from error
        if tag is None:
            found = read_weights(str(weights), self).tensors
            own = model.state_dict()
            text = {n: found[n] for n in own if n in found and found[n].shape == own[n].shape}
            if missing := [n for n in own if not n.startswith(("visual.", "logit_")) and n not in text]:
                raise SettingError(
                    f"head_init is TextFeatures, and backbone_weights is {weights}, which has no text tower of "
                    f"{self.name} ({missing[0]} and {len(missing) - 1} more): name a file of the whole model"
                )
            model.load_state_dict(text, strict=False)
        tokens = tokenize(list(prompts))
        return torch.cat([model.encode_text(part).float() for part in tokens.split(256)])
