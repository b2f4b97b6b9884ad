"""Sweep files, checked by W&B's own code; the command that its agent runs is run."""

import itertools
import sys

import pytest
import yaml

from tests.programs import PATIENCE, REPOSITORY

SWEEPS = sorted((REPOSITORY / "configs/sweeps").glob("*.yaml"))

wandb = pytest.importorskip("wandb")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweep_is_valid(path):
    sweeps = pytest.importorskip("sweeps", reason='W&B\'s schema comes with "wandb[sweeps]", which needs numpy below 2')
    from wandb.sdk.launch.sweeps.utils import load_sweep_config

    assert sweeps.schema_violations_from_proposed_config(load_sweep_config(str(path))) == []


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweep_chooses_on_a_validation_split(path):
    config = yaml.safe_load(path.read_text())
    assert config["metric"] == {"name": "val/all", "goal": "maximize"}
    assert float(next(c for c in config["command"] if "val_share" in c).partition("=")[2]) > 0
    assert {"model.sam.rho", "model.sam.eta"} <= config["parameters"].keys()
    assert config["command"][-1] == "${args}"
    sizes = [len(parameter["values"]) for parameter in config["parameters"].values()]
    runs = len(list(itertools.product(*map(range, sizes))))
    assert f"{runs} runs" in path.read_text().splitlines()[0]


@pytest.mark.processes
def test_the_command_of_the_agent_trains(tmp_path, read_wandb):
    """The agent's own code builds the command and starts it; there is no server, so it stays offline."""
    from wandb.wandb_agent import Agent

    program, *command = yaml.safe_load((REPOSITORY / "configs/sweeps/digits_lt_rho_eta.yaml").read_text())["command"]
    assert program == "imbsam"
    python = [sys.executable, "-m", "lightning_modules.cli"]  # `imbsam`, installed or not
    short = ["--trainer.max_epochs=1", "--model.lr_scheduler.init_args.T_max=1"]
    offline = "--trainer.logger.init_args.offline=true"
    here = {"WANDB_DIR": str(tmp_path), "WANDB_SWEEP_ID": "sweep123", "PYTHONPATH": str(REPOSITORY)}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them
            patch.setenv(name, "")
        for name, value in here.items():
            patch.setenv(name, value)
        patch.chdir(tmp_path)
        agent = Agent(api=None, queue=None)
        agent._sweep_command = [*python, *command, *short, offline]
        values = {"model.sam.rho": 0.1, "model.sam.eta": 10, "seed_everything": 2}
        agent._command_run({"run_id": "abcd1234", "program": "", "args": {k: {"value": v} for k, v in values.items()}})
    process = agent._run_processes["abcd1234"]
    try:
        assert process.wait(timeout=PATIENCE) == 0
    finally:
        if process.poll() is None:
            process.kill()
    (folder,) = tmp_path.glob("logs/wandb/offline-run-*-abcd1234")
    records = read_wandb(folder)
    (run, *_) = records["run"]
    config = run["config"]["update"]  # which the agent gave to W&B
    assert {key: config[key] for key in values} == values
    assert any("val/all" in record["item"] for record in records["history"])
