"""Images read from files one by one, and what happens to a damaged file."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from tqdm import tqdm

from datamodules.image_files.decoding import failure_reason, read_rgb
from imbsam.checks import check_choice
from imbsam.errors import SettingError

CorruptImages = Literal["skip", "fail"]


class UnreadableImage(SettingError):
    """A file that cannot be read as an image; the message is one line that names it.

    A loader re-raises a worker's exception with the traceback in its text: only the line is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@dataclass(eq=False)
class ImageFiles(Dataset[Any]):
    """Labelled images in files, decoded on access.

    The paths are one numpy array of bytes: worker processes share its pages (fork) or get one plain copy (spawn),
    whereas a list of Python strings would be copied page by page as its reference counts change.

    Attributes:
        root: Folder that the paths are relative to.
        paths: Paths, numpy bytes (N,).
        labels: Class indices, int64 (N,); or multi-label, 0 and 1, int64 (N, C).
        class_names: Names of the classes, for messages.
        transform: Makes the sample from an RGB image.
        corrupt_images: What a damaged file does: ``fail`` raises, ``skip`` warns once per file and continues.
        replace_damaged: With ``skip``: put the next readable image of the class (multi-label: with the same labels) in
            the damaged one's place, in the order of the files, so that it depends on the index alone; otherwise the
            sample is None.
        with_paths: Samples are (image, label, path), not (image, label).
        damaged: Which images any worker of this process found damaged, bool (N,).
    """

    root: Path
    paths: Any
    labels: Tensor
    class_names: Sequence[str]
    transform: Callable[[Image.Image], Any]
    corrupt_images: CorruptImages = "fail"
    replace_damaged: bool = False
    with_paths: bool = False

    def __post_init__(self) -> None:
        check_choice(CorruptImages, corrupt_images=self.corrupt_images)
        self.damaged = torch.zeros(len(self.paths), dtype=torch.bool)
        self.damaged.share_memory_()  # type: ignore[no-untyped-call]  # the workers write into it

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        """The transformed image, its label and perhaps its path; None for a damaged image that is left out.

        Raises:
            UnreadableImage: The image is damaged and ``corrupt_images`` is ``fail``, no image of its class can be read,
                or the operating system refuses the file (never skipped: it might be readable in the next run).
        """
        image, shown = self._read(index), index
        if image is None and self.replace_damaged:
            same = self.labels == self.labels[index]
            others = (same if same.dim() == 1 else same.all(dim=1)).nonzero().flatten()
            others = others.roll(-int((others == index).nonzero()) - 1)[:-1]
            for shown in others.tolist():
                if (image := self._read(shown)) is not None:
                    break
            else:
                label = self.labels[index]
                if label.dim():
                    raise UnreadableImage(
                        f"image {self._path(index)} is corrupt and no other training image has its labels: fix or "
                        "remove it"
                    )
                name = self.class_names[int(label)]
                raise UnreadableImage(f"class {name} has no readable training image: fix or remove its files")
        if image is None:
            return None
        label = self.labels[index]
        sample = self.transform(image), label if label.dim() else int(label)
        return (*sample, os.fsdecode(self.paths[shown])) if self.with_paths else sample

    def select(self, indices: Tensor) -> "ImageFiles":
        """The images at these indices, int64 (M,)."""
        return replace(self, paths=self.paths[indices.numpy()], labels=self.labels[indices])

    def unreadable(self, num_workers: int) -> dict[str, str]:
        """Decode every image once, in this many processes (0 is this one).

        Returns:
            The path of each image that cannot be read, and why.
        """
        indices: Any = range(len(self))
        loader = DataLoader(indices, batch_size=32, num_workers=num_workers, collate_fn=self._failures)
        reasons: dict[str, str] = {}
        for failures in tqdm(loader, "reading images", leave=False, disable=None):
            reasons |= failures
        return reasons

    def _failures(self, indices: Sequence[int]) -> dict[str, str]:
        failures = {}
        for index in indices:
            path = self._path(index)
            try:
                read_rgb(path)
            except MemoryError:
                raise
            except Exception as error:  # a damaged file may raise anything
                failures[str(path)] = failure_reason(path, error)
        return failures

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.paths[index])

    def _read(self, index: int) -> Image.Image | None:
        """The image, or None if it is damaged and ``corrupt_images`` is ``skip``."""
        path = self._path(index)
        try:
            return read_rgb(path)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file may raise anything
            reason = failure_reason(path, error)
            if isinstance(error, OSError) and error.errno is not None:
                raise UnreadableImage(f"image {path} cannot be read: {reason}") from error
            if self.corrupt_images == "fail":
                raise UnreadableImage(
                    f"image {path} is corrupt: {reason}: fix or remove it, or set data.corrupt_images to skip"
                ) from error
        if not self.damaged[index]:
            self.damaged[index] = True
            worker = get_worker_info()
            where = f"rank {getattr(rank_zero_only, 'rank', 0)}, worker {worker.id if worker else 'none'}"
            done = "another image of its class takes its place" if self.replace_damaged else "it is left out"
            warnings.warn(f"image {path} is corrupt: {reason}; {done} ({where})", stacklevel=2)
        return None


class ReadableImages:
    """A ``collate_fn`` that leaves out damaged images, down to an empty batch.

    Args:
        image_size: Side of the images, for an empty batch.
        with_paths: Samples have a path.
        labels: Labels of a sample, of an empty batch: their number C where they are multi-label.
    """

    def __init__(self, image_size: int, with_paths: bool = False, labels: int | None = None) -> None:
        self.image_size = image_size
        self.with_paths = with_paths
        self.label_shape = () if labels is None else (labels,)

    def __call__(self, samples: list[Any]) -> Any:
        """Images (B, 3, S, S), labels int64 (B,) or (B, C), and perhaps a list of B paths."""
        readable = [sample for sample in samples if sample is not None]
        if readable:
            return default_collate(readable)
        images = torch.empty(0, 3, self.image_size, self.image_size)
        return [images, torch.empty(0, *self.label_shape, dtype=torch.int64), *([[]] if self.with_paths else [])]
