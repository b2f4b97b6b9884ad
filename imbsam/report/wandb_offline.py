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
        ValueError: wandb is not installed, too old, or cannot read the file, or the run has not ended; one line.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise ValueError(f'"wandb leet inspect" failed: {said[-1]} (it needs pip install "wandb>=0.31")')
    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    name, ended = "wandb", False
    for line in done.stdout.splitlines():
        record = json.loads(line)
        if record["type"] == "history":
            # a table or a chart is a row of words
            rows.append({key: v for key, v in record["history"]["item"].items() if isinstance(v, (int, float))})
        elif record["type"] == "exit":
            ended = True
        elif record["type"] == "config":
            config.update(record["config"].get("update", {}))
        elif record["type"] == "run":
            run = record["run"]
            config.update(run.get("config", {}).get("update", {}))
            name = run.get("run_group") or run.get("display_name") or run.get("project") or name
    if not ended:
        raise ValueError("the run has not ended, or its log was cut off")
    return rows, config, name
