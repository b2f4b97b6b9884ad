"""The Trainer of the command line: Lightning's, with `imbsam decide`, `imbsam sharpness` and `imbsam check`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from imbsam import SettingError
from imbsam.sharpness import SharpnessMeasures
from lightning_modules.base import SharpnessAwareModule
from lightning_modules.callbacks.class_table import print_class_table
from lightning_modules.class_names import check_class_names
from lightning_modules.cli.decide import FitAgain, check_validation_part, new_file, write_fits
from lightning_modules.group_sharpness import GroupSamples, Results, Split, plot_slices
from lightning_modules.resuming.checkpoint_contents import read_checkpoint


class CommandTrainer(Trainer):
    """Lightning's Trainer with `decide`, `sharpness` and `check` beside `fit`, `validate`, `test` and `predict`."""

    def decide(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        output: str | None = None,
    ) -> None:
        """Fit calibration and decisions on the validation part again, and write a checkpoint with them.

        The old checkpoint stays as it is. What is not set is as in the checkpoint.

        Args:
            model: the model.
            datamodule: the data; their validation part must be the training's, or of other data.
            ckpt_path: the checkpoint.
            weights_only: as in torch.load; default true.
            output: the new checkpoint; default: decided.ckpt beside the old one, or decided-v1.ckpt and so on. No
                file is overwritten.

        Raises:
            SettingError: there is no validation part, or something cannot be fitted: then nothing is written.
        """
        if ckpt_path is None:
            raise SettingError("ckpt_path is null: name the checkpoint to decide with")
        new = new_file(output, Path(ckpt_path))
        checkpoint = read_checkpoint(Path(ckpt_path), weights_only is not False)
        check_validation_part(datamodule, checkpoint.get("datamodule_hyper_parameters", {}))
        callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
        callbacks.append(again := FitAgain())
        self.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=weights_only, verbose=False)
        if not again.done:
            raise SettingError(
                "data.val_share is 0: the run has no validation part to decide by, and its training samples would "
                "promise too much: train with data.val_share, say 0.2, or name other labelled data"
            )
        if self.is_global_zero:
            write_fits(self, checkpoint, new)
            print(f"imbsam: wrote {new}: use it with --ckpt_path {new}")

    def sharpness(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        folder: str | None = None,
        split: Split = "train",
        samples: int = 1000,
        chunk_size: int = 128,
        slices: bool = False,
        span: float = 1.0,
        points: int = 21,
        **settings: Any,
    ) -> Results:
        """Measure the sharpness of the class groups at a checkpoint.

        The samples must be those that the model was trained on: on the command line the checkpoint sets the data.
        Prints a table and appends to ``sharpness.csv``.

        Args:
            model: the model.
            datamodule: the data.
            ckpt_path: the checkpoint.
            weights_only: as in torch.load; default true.
            folder: where the files are written; default: the folder of the checkpoint's run.
            split: the training samples (without augmentation), or the test set.
            samples: at most this many samples of a group, drawn with the seed.
            chunk_size: samples in one backward pass; lower it to save memory. It does not change the results.
            slices: also write one- and two-dimensional loss slices: loss_slices.npz, and loss_slices.png.
            span: the slices go from -span to span, in units of each filter's length.
            points: points of a slice along each dimension.
            **settings: those of :class:`imbsam.sharpness.SharpnessMeasures`.

        Returns:
            The estimates by group and measure.

        Raises:
            SettingError: a setting cannot work, or the data are not those that the checkpoint was trained with.
        """
        measures = SharpnessMeasures(**settings)
        if ckpt_path is None:
            raise SettingError("ckpt_path is null: name the checkpoint to measure")
        if self.num_devices * self.num_nodes > 1:
            raise SettingError(f"sharpness runs on {self.num_devices} devices: set trainer.devices to 1")
        checkpoint = read_checkpoint(Path(ckpt_path), weights_only is not False)
        _check_data(datamodule, checkpoint.get("datamodule_hyper_parameters", {}))
        datamodule.prepare_data()
        datamodule.setup("test")
        check_class_names(checkpoint["class_names"], datamodule)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        model.to(self.strategy.root_device)
        data = GroupSamples(model, datamodule, split, samples, chunk_size, measures.seed)
        show = self.progress_bar_callback is not None
        home = Path(ckpt_path).parent
        out = Path(folder) if folder else home.parent if home.name == "checkpoints" else home
        # not checkpoint["epoch"], which is one less in a checkpoint of an epoch's end
        epoch = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        results = data.measure(measures, epoch, out, str(ckpt_path), show)
        if slices:
            arrays: dict[str, Any] = data.slices(span, points, measures.seed, show)
            np.savez_compressed(out / "loss_slices.npz", **arrays)
            plot_slices(arrays, out / "loss_slices.png")
            print(f"slices: {out / 'loss_slices.npz'} and .png")
        return results

    def check(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Load the data, print the classes and the shape of a batch, and find files that cannot be read.

        Training, validation and test samples are read once, except those left out of a long tail. Nothing is trained
        and nothing is written.

        Args:
            model: the model, which defines many, medium, few and tail; its network is not built.
            datamodule: the data.

        Raises:
            SettingError: the data cannot be loaded, or files cannot be read.
        """
        connector: Any = self._data_connector
        connector.attach_datamodule(model, datamodule)
        model.trainer = self
        datamodule.prepare_data()
        datamodule.setup("fit")
        if isinstance(model, SharpnessAwareModule):
            model.learn_from_data("fit")
        else:
            model.setup("fit")
        if hasattr(model, "test_accuracy"):
            print_class_table(model)
        else:
            data: Any = datamodule
            counts = zip(data.class_names, torch.as_tensor(data.class_counts).tolist(), strict=True)
            print("training samples: " + ", ".join(f"{count:,} {name}" for name, count in counts))
        find_unreadable = getattr(datamodule, "unreadable_files", None)
        unreadable: dict[str, str] = find_unreadable() if find_unreadable else {}
        for path, reason in list(unreadable.items())[:20]:
            print(f"{path}: {reason}")
        if len(unreadable) > 20:
            print(f"… and {len(unreadable) - 20:,} more")
        if unreadable:
            files = "1 file" if len(unreadable) == 1 else f"{len(unreadable):,} files"
            raise SettingError(f"{files} cannot be read: fix or remove them, or set data.corrupt_images to skip")
        for part, name in (("training", "train"), ("validation", "val"), ("test", "test")):
            loader = getattr(datamodule, f"{name}_dataloader")()
            print(f"{part}: {_describe(loader, read_all=find_unreadable is None)}")
        print("the data can be read")


def _check_data(datamodule: LightningDataModule, trained: Any) -> None:
    """The samples must be those that the model was trained on."""
    for name in ("ratio", "profile", "val_share", "seed", "draw"):
        now = datamodule.hparams.get(name)
        if name in trained and trained[name] != now:
            raise SettingError(
                f"data.{name} is {now} and the checkpoint was trained with {trained[name]}: "
                "use the config.yaml in the run's folder"
            )


def _describe(loader: Any, read_all: bool) -> str:
    """The number of batches, and the dtypes and shapes of the first one."""
    batches = iter(loader)
    first = next(batches, None)
    for _ in batches if read_all else ():
        pass
    if first is None:
        return "none"
    tensors = first if isinstance(first, (list, tuple)) else [first]
    kinds = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors if isinstance(t, Tensor)]
    number = f"{len(loader):,} batches, " if hasattr(loader, "__len__") else ""
    return f"{number}the first one {', '.join(kinds)}"
