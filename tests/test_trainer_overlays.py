"""Every overlay of configs/trainer builds what it names, on one CPU, and runs two batches."""

import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lightning_modules.cli.run import ImbSAMCLI, main

REPOSITORY = Path(__file__).resolve().parents[1]
OVERLAYS = sorted((REPOSITORY / "configs/trainer").glob("*.yaml"))
# the overlay's settings, and those that this machine cannot have
CASES = {
    "cpu": (SingleDeviceStrategy, "32-true", []),
    "test_every_epoch": (SingleDeviceStrategy, "32-true", ["--trainer.accelerator=cpu"]),
    "gpu": (SingleDeviceStrategy, "bf16-mixed", ["--trainer.accelerator=cpu"]),
    "ddp": (DDPStrategy, "bf16-mixed", ["--trainer.accelerator=cpu", "--trainer.devices=1"]),
    "fsdp": (
        ModelParallelStrategy,
        "bf16-mixed",
        [
            *("--trainer.accelerator=cpu", "--trainer.devices=1"),
            "--trainer.strategy.init_args.data_parallel_size=1",
        ],
    ),
    "slurm": (
        DDPStrategy,
        "bf16-mixed",
        ["--trainer.accelerator=cpu", "--trainer.num_nodes=1", "--trainer.devices=1"],
    ),
}
SLURM = {"JOB_ID": "4711", "JOB_NAME": "imbsam", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NODELIST": "127.0.0.1"}
SLURM |= {"PROCID": "0", "LOCALID": "0", "NODEID": "0", "NNODES": "1"}


@pytest.fixture(autouse=True)
def _leave_no_process_group():
    """Lightning leaves the group open, and its address in the environment."""
    before = dict(os.environ)
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_builds_its_trainer(path, monkeypatch, tmp_path):
    strategy, precision, overrides = CASES[path.stem]
    if path.stem == "slurm":
        for name, value in SLURM.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
    trainers = []
    monkeypatch.setattr(ImbSAMCLI, "after_fit", lambda self: trainers.append(self.trainer))
    monkeypatch.chdir(tmp_path)
    config = REPOSITORY / "configs/data/digits_lt.yaml"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            *("imbsam", "fit", f"--config={config}", f"--config={path}", "--trainer.fast_dev_run=2"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", *overrides),
        ],
    )
    main()
    (trainer,) = trainers
    assert type(trainer.strategy) is strategy
    assert trainer.precision == precision
    assert trainer.global_step == 2
    if path.stem == "slurm":
        environment = trainer.strategy.cluster_environment
        assert isinstance(environment, SLURMEnvironment)
        assert not environment.auto_requeue


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_sets_only_the_trainer_and_says_how_to_use_it(path):
    text = path.read_text()
    settings = yaml.safe_load(text)
    if path.stem == "gpu":  # how the steps run; every model has this setting
        assert settings.pop("model") == {"init_args": {"capture": "auto"}}
    assert set(settings) == {"trainer"}
    head = text[: text.index("trainer:\n")]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"--config configs/trainer/{path.name}" in head
