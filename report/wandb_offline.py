"""Read an offline run of Weights & Biases with its own client."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def read_wandb(log: Path) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """Read the log of an offline run.

    Args:
        log: the file ``run-ID.wandb``.

    Returns:
        The logged rows, the run's config, and its group, name or project.

    Raises:
        ValueError: wandb is not installed, too old, or cannot read the file; one line.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise ValueError(f'"wandb leet inspect" failed: {said[-1]} (it needs pip install "wandb>=0.31")')
    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    name = "wandb"
    for line in done.stdout.splitlines():
        record = json.loads(line)
        if record["type"] == "history":
            rows.append(record["history"]["item"])
        elif record["type"] == "config":
            config.update(record["config"].get("update", {}))
        elif record["type"] == "run":
            run = record["run"]
            config.update(run.get("config", {}).get("update", {}))
            name = run.get("run_group") or run.get("display_name") or run.get("project") or name
    return rows, config, name
