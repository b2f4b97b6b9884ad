"""A capture that fails: where the thread, the memory and the graph stand after it, and what the message says."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

import imbsam.capture.philox
from imbsam import ImbSAM, SettingError
from imbsam.capture.captured_step import CapturedStep
from imbsam.capture.graphs import CudaGraphs, DirectCalls
from tests.imbsam.capture import fake_cuda
from tests.imbsam.capture.fake_cuda import GPU, Graph, item
from tests.imbsam.capture.nets import COUNTS, EAGER_SIZES, assert_same, batches, captured, losses_of, of_rows, pair

X, Y = batches(1)[0]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), fake_cuda.Dropout(), nn.Tanh(), nn.Linear(8, 4))


def step_that_calls(
    function: Callable[[], None], call: int, fall_back: bool = False
) -> tuple[ImbSAM, ImbSAM, CapturedStep, CudaGraphs]:
    """The losses call the function after that many calls; three passes a run, and nine in the warm-up."""
    own, eager = pair("imbsam 4", net)
    calls: list[int] = []

    def losses(x: Tensor, y: Tensor) -> Tensor:
        values = losses_of(own.module)(x, y)
        calls.append(len(x))
        if len(calls) == call:
            function()
        return values

    graphs = CudaGraphs(torch.device("cuda", 0))
    return own, eager, CapturedStep(own, losses, (X, Y), graphs=graphs, fall_back=fall_back), graphs


def not_permitted() -> None:
    fake_cuda.fail("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("call", [4, 8, 10, 11, 12])
@pytest.mark.parametrize("fall_back", [True, False])
def test_the_thread_is_on_the_stream_it_was_on(call, fall_back):
    """In a warm-up, the second pass of the last one, and in the capture, where torch leaves its stream current."""
    own, eager, step, _ = step_that_calls(not_permitted, call, fall_back)
    here = GPU.stream
    if fall_back and call > 9:
        with pytest.warns(UserWarning, match="the steps run eagerly: operation not permitted when stream is capturing"):
            step(X, Y)
        fake_cuda.DEFAULT.manual_seed(7)
        eager.backward(of_rows(eager.module, X, Y), Y)
        assert_same([p.grad for p in own.module.parameters()], [p.grad for p in eager.module.parameters()])
    else:
        with pytest.raises((SettingError, RuntimeError), match="operation not permitted when stream is capturing"):
            step(X, Y)
    assert GPU.stream is here


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("call", [8, 11])
def test_the_branch_is_joined_where_it_fails(call):
    """Or the weights would be restored while the branch still reads them; in a capture the first error counts."""
    _, _, step, graphs = step_that_calls(not_permitted, call)
    with pytest.raises((SettingError, RuntimeError), match="operation not permitted"):
        step(X, Y)
    joined = graphs._stream.joined.count(graphs._branch)
    assert joined == 3  # one for each warm-up; a stream of a capture that failed cannot be joined


@pytest.mark.usefixtures("gpu")
def test_what_waits_for_the_gpu_fails_before_a_capture_begins():
    """Older torch's memory pool is of no use after a capture that failed."""
    own, _, _, graphs = step_that_calls(item, 1)
    torch.cuda.set_sync_debug_mode(1)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        item()
        return losses_of(own.module)(x, y)

    before = {k: v.clone() for k, v in own.module.state_dict().items()}
    step = CapturedStep(own, losses, (X, Y), graphs=graphs)
    with pytest.raises(SettingError, match=r"cannot be captured: the passes wait for the GPU \(\.item\(\), ") as caught:
        step(X, Y)
    assert "\n" not in str(caught.value)
    assert GPU.graphs == 0
    assert torch.cuda.get_sync_debug_mode() == 1
    assert_same(own.module.state_dict(), before)


@pytest.mark.usefixtures("gpu")
def test_another_thread_may_wait_for_the_gpu_meanwhile():
    """One that writes a checkpoint: it does not fail, nor do the passes for its sake."""
    own, eager = pair("imbsam 4", net)
    failed: list[RuntimeError] = []

    def copy_weights() -> None:
        try:
            item()
        except RuntimeError as error:
            failed.append(error)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        if not GPU.capturing:
            thread = threading.Thread(target=copy_weights)
            thread.start()
            thread.join()
        return losses_of(own.module)(x, y)

    CapturedStep(own, losses, (X, Y), graphs=CudaGraphs(torch.device("cuda", 0)), pass_sizes=EAGER_SIZES)(X, Y)
    assert not failed
    fake_cuda.DEFAULT.manual_seed(7)
    eager.backward(of_rows(eager.module, X, Y), Y)
    assert_same([p.grad for p in own.module.parameters()], [p.grad for p in eager.module.parameters()])


@pytest.mark.usefixtures("gpu")
def test_a_graph_that_failed_holds_no_memory_and_no_cycle():
    _, _, step, _ = step_that_calls(not_permitted, 11)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(SettingError) as caught:
            step(X, Y)
        assert GPU.graphs == 0
        held = [weakref.ref(held) for held in (caught.value.__cause__, step._static._results)]
        del caught, step
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "error",
    [
        "CUDA error: operation would make the legacy stream depend on a capturing blocking stream\nCUDA kernel errors",
        "During CUDA graph capture, autograd tried to synchronize streams across the capture boundary (leaf stream 0)",
        "'AccumulateGrad' has a stale reference to the default stream (stream 0) from warmup. This will invalidate",
    ],
)
def test_an_earlier_forward_that_is_still_alive_is_named(error):
    _, _, step, _ = step_that_calls(lambda: fake_cuda.fail(error), 10)
    with pytest.raises(SettingError, match=r"an earlier forward's output is still alive .*: delete it") as caught:
        step(X, Y)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("needed", [True, False])
def test_generator_states_are_registered_where_torch_needs_it(needed, monkeypatch):
    """From 2.14 on a graph sees what it draws from, and warns where it is told."""
    registered: list[Any] = []
    monkeypatch.setattr(imbsam.capture.philox, "_REGISTERS", needed)
    monkeypatch.setattr(Graph, "register_generator_state", lambda self, state: registered.append(state), raising=False)
    own, _ = pair("imbsam 4", net)
    CapturedStep(own, losses_of(own.module), (X, Y), graphs=CudaGraphs(torch.device("cuda", 0)))(X, Y)
    assert len(registered) == (3 if needed else 0)
    assert all(state.state is not fake_cuda.DEFAULT.state for state in registered)


def weight_norm(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)


@pytest.mark.parametrize("reparametrise", [lambda m: nn.utils.prune.l1_unstructured(m, "weight", 0.5), weight_norm])
def test_no_graph_of_a_computed_weight_reaches_into_a_pass(reparametrise):
    """The hook of an eager forward leaves a weight whose graph keeps the parameters' gradient nodes on its stream."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        reparametrise(model[0])
    own, eager = (ImbSAM(model, COUNTS) for model in models)
    graphs: list[Any] = []

    def losses(x: Tensor, y: Tensor) -> Tensor:
        graphs.append(models[0][0].weight.grad_fn)
        return F.cross_entropy(models[0](x), y, reduction="none")

    step = captured(own, losses)
    for x, y in batches(3):
        models[0](x)  # an eager forward in between, as of a smaller last batch
        assert models[0][0].weight.grad_fn is not None
        step._static._recordings.clear()
        graphs.clear()
        assert step(x, y) == eager.backward(of_rows(eager.module, x, y), y)
        assert graphs
        assert all(graph is None for graph in graphs)
        assert_same([p.grad for p in models[0].parameters()], [p.grad for p in models[1].parameters()])
        assert_same(models[0][0].weight.detach(), models[1][0].weight.detach())


@pytest.mark.parametrize("fall_back", [True, False])
def test_out_of_memory_while_capturing(fall_back):
    own, eager = pair("imbsam 4")
    calls: list[int] = []

    def losses(x: Tensor, y: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return losses_of(own.module)(x, y)

    graphs = DirectCalls(torch.device("cpu"))
    step = CapturedStep(own, losses, (X, Y), graphs=graphs, fall_back=fall_back, pass_sizes=range(2, 24, 2))
    torch.manual_seed(1)
    message = "the GPU is out of memory, of which graphs take more than an eager step"
    if not fall_back:
        with pytest.raises(SettingError, match=f"capture is True, and the step cannot be captured: {message}; set"):
            step(X, Y)
        assert all(p.grad is None for p in own.module.parameters())
        return
    with pytest.warns(UserWarning, match=f"the steps run eagerly: {message}"):
        loss = step(X, Y)
    assert step._static is None  # with its memory
    torch.manual_seed(1)
    assert loss == eager.backward(of_rows(eager.module, X, Y), Y)
    assert_same([p.grad for p in own.module.parameters()], [p.grad for p in eager.module.parameters()])
