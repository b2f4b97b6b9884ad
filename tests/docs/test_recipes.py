"""The programs of docs/ run unchanged: on one process, on two, and checked against training without the engine."""

import importlib.util
import io
import multiprocessing
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ports import held_port
from tests.programs import PATIENCE

pytestmark = pytest.mark.processes

DOCS = Path(__file__).resolve().parents[2] / "docs"
NEEDS = {"pytorch": "torch", "fabric": "lightning", "accelerate": "accelerate", "huggingface": "transformers"}
NEEDS["text"] = "transformers"
WEIGHTS = {page: "trainer.model" if NEEDS[page] == "transformers" else "model" for page in NEEDS}
PLAIN_LOOPS = ["pytorch", "fabric", "accelerate"]

# Float64 and a few epochs, so that two runs can be compared to the last digits.
EXACT = {
    "import torch\n": "import torch\ntorch.set_default_dtype(torch.float64)\n",
    ".float()": ".double()",
    "range(40)": "range(2)",
    "num_train_epochs=40": "num_train_epochs=2",
    "num_train_epochs=20": "num_train_epochs=2",
    # two processes draw other masks than one
    '"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1': '"hidden_dropout_prob": 0.0, '
    '"attention_probs_dropout_prob": 0.0',
    '"bf16-mixed"': '"64-true"',
    'mixed_precision="bf16"': 'mixed_precision="no"',
    "torch.bfloat16)": "torch.bfloat16, enabled=False)",
    # a short last batch would not be split evenly; for the prediction it must stay
    "    max_grad_norm=1.0,\n": "    max_grad_norm=1.0,\n    dataloader_drop_last=True,\n",
    "trainer.train()\n": "trainer.train()\narguments.dataloader_drop_last = False\n",
}
# The same rows in the same order everywhere: the frameworks' samplers draw differently.
ORDER = {
    "shuffle=True": "sampler=torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()",
    "sampler=sampler": "sampler=torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()",
}
NO_ACCUMULATION = {
    "gradient_accumulation_steps=2": "gradient_accumulation_steps=1",
    "batch_size=32": "batch_size=64",
}
PLAIN = {"rho=0.1": "rho=0", "rho=0.02": "rho=0"}
WHOLE_BATCH = {rho: f'{rho}, context_rows="batch"' for rho in ("rho=0.1", "rho=0.02")}
# on the CPU Fabric turns "16-mixed" into bfloat16; with the plugin it is float16 with a scaler
FLOAT16 = {
    "from lightning.fabric import Fabric\n": "from lightning.fabric import Fabric\n"
    "from lightning.fabric.plugins import MixedPrecision\n",
    'precision="bf16-mixed"': 'plugins=[MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]',
    "max_norm=1.0": "max_norm=1.0, error_if_nonfinite=False",
}

# A fork of a process that has done the imports: they are paid for once, and every run has its own process.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "torch",
        "torchmetrics",
        "sklearn.datasets",
        "sklearn.model_selection",
        "lightning.fabric",
        "accelerate",
        "transformers.trainer",
        "transformers.models.vit.modeling_vit",
        "transformers.models.bert.modeling_bert",
    ]
)


def program(page: str, *changes: dict[str, str]) -> str:
    """The one Python block of a page, with substitutions (those whose text is not there are left out)."""
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), flags=re.DOTALL)
    for old, new in (pair for change in changes for pair in change.items()):
        block = block.replace(old, new)
    return block


def child(text: str, name: str, environment: dict[str, str], folder: Path) -> None:
    """Run a program in this process; write its output and weights to the folder."""
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["program.py"]
    rank = environment.get("RANK", "0")
    printed, namespace = io.StringIO(), {"__name__": "__main__"}
    try:
        with redirect_stdout(printed):
            exec(compile(text, "program.py", "exec"), namespace)
        weights = [p.detach().cpu() for p in eval(name, namespace).parameters()]
        torch.save((printed.getvalue(), weights), folder / f"rank{rank}.pt")
    except BaseException:
        (folder / f"error{rank}.txt").write_text(traceback.format_exc())
        raise


class Runs:
    """Runs programs, each once."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._done: dict[Any, list[tuple[str, list[torch.Tensor]]]] = {}

    def __call__(self, page: str, *changes: dict[str, str], ranks: int = 1) -> list[tuple[str, list[torch.Tensor]]]:
        """What every rank printed, and its weights."""
        if importlib.util.find_spec(NEEDS[page]) is None:
            pytest.skip(f"{NEEDS[page]} is not installed: pip install '.[dev]'")
        text = program(page, *changes)
        if (text, ranks) not in self._done:
            with held_port() as port:
                self._done[text, ranks] = self._run(text, WEIGHTS[page], ranks, port)
        return self._done[text, ranks]

    def _run(self, text: str, name: str, ranks: int, port: int) -> list[tuple[str, list[torch.Tensor]]]:
        folder = self._factory.mktemp("run")
        # what torchrun sets, and what `fabric run --accelerator cpu --devices 2` adds
        shared = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        if ranks > 1:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
            shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
            shared |= {"LT_CLI_USED": "1", "LT_ACCELERATOR": "cpu", "LT_DEVICES": str(ranks)}
        workers = []
        for rank in range(ranks):
            environment = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            workers.append(processes.Process(target=child, args=(text, name, environment, folder)))
            workers[-1].start()
        for worker in workers:
            worker.join(timeout=PATIENCE)
            if worker.is_alive():
                worker.kill()
        errors = "\n".join(path.read_text() for path in sorted(folder.glob("error*.txt")))
        assert [worker.exitcode for worker in workers] == [0] * ranks, errors
        return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    return Runs(tmp_path_factory)


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("page", NEEDS)
def test_program_runs_and_prints_what_the_page_says(run, page):
    ((printed, _),) = run(page)
    pattern = r"accuracy ([\d.]+)%, rare classes ([\d.]+)%"
    said = [float(number) for number in re.search(pattern, (DOCS / f"{page}.md").read_text()).groups()]
    found = [float(number) for number in re.search(pattern, printed).groups()]
    assert found == pytest.approx(said, abs=8)  # other machines round differently


@pytest.mark.parametrize("page", NEEDS)
def test_engine_perturbs(run, page):
    (_, weights), (_, plain) = *run(page, EXACT), *run(page, EXACT, PLAIN)
    assert distance(weights, plain) > 1e-4


@pytest.mark.parametrize("page", NEEDS)
def test_two_processes_match_one(run, page):
    # torch's DistributedSampler and the Trainer draw the same rows on one process and on two
    order = ORDER if page in ("fabric", "accelerate") else {}
    ((_, one),), ((_, first), (_, second)) = run(page, EXACT, order), run(page, EXACT, order, ranks=2)
    assert distance(first, second) == 0
    assert distance(first, one) < 1e-10


@pytest.mark.parametrize("page", PLAIN_LOOPS[1:])
def test_framework_matches_the_plain_loop(run, page):
    ((_, plain),), ((_, framework),) = (run(name, EXACT, ORDER, NO_ACCUMULATION) for name in ("pytorch", page))
    assert distance(plain, framework) < 1e-10


def test_trainer_without_perturbation_is_the_stock_trainer(run):
    ((_, ours),) = run("huggingface", EXACT, PLAIN)
    ((_, stock),) = run("huggingface", EXACT, {"trainer = ImbSAMTrainer(": "trainer = Trainer("})
    assert distance(ours, stock) < 1e-10


@pytest.mark.parametrize("page", NEEDS)
def test_backward_forwards_retain_graph(run, page):
    ((_, sharp_rows),), ((_, whole_batch),) = run(page, EXACT), run(page, EXACT, WHOLE_BATCH)
    assert distance(sharp_rows, whole_batch) < 1e-10  # rows are independent in these models


def test_fabric_with_a_grad_scaler(run):
    few_epochs = {"range(40)": "range(2)"}
    ((_, half),), ((_, full),) = (
        run("fabric", few_epochs, FLOAT16),
        run("fabric", few_epochs, {"bf16-mixed": "32-true"}),
    )
    assert 0 < distance(half, full) < 0.05
