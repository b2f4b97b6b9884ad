"""Images that live in memory, read a whole batch at a time."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from imbsam.errors import SettingError


class ImageArrays(Dataset[tuple[Tensor, Tensor]]):
    """Pixels and labels in two tensors.

    PyTorch's loader reads a batch through ``__getitems__``: one gather, with no Python loop over the
    samples, so ``collate_fn`` receives the batch's pixels and labels as two tensors, not a list of samples.

    Args:
        images: Pixels, uint8 (N, C, H, W).
        labels: Class indices, int64 (N,); or multi-label, 0 and 1, int64 (N, C).

    Raises:
        SettingError: A wrong dtype or shape, or not one label for each image.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise SettingError(f"images is {images.dtype} of shape {tuple(images.shape)}: give uint8 (N, C, H, W)")
        if labels.dtype != torch.int64 or labels.dim() not in (1, 2) or len(labels) != len(images):
            raise SettingError(
                f"labels is {labels.dtype} of shape {tuple(labels.shape)}: give int64 class indices, "
                f"one for each of the {len(images)} images"
            )
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image, uint8 (C, H, W), and its label, int64 (), or labels, int64 (C,)."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch of B images, uint8 (B, C, H, W), and their labels, int64 (B,) or (B, C)."""
        batch = torch.tensor(indices, dtype=torch.int64)
        return self.images[batch], self.labels[batch]
