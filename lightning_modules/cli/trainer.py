"""The Trainer of the command line: Lightning's, with the commands that are ours."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from imbsam import SettingError
from imbsam.checks import check_numbers, check_whole_numbers
from imbsam.sharpness import SharpnessMeasures
from lightning_modules.base import SharpnessAwareModule
from lightning_modules.callbacks.calibration import calibration_of
from lightning_modules.callbacks.class_table import print_class_table
from lightning_modules.callbacks.decisions import decisions_of
from lightning_modules.callbacks.fitted_callback import FittedCallback
from lightning_modules.class_names import check_class_names
from lightning_modules.classifier import LongTailedClassifier
from lightning_modules.cli.decide import FitAgain, check_validation_part, new_file, write_fits
from lightning_modules.export.command import Part, export_files
from lightning_modules.export.files import check_formats
from lightning_modules.features.extraction import FeatureExtraction, features_file
from lightning_modules.fine_tuning import FineTunedModule
from lightning_modules.group_sharpness import GroupSamples, Results, Split, plot_slices
from lightning_modules.resuming.checkpoint_contents import read_checkpoint


class CommandTrainer(Trainer):
    """Lightning's Trainer with `decide`, `sharpness`, `check`, `export` and `features`."""

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
        self._refuse_processes("sharpness")
        _refuse_features(datamodule, "are measured with")
        checkpoint = _read_whole(ckpt_path, weights_only, "sharpness")
        if "class_names" not in checkpoint:
            raise SettingError(
                f"ckpt_path is {ckpt_path}, whose model is {type(model).__name__}: sharpness is measured by groups of "
                "classes, for a LongTailedClassifier or a second stage; use imbsam.sharpness on losses of your own"
            )
        _check_data(datamodule, checkpoint.get("datamodule_hyper_parameters", {}))
        datamodule.prepare_data()
        datamodule.setup("test")
        check_class_names(checkpoint["class_names"], datamodule)
        model.on_load_checkpoint(checkpoint)
        if isinstance(model, FineTunedModule):
            model.hand_over_preprocessing(datamodule)
        model.load_state_dict(checkpoint["state_dict"])
        model.to(self.strategy.root_device)
        data = GroupSamples(model, datamodule, split, samples, chunk_size, measures.seed)
        show = self.progress_bar_callback is not None
        out = Path(folder) if folder else _folder_of(ckpt_path)
        # not checkpoint["epoch"], which is one less in a checkpoint of an epoch's end
        epoch = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        results = data.measure(measures, epoch, out, str(ckpt_path), show)
        if slices:
            arrays: dict[str, Any] = data.slices(span, points, measures.seed, show)
            np.savez_compressed(out / "loss_slices.npz", **arrays)
            plot_slices(arrays, out / "loss_slices.png")
            print(f"slices: {out / 'loss_slices.npz'} and .png")
        return results

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        path: str | list[str] | None = None,
        split: Part = "test",
        samples: int = 256,
        tolerance: float = 1e-4,
    ) -> None:
        """Write a checkpoint as a file that runs without this library, and compare it with the checkpoint.

        The file takes pixels and gives what ``imbsam predict`` writes: normalization, the views of ``flip_tta`` and
        ``crop_tta``, and the calibration are inside; class names, input and decisions in its metadata. Its predictions
        are compared with the checkpoint's on the CPU, by onnxruntime for ONNX.

        Args:
            model: the model.
            datamodule: the data.
            ckpt_path: the checkpoint.
            weights_only: as in torch.load; default true.
            path: the file or files: .onnx for ONNX, .pt2 for torch.export; default model.onnx in the folder of the
                checkpoint's run.
            split: whose samples are compared: val or test.
            samples: how many of them at most, 2 or more.
            tolerance: the largest difference of an output from the checkpoint's, in units of max(1, its size).

        Raises:
            SettingError: a setting cannot work, the network cannot be exported, or the predictions differ.
        """
        check_whole_numbers(2, samples=samples)
        check_numbers(above=True, hint="1e-4 is the default", tolerance=tolerance)
        if ckpt_path is None:
            raise SettingError("ckpt_path is null: name the checkpoint to export")
        self._refuse_processes("export")
        _refuse_features(datamodule, "are exported with")
        given = path or str(_folder_of(ckpt_path) / "model.onnx")
        paths = [Path(one) for one in ([given] if isinstance(given, str) else given)]
        check_formats(paths)
        checkpoint = _read_whole(ckpt_path, weights_only, "export")
        datamodule.prepare_data()
        datamodule.setup("test")
        datamodule.load_state_dict(checkpoint.get(type(datamodule).__qualname__, {}))
        model.on_load_checkpoint(checkpoint)
        if isinstance(model, FineTunedModule):
            model.hand_over_preprocessing(datamodule)
        model.load_state_dict(checkpoint["state_dict"])
        self.ckpt_path = ckpt_path
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FittedCallback):
                if state := checkpoint.get("callbacks", {}).get(callback.state_key):
                    callback.load_state_dict(state)
                callback.on_predict_start(self, model)  # refuses other settings than the checkpoint's
        fitted = calibration_of(self), decisions_of(self)
        export_files(model, datamodule, paths, ckpt_path, split, samples, tolerance, *fitted)

    def features(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        folder: str = "features",
        copies: int = 0,
    ) -> Path:
        """Compute the features of training, validation and test part once, to train classifiers on them.

        The features are the inputs of the network's classifier. They are written to a file whose name holds a hash of
        all that they depend on, with a piece of config beside it; if the file is there, nothing is computed.

        Args:
            model: a LongTailedClassifier, whose network starts from ``model.backbone_weights``, as in a training.
            datamodule: the data.
            ckpt_path: a checkpoint, for the weights of a trained network.
            weights_only: as in torch.load; default true.
            folder: where the files are written.
            copies: augmented copies of every training sample, of which a training draws one each time.

        Returns:
            The file of the features.

        Raises:
            SettingError: a setting cannot work, or the model or the data have no features.
        """
        check_whole_numbers(0, copies=copies)
        self._refuse_processes("features")
        _refuse_features(datamodule, "are computed from")
        if not isinstance(model, LongTailedClassifier) or "backbone" not in model.hparams:  # a second stage
            raise SettingError(
                f"model is {type(model).__name__}: features are computed by a LongTailedClassifier, such as that of a "
                "first stage"
            )
        connector: Any = self._data_connector
        connector.attach_datamodule(model, datamodule)
        model.trainer, self.state.fn = self, TrainerFn.FITTING  # type: ignore[assignment]  # reads backbone_weights
        datamodule.prepare_data()
        datamodule.setup("fit")
        model.learn_from_data("fit")
        weights = ckpt_path or model.settings.get("backbone_weights")
        if ckpt_path is None:
            model.tune_factory = None  # nothing is trained here, and new adapters do nothing
        model.configure_model()
        if ckpt_path is not None:
            checkpoint = _read_whole(ckpt_path, weights_only, "features")
            model.on_load_checkpoint(checkpoint)
            model.load_state_dict(checkpoint["state_dict"])
        model.refuse_missing_weights()
        show = self.progress_bar_callback is not None
        context = self.precision_plugin.forward_context
        device = self.strategy.root_device
        extraction = FeatureExtraction(model, datamodule, copies, device, context, show)
        path = features_file(extraction, Path(folder), weights)
        print(f"train on them: imbsam fit --config configs/data/features.yaml --config {path.with_suffix('.yaml')}")
        return path

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

    def _refuse_processes(self, command: str) -> None:
        if self.num_devices * self.num_nodes > 1:
            raise SettingError(f"{command} runs on {self.num_devices} devices: set trainer.devices to 1")


def _folder_of(checkpoint: str) -> Path:
    """The folder of the checkpoint's run."""
    home = Path(checkpoint).parent
    return home.parent if home.name == "checkpoints" else home


def _read_whole(ckpt_path: str, weights_only: bool | None, command: str) -> dict[str, Any]:
    """Read a checkpoint that has its weights in the same file."""
    checkpoint = read_checkpoint(Path(ckpt_path), weights_only is not False)
    if "state_dict" not in checkpoint:
        raise SettingError(
            f"ckpt_path is {ckpt_path}: it is sharded, and {command} reads one file: resume its run with "
            "trainer.strategy.init_args.save_distributed_checkpoint false, which writes one"
        )
    return checkpoint


def _refuse_features(data: Any, what: str) -> None:
    if getattr(data, "holds_features", False):
        raise SettingError(f"data is {type(data).__name__}: features {what} the images: name their data with --data")


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
