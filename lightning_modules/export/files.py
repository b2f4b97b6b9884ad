"""Files of ONNX and torch.export: written, and compared with the checkpoint's predictions."""

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imbsam.errors import SettingError
from lightning_modules.export.prediction_graph import PredictionGraph

FORMATS = (".onnx", ".pt2")

METADATA = "imbsam"
"""The key of the description among an ONNX file's properties; ``imbsam.json`` among a .pt2's extra files."""


def check_formats(paths: Sequence[Path]) -> None:
    """Refuse what cannot be written, before the data are read.

    Raises:
        SettingError: an unknown format, or a package that its format needs is not installed.
    """
    for path in paths:
        if path.suffix not in FORMATS:
            raise SettingError(f"path is {path}: end it in .onnx (for onnxruntime) or .pt2 (for torch.export.load)")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing and any(path.suffix == ".onnx" for path in paths):
        raise SettingError(
            f'export to ONNX needs {" and ".join(missing)}, which is not installed: pip install "imbsam[export]", or '
            "set path to a .pt2 file"
        )


def trace(graph: PredictionGraph, inputs: Tensor) -> Any:
    """The graph for batches of any size.

    Args:
        graph: what is exported.
        inputs: at least two samples, as an example.

    Raises:
        SettingError: torch.export cannot trace the network.
    """
    dynamic = ({0: torch.export.Dim("batch")},)
    graphs = io.StringIO()  # torch prints the graph of a failure
    try:
        with torch.no_grad(), redirect_stdout(graphs), redirect_stderr(graphs):
            return torch.export.export(graph, (inputs[:2],), dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # the network's own code, and several classes of torch's
        name = type(graph.network).__name__
        raise SettingError(f"the network is {name}, which torch.export cannot trace: {_first_line(error)}") from error


def write(program: Any, path: Path, graph: PredictionGraph, description: Mapping[str, Any]) -> None:
    """Write one file.

    Raises:
        SettingError: an operation of the network has no counterpart in ONNX.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description)
    if path.suffix == ".pt2":
        torch.export.save(program, path, extra_files={f"{METADATA}.json": text})
        return
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        onnx: Any = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["inputs"],
            output_names=graph.outputs,
            dynamic_shapes=({0: "batch"},),  # the dimension's name
        )
    except Exception as error:  # torch's own classes, which are not public
        reason = _first_line(error.__cause__ or error)
        raise SettingError(f"path is {path}: ONNX cannot express the network: {reason}; a .pt2 file can") from error
    onnx.model.metadata_props[METADATA] = text
    onnx.save(str(path))


def runner(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Load a file as another program would, and run it on the CPU."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda inputs: list(module(inputs))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda inputs: [torch.from_numpy(found) for found in session.run(None, {"inputs": inputs.numpy()})]


def largest_difference(run: Callable[[Tensor], list[Tensor]], inputs: Tensor, expected: Sequence[Tensor]) -> float:
    """The largest difference between a file's outputs and those expected, in units of max(1, its size).

    The first sample runs alone and the others as one batch, so that the size of the batch is seen to be free.

    Args:
        run: from :func:`runner`.
        inputs: (N, ...), N >= 2.
        expected: the outputs for them, each (N, ...).
    """
    with torch.no_grad():
        parts = [run(inputs[:1]), run(inputs[1:])]
    found = [torch.cat(outputs) for outputs in zip(*parts, strict=True)]
    differences = [(a - b).abs() / b.abs().clamp(min=1) for a, b in zip(found, expected, strict=True)]
    return max(float(difference.max()) for difference in differences)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
