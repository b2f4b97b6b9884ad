"""Images from files that are decoded once and stay on a device, from which batches are cropped there."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as vision
from tqdm import tqdm

from datamodules.image_files.augmentation import ImageTransform
from datamodules.image_files.dataset import ImageFiles
from datamodules.sampling.host_copies import copied_to, pinned_for
from datamodules.sampling.sample_seeds import seeded

LOOKED_AT = 100
"""The size of the decoded images is estimated from so many of them."""


@dataclass(eq=False)
class DecodedImages(Dataset[Any]):
    """Decoded images at their own size, on a device; the host keeps their labels.

    PyTorch's loader reads a batch through ``__getitems__``, and :meth:`collate` makes it: each image is cropped and
    resized on the device, with random numbers from the host, then the batch is normalized. An image is the one that
    :class:`ImageFiles` makes of its file with the same transform and seed, but for rounding: torch resizes, not PIL.

    Attributes:
        images: Pixels, uint8 (3, H, W) with an H and W of each image; None for a damaged image that is left out.
        labels: Class indices, int64 (N,); or multi-label, 0 and 1, int64 (N, C).
        transform: What makes a sample of an image; it must not need the CPU (:meth:`ImageTransform.needs_host`).
        device: Where the pixels are.
    """

    images: list[Tensor | None]
    labels: Tensor
    transform: ImageTransform
    device: torch.device

    @classmethod
    def of(cls, files: ImageFiles, device: torch.device, num_workers: int) -> "DecodedImages":
        """Decode every image, in this many processes (0 is this one).

        Args:
            files: The images, and what a damaged one does; it then knows which ones are damaged.
            device: Where to keep them.
            num_workers: Number of processes.

        Raises:
            UnreadableImage: See :class:`ImageFiles`.
        """
        decoding = replace(files, transform=vision.pil_to_tensor, with_paths=False)
        # one by one, without collating: their sizes differ
        loader = DataLoader(decoding, batch_size=None, num_workers=num_workers)
        images: list[Tensor | None] = []
        for sample in tqdm(loader, "reading images", leave=False, disable=None):
            # a copy on the host too: workers hand over memory with a file descriptor for each image
            images.append(None if sample is None else sample[0].to(device, copy=True))
        files.damaged |= decoding.damaged
        return cls(images, files.labels, files.transform, device)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Number of images N, damaged ones included."""
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """B images, uint8 (3, H, W), and their labels, int64 (B,) or (B, C), on the host; fewer if some are damaged."""
        kept = [index for index in indices if self.images[index] is not None]
        images: list[Any] = [self.images[index] for index in kept]
        return images, self.labels[torch.tensor(kept, dtype=torch.int64)]

    def __getitem__(self, index: int) -> Any:
        """One image and its label."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def collate(self, batch: tuple[list[Tensor], Tensor], seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Crop, resize, flip and normalize.

        Args:
            batch: What ``__getitems__`` returns.
            seeds: One seed for each image, int64 (B,), on the host; None where nothing is random.

        Returns:
            Images, float32 (B, 3, S, S), on the device, and the labels, on the host.
        """
        images, labels = batch
        first, second, *_, normalize = self.transform.steps.transforms
        if seeds is None:
            cropped = [second(first(image)) for image in images]
        else:
            cropped = []
            for image, seed in zip(images, seeds.tolist(), strict=True):
                with seeded(seed):
                    cropped.append(second(first(image)))
        size = self.transform.image_size
        pixels = torch.stack(cropped) if cropped else torch.empty(0, 3, size, size, device=self.device)
        statistics = torch.tensor([normalize.mean, normalize.std]).view(2, 3, 1, 1)
        mean, std = copied_to(statistics, self.device)
        return (pixels.float() / 255).sub_(mean).div_(std), pinned_for(labels, self.device)


def decoded_bytes(files: ImageFiles) -> int:
    """Bytes of all images when decoded, estimated from the sizes in the heads of some files."""
    step = max(1, len(files) // LOOKED_AT)
    sizes = []
    for path in files.paths[::step]:
        try:
            with Image.open(files.root / os.fsdecode(path)) as image:
                sizes.append(3 * image.width * image.height)
        except OSError:  # a damaged file, which decoding will report
            continue
    return round(sum(sizes) / len(sizes) * len(files)) if sizes else 0
