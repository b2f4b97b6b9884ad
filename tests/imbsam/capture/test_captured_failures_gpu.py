"""What only a GPU can show of a capture that fails: CUDA's errors, the current stream and the memory."""

import gc
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

from imbsam import ImbSAM, SettingError
from imbsam.capture.graphs import CudaGraphs
from tests.imbsam.capture.nets import COUNTS, LABELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: CUDA graphs run on no other"),
]
BATCH = len(LABELS[0])


def net() -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 4)).cuda().double()
    )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 6, dtype=torch.float64, generator=generator).cuda(), torch.tensor(LABELS[0])


def losses_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def gradient(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def eager_gradient(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    labels = y.cuda()
    torch.manual_seed(1)
    sam = ImbSAM(model, COUNTS, context_rows=4)
    sam.backward(lambda rows: losses_of(model)(x[rows], labels[rows]), y)
    return gradient(model)


def while_capturing(action: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    """For what only a capture refuses, and a warm-up does not."""

    def run(losses: Tensor) -> None:
        if torch.cuda.is_current_stream_capturing():
            action(losses)

    return run


def fails(losses: Tensor) -> None:
    raise ValueError("a bug in the losses")


FAILING: dict[str, tuple[Callable[[Tensor], Any], type[BaseException], str]] = {
    "synchronisation in a warm-up": (lambda losses: losses.sum().item(), SettingError, "the passes wait for the GPU"),
    "synchronisation in the capture": (while_capturing(lambda losses: losses.sum().item()), SettingError, "captur"),
    "an error in the capture": (while_capturing(fails), ValueError, "a bug in the losses"),
}


@pytest.mark.parametrize("case", FAILING)
def test_after_a_failure_the_thread_is_on_its_stream_and_eager_steps_are_right(case):
    action, error, message = FAILING[case]
    model = net()
    x, y = batch()
    wanted = eager_gradient(model, x, y)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        values = losses_of(model)(x, y)
        action(values)
        return values

    here, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
    step = ImbSAM(model, COUNTS, context_rows=4).capture(losses, (x, y))
    for _ in range(2):
        with pytest.raises(error, match=message) as caught:
            step(x, y)
        assert "\n" not in str(caught.value)
        assert torch.cuda.current_stream() == here
        assert not torch.cuda.is_current_stream_capturing()
        assert torch.cuda.get_sync_debug_mode() == mode
        del caught
    buffers = [b.clone() for b in model.buffers()]
    found = eager_gradient(model, x, y)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert all(not torch.equal(b, now) for b, now in zip(buffers, model.buffers(), strict=True))  # no stale stream


@pytest.mark.parametrize("side_stream", [False, True])
def test_a_step_on_a_side_stream_stays_there(side_stream):
    """After a capture that succeeds and after one that fails."""
    model, (x, y) = net(), batch()
    bad = False

    def losses(x: Tensor, y: Tensor) -> Tensor:
        values = losses_of(model)(x, y)
        return values * values.sum().item() if bad else values

    step = ImbSAM(model, COUNTS, context_rows=4).capture(losses, (x, y), capture="auto")
    stream = torch.cuda.Stream() if side_stream else torch.cuda.current_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        step(x, y)
        assert torch.cuda.current_stream() == stream
        bad = True
        with pytest.warns(UserWarning, match="the steps run eagerly: the passes wait for the GPU"):
            step(x, torch.tensor(LABELS[1]))  # another number of sharp rows: another graph
        assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()


def test_a_synchronisation_is_found_before_a_capture_begins(monkeypatch):
    model, (x, y) = net(), batch()
    begun: list[Any] = []
    real = CudaGraphs._capture
    monkeypatch.setattr(CudaGraphs, "_capture", lambda self, *args: begun.append(args) or real(self, *args))
    step = ImbSAM(model, COUNTS, context_rows=4).capture(
        lambda x, y: losses_of(model)(x, y) * float(x.sum() > 0), (x, y)
    )
    with pytest.raises(SettingError, match=r"cannot be captured: the passes wait for the GPU \(.item\(\), "):
        step(x, y)
    assert not begun


def test_another_thread_may_wait_for_the_gpu_meanwhile():
    """One that writes a checkpoint: the modes of the last warm-up and of the capture do not end it."""
    model, (x, y) = net(), batch()
    stop, waited = threading.Event(), 0
    failed: list[RuntimeError] = []

    def copy_weights() -> None:
        nonlocal waited
        values = torch.ones(8, device="cuda")
        try:
            while not stop.is_set():
                values.cpu()
                waited += 1
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=copy_weights)
    thread.start()
    try:
        step = ImbSAM(model, COUNTS, context_rows=4).capture(losses_of(model), (x, y))
        for labels in LABELS:
            assert step(x, torch.tensor(labels)).isfinite()
    finally:
        stop.set()
        thread.join()
    assert not failed
    assert waited


def test_failed_captures_keep_no_memory():
    """A cycle of the error and its frames would hold a graph and the tensors of its passes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 4)).cuda()
    x, y = torch.randn(BATCH, 1024, device="cuda"), torch.tensor(LABELS[0])
    sam = ImbSAM(model, COUNTS)

    def losses(x: Tensor, y: Tensor) -> Tensor:
        values = losses_of(model)(x, y)
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("a bug in the losses")
        return values

    gc.collect()
    gc.disable()
    try:
        allocated = []
        for _ in range(4):
            with pytest.raises(ValueError, match="a bug"):
                sam.capture(losses, (x, y))(x, y)
            torch.cuda.synchronize()
            allocated.append(torch.cuda.memory_allocated())
        assert allocated[3] <= allocated[1]  # the first one allocates cuBLAS's workspaces
    finally:
        gc.enable()


@pytest.mark.parametrize("kept", ["logits", "loss"])
def test_an_output_of_an_earlier_forward_that_is_kept_is_named(kept):
    """Its graph has the parameters' gradient nodes on the default stream; once it is deleted, the capture succeeds."""
    model, (x, y) = net(), batch()
    alive = model(x)
    if kept == "loss":
        alive = alive.sum()
        alive.backward(retain_graph=True)
        model.zero_grad()
    step = ImbSAM(model, COUNTS, context_rows=4).capture(losses_of(model), (x, y), pass_sizes=range(2, BATCH, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch also warns of the nodes' stream in the warm-up
        with pytest.raises(SettingError, match=r"an earlier forward's output is still alive .*: delete it") as caught:
            step(x, y)
    assert "\n" not in str(caught.value)
    del alive, caught
    wanted = eager_gradient(model, x, y)
    torch.manual_seed(1)
    step(x, y)
    torch.testing.assert_close(gradient(model), wanted, rtol=1e-9, atol=1e-12)


def weight_norm(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)


@pytest.mark.parametrize("reparametrise", [lambda m: nn.utils.prune.l1_unstructured(m, "weight", 0.5), weight_norm])
def test_weights_computed_by_a_hook_are_captured(reparametrise):
    """Also after an eager forward, which leaves a weight with its graph as an attribute, and at a later new shape."""
    model = net()
    reparametrise(model[0])
    step = ImbSAM(model, COUNTS, context_rows=4).capture(losses_of(model), batch(), pass_sizes=range(2, BATCH, 2))
    for i in (0, 1, 4):
        x, y = batch()[0], torch.tensor(LABELS[i])
        wanted = eager_gradient(model, x, y)
        assert model[0].weight.grad_fn is not None
        torch.manual_seed(1)
        step(x, y)
        torch.testing.assert_close(gradient(model), wanted, rtol=1e-9, atol=1e-12)


def test_no_warning_of_a_deprecated_call(recwarn, capfd):
    """Torch writes this one to stderr, past Python's warnings."""
    model, (x, y) = net(), batch()
    step = ImbSAM(model, COUNTS, context_rows=4).capture(losses_of(model), (x, y))
    for _ in range(2):
        step(x, y)
    said = capfd.readouterr().err + "".join(str(w.message) for w in recwarn)
    assert "register_generator_state" not in said


def test_out_of_memory_while_capturing_trains_eagerly():
    """A capture that asks for more than there is; the eager step does not."""
    model, (x, y) = net(), batch()

    def losses(x: Tensor, y: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.empty(2**46, device="cuda")  # 256 TiB
        return losses_of(model)(x, y)

    wanted = eager_gradient(model, x, y)
    step = ImbSAM(model, COUNTS, context_rows=4).capture(losses, (x, y), capture="auto")
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="the steps run eagerly: the GPU is out of memory"):
        step(x, y)
    torch.testing.assert_close(gradient(model), wanted, rtol=1e-9, atol=1e-12)
