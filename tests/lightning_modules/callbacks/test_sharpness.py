"""The callback and `imbsam sharpness`, on the digits."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from datamodules import DigitsLTDataModule
from imbsam import SettingError
from imbsam.sharpness import MEASURES, mean_loss
from lightning_modules import GroupSharpness, LongTailedClassifier
from lightning_modules.backbones import SmallCNN
from lightning_modules.cli.run import main
from lightning_modules.group_sharpness import GroupSamples
from tests.training import csv_rows

QUICK = {"steps": 1, "directions": 2, "probes": 2, "tolerance": 0.1, "samples": 40}
GROUPS = ["many", "medium", "few", "all"]


CONFIG = """
model:
  class_path: LongTailedClassifier
  init_args: {backbone: {class_path: SmallCNN, init_args: {width: 2, norm: batch, dropout: 0.1}}, many: 50, few: 10}
data: {class_path: DigitsLTDataModule, init_args: {batch_size: 64}}
trainer: {max_epochs: 3, enable_progress_bar: false, enable_model_summary: false, accelerator: cpu}
"""
CALLBACK = """
trainer:
  callbacks:
    class_path: GroupSharpness
    init_args: {every_n_epochs: 2, steps: 1, directions: 2, probes: 2, tolerance: 0.1, samples: 40}
"""


def fit(folder, name, *configs):
    """A run of the command; its folder."""
    files = []
    for i, config in enumerate((CONFIG, *configs)):
        files.append(folder / f"{name}{i}.yaml")
        files[-1].write_text(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["imbsam", "fit", *(f"--config={file}" for file in files)])
        main()
    return next(folder.glob(f"logs/*/{name}0/version_0"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with the callback every two of three epochs: its folder, its model and its data."""
    folder = fit(tmp_path_factory.mktemp("run"), "measured", CALLBACK)
    data = DigitsLTDataModule(batch_size=64)
    data.setup()
    return folder, LongTailedClassifier.load_from_checkpoint(folder / "checkpoints/last.ckpt"), data


def test_callback_writes_and_logs(run):
    folder, _, data = run
    found = csv_rows(folder / "sharpness.csv")
    assert [(r["epoch"], r["group"], r["measure"]) for r in found] == [
        (epoch, group, measure) for epoch in ("2", "3") for group in GROUPS for measure in MEASURES
    ]
    samples = {r["group"]: int(r["samples"]) for r in found}
    counts = data.class_counts
    assert samples == {"many": 40, "medium": 40, "few": int(counts[counts < 10].sum()), "all": 40}
    assert all("rho=0.05" in r["settings"] and r["split"] == "train" for r in found)
    assert all(bool(r["standard_error"]) == (r["measure"] in ("average_rise", "trace")) for r in found)
    logged = [float(r["sharpness/few/trace"]) for r in csv_rows(folder / "metrics.csv") if r.get("sharpness/few/trace")]
    traces = [float(r["value"]) for r in found if (r["group"], r["measure"]) == ("few", "trace")]
    assert logged == pytest.approx(traces, rel=1e-5)


def test_callback_does_not_change_the_run(run, tmp_path):
    """Nor the generators, though a loader draws from them: the run lasts an epoch longer than the first measurement."""
    plain = fit(tmp_path, "plain")
    expected, found = (torch.load(f / "checkpoints/last.ckpt")["state_dict"] for f in (plain, run[0]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_loss_is_that_of_the_groups_training_samples(run):
    _, model, digits = run
    data = GroupSamples(model, digits, "train", 1000, 16, seed=0)
    inputs, targets = (torch.cat(parts) for parts in zip(*digits.train_eval_dataloader(), strict=True))
    assert data.sizes["all"] == len(targets) == int(model.class_counts.sum())
    few = model.class_counts[targets] < 10
    model.eval()
    with torch.no_grad():
        expected = model.loss(model(inputs[few]), targets[few]).mean()
    assert mean_loss(model, data.losses, data.chunks["few"]) == pytest.approx(float(expected), rel=1e-5)


def test_draw_is_seeded_and_without_repetition(run):
    _, model, digits = run
    draws = [GroupSamples(model, digits, "test", 30, 64, seed).chunks["all"][0][0] for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert len(draws[0].flatten(1).unique(dim=0)) == 30


@pytest.fixture
def sharpness(imbsam, monkeypatch):
    """Run `imbsam sharpness` on a checkpoint; gives exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def command(*args):
        Path("digits.yaml").write_text(CONFIG)
        quick = [f"--{name}={value}" for name, value in QUICK.items()]
        return imbsam("sharpness", "--config=digits.yaml", *quick, *args)

    return command


def test_command_gives_the_callbacks_numbers(run, sharpness, tmp_path):
    folder, _, _ = run
    last = next(folder.rglob("*.ckpt"))
    code, out, _ = sharpness("--ckpt_path", last, "--folder", tmp_path / "out", "--slices=true", "--points=3")
    assert code == 0
    found = csv_rows(tmp_path / "out/sharpness.csv")
    assert found == csv_rows(folder / "sharpness.csv")[len(found) :]
    assert "standard errors of the random draws are in sharpness.csv" in " ".join(out.split())
    assert all(text in out for text in ("many", "eigenvalue", "out/sharpness.csv", "out/loss_slices.npz and .png"))
    few = next(r["value"] for r in found if (r["group"], r["measure"]) == ("few", "loss"))
    assert f"{float(few):.3g}" in out
    with np.load(tmp_path / "out/loss_slices.npz") as arrays:
        assert set(arrays) == {"position", *(f"{g}_{d}d" for g in GROUPS for d in (1, 2))}
        assert arrays["few_2d"].shape == (3, 3)
        assert arrays["few_1d"][1] == pytest.approx(float(few), rel=1e-4)
        assert arrays["few_2d"][:, 1] == pytest.approx(arrays["few_1d"], rel=1e-6)
    assert (tmp_path / "out/loss_slices.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "ckpt_path is null: name the checkpoint to measure with --ckpt_path"),
        (["--ckpt_path=CKPT", "--data.seed=3"], "data.seed is 3 and the checkpoint was trained with 0: use the config"),
        (["--ckpt_path=CKPT", "--rho=-1"], "rho is -1"),
        (["--ckpt_path=CKPT", "--chunk_size=0"], "chunk_size is 0"),
        (["--ckpt_path=CKPT", "--rhoo=1"], "rhoo"),
    ],
)
def test_command_refuses_in_one_line(run, sharpness, args, message):
    last = next(run[0].rglob("*.ckpt"))
    code, _, err = sharpness(*(a.replace("CKPT", str(last)) for a in args))
    assert code == 2
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"every_n_epochs": 0}, "every_n_epochs is 0"), ({"samples": 0}, "samples is 0"), ({"sigma": -1}, "sigma is -1")],
)
def test_callback_refuses_wrong_settings(settings, message):
    with pytest.raises(SettingError, match=message):
        GroupSharpness(**settings)


class OtherData(LightningDataModule):
    class_counts, class_names = torch.tensor([9, 1]), ["a", "b"]

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(10, 1, 8, 8), torch.tensor([0] * 9 + [1])), batch_size=5)


def test_other_data_say_what_is_missing():
    model = LongTailedClassifier(partial(SmallCNN, width=2))
    trainer = Trainer(
        max_epochs=1,
        logger=False,
        callbacks=[GroupSharpness(**QUICK)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    with pytest.raises(SettingError, match=r"OtherData\) has no train_eval_dataloader"):
        trainer.fit(model, datamodule=OtherData())
