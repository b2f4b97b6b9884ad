"""Images read from files one by one, and what happens where a file is no image."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from datamodules.image_files.decoding import failure_reason, read_rgb
from imbsam.errors import SettingError

CorruptImages = Literal["skip", "fail"]


class UnreadableImage(SettingError):
    """A file that is no image; the message is one line that names it.

    A loader repeats what a worker raised as text with a traceback: of that text only the line is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class ImageFiles(Dataset[Any]):
    """Labelled images in files, decoded when they are asked for.

    The paths are one numpy array of bytes: worker processes share its pages (fork) or get one plain copy (spawn), where
    a list of Python strings would be copied bit by bit as its reference counts change.

    Args:
        root: Folder that the paths are relative to.
        paths: Paths, numpy bytes (N,).
        labels: Class indices, int64 (N,).
        class_names: Names of the classes, for messages.
        transform: Makes the sample of an RGB image.
        corrupt_images: What a damaged file does: ``fail`` raises, ``skip`` warns once per file and continues.
        replace: With ``skip``: put the next readable image of the class in the damaged one's place, in the order of the
            files, so that it depends on the index alone; otherwise the sample is None.
        with_paths: Samples are (image, label, path), not (image, label).

    Attributes:
        damaged: Which samples were found damaged, by any worker of this process, bool (N,).
    """

    def __init__(
        self,
        root: Path,
        paths: Any,
        labels: Tensor,
        class_names: list[str],
        transform: Callable[[Image.Image], Any],
        corrupt_images: CorruptImages = "fail",
        replace: bool = False,
        with_paths: bool = False,
    ) -> None:
        if corrupt_images not in get_args(CorruptImages):
            raise SettingError(f"corrupt_images={corrupt_images!r} is unknown: choose skip or fail.")
        self.root = root
        self.paths = paths
        self.labels = labels
        self.class_names = class_names
        self.transform = transform
        self.corrupt_images = corrupt_images
        self.replace = replace
        self.with_paths = with_paths
        self.damaged: Tensor = torch.zeros(len(paths), dtype=torch.bool)
        self.damaged.share_memory_()  # type: ignore[no-untyped-call]  # the workers write into it

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        """The transformed image, its label and perhaps its path; None for a damaged image that is left out.

        Raises:
            UnreadableImage: The image is damaged and ``corrupt_images`` is ``fail``, no image of its class can be read,
                or the operating system refuses the file (that is never skipped: the next run might get it).
        """
        shown = index
        image = self._read(index)
        if image is None and self.replace:
            others = (self.labels == self.labels[index]).nonzero().flatten()
            others = others.roll(-int((others == index).nonzero()) - 1)[:-1]
            for shown in others.tolist():
                image = self._read(shown)
                if image is not None:
                    break
            else:
                name = self.class_names[int(self.labels[index])]
                raise UnreadableImage(f"corrupt_images=skip: class {name} has no readable training image: fix one.")
        if image is None:
            return None
        sample = self.transform(image), int(self.labels[index])
        return (*sample, os.fsdecode(self.paths[shown])) if self.with_paths else sample

    def select(self, rows: Tensor, **settings: Any) -> "ImageFiles":
        """The images at these rows, int64 (M,); settings change others of the constructor."""
        kept = {
            "transform": self.transform,
            "corrupt_images": self.corrupt_images,
            "replace": self.replace,
            "with_paths": self.with_paths,
        }
        labels = self.labels[rows]
        return ImageFiles(self.root, self.paths[rows.numpy()], labels, self.class_names, **{**kept, **settings})

    def unreadable(self, num_workers: int) -> dict[str, str]:
        """Decode every image once.

        Args:
            num_workers: Processes that read; 0 is this one.

        Returns:
            The path of each image that cannot be read, and why.
        """
        reasons = DataLoader(_Reasons(self), batch_size=32, num_workers=num_workers, collate_fn=list)
        total, console = -(-len(self) // 32), Console(stderr=True)
        bar = track(reasons, "reading images", total, console=console, transient=True, disable=not console.is_terminal)
        return dict(entry for batch in bar for entry in batch if entry is not None)

    def _read(self, index: int) -> Image.Image | None:
        """The image, or None where it is damaged and that is no error."""
        path = self.root / os.fsdecode(self.paths[index])
        try:
            return read_rgb(path)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file may raise anything
            reason = failure_reason(path, error)
            if isinstance(error, OSError) and error.errno is not None:
                raise UnreadableImage(f"image {path} cannot be read: {reason}.") from error
            if self.corrupt_images == "fail":
                raise UnreadableImage(
                    f"image {path} is corrupt: {reason}: fix or remove it, or set data.corrupt_images to skip."
                ) from error
        if not self.damaged[index]:
            self.damaged[index] = True
            worker = get_worker_info()
            where = f"rank {getattr(rank_zero_only, 'rank', 0)}, worker {worker.id if worker else 'none'}"
            done = "another image of its class takes its place" if self.replace else "it is left out"
            warnings.warn(f"image {path} is corrupt: {reason}; {done} ({where})", stacklevel=2)
        return None


class _Reasons(Dataset[Any]):
    """(path, why it cannot be read) of the images that cannot, None for the others."""

    def __init__(self, images: ImageFiles) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, str] | None:
        path = self.images.root / os.fsdecode(self.images.paths[index])
        try:
            read_rgb(path)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file may raise anything
            return str(path), failure_reason(path, error)
        return None


class ReadableImages:
    """A ``collate_fn`` that leaves out the damaged images, down to an empty batch.

    Args:
        image_size: Side of the images, for a batch without one.
        with_paths: Samples have a path.
    """

    def __init__(self, image_size: int, with_paths: bool = False) -> None:
        self.image_size = image_size
        self.with_paths = with_paths

    def __call__(self, samples: list[Any]) -> Any:
        """Images (B, 3, S, S), labels int64 (B,), and perhaps a list of B paths."""
        readable = [sample for sample in samples if sample is not None]
        if readable:
            return default_collate(readable)
        images = torch.empty(0, 3, self.image_size, self.image_size)
        return [images, torch.empty(0, dtype=torch.int64), *([[]] if self.with_paths else [])]
