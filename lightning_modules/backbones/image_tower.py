"""A classifier on the features of an image tower, as CLIP has one."""

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_modules.backbones.heads import classifier

__all__ = ["ImageTower", "LogitsOfOutput"]


class ImageTower(nn.Module):
    """A last layer on projected image features.

    Args:
        visual: maps images (N, channels, H, W) to features (N, D), or to an object with them as ``image_embeds``.
        features: D.
        num_classes: number of logits.

    Attributes:
        prefixes: what the names of the tower begin with in a file of the whole model, beside ``visual.``.
    """

    prefixes: tuple[str, ...] = ()

    def __init__(self, visual: nn.Module, features: int, num_classes: int) -> None:
        super().__init__()
        self.visual = visual
        self.fc = nn.Linear(features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        features = self.visual(images)
        logits: Tensor = self.fc(getattr(features, "image_embeds", features))
        return logits

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def from_library(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tower's tensors, and the last layer's if there is one, from a file of the whole model."""
        kept = {n: t for n, t in weights.items() if n.startswith(("visual.", "fc."))}
        return kept | {f"visual.{n}": t for n, t in weights.items() if n.startswith(self.prefixes)}


class HuggingFaceTower(ImageTower):
    """The image tower of transformers' CLIP."""

    prefixes = ("vision_model.", "visual_projection.")


class LogitsOfOutput(nn.Module):
    """A classification model of transformers that returns its logits alone.

    Args:
        model: called with ``pixel_values``, returns an object with ``logits``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        logits: Tensor = self.model(pixel_values=images).logits
        return logits

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        layer: nn.Module = classifier(self.model)
        return layer

    def from_library(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file by their names here."""
        return {n if n.startswith("model.") else f"model.{n}": t for n, t in weights.items()}
