"""What only a GPU can show of a captured step: that it can be captured, that replays are right, and what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from imbsam import SAM, ClassAwareSAM, ImbSAM, SettingError
from imbsam.batch import SharpGradient
from tests.imbsam.capture.nets import COUNTS, LABELS, METHODS, Net

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: CUDA graphs run on no other"),
]
BATCH = len(LABELS[0])


@pytest.fixture(autouse=True)
def _the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN may choose another algorithm for the same shape, and TF32 rounds by the kernel."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Convolutions(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), norm(32), nn.ReLU(), nn.Dropout(dropout),
        )  # fmt: skip
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(dim=(2, 3)))


def batches(steps: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Images (or rows) on the GPU and labels on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(BATCH, *shape, dtype=dtype, generator=generator).cuda(), torch.tensor(LABELS[i % len(LABELS)]))
        for i in range(steps)
    ]


def pair(method: str, net: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> list[ClassAwareSAM]:
    torch.manual_seed(0)
    model = net().to("cuda", dtype)
    return [METHODS[method](model), METHODS[method](copy.deepcopy(model))]


def losses_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def of_rows(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    labels = y.cuda()
    return lambda rows: losses_of(model)(x[rows], labels[rows])


def compare(own: ClassAwareSAM, eager: ClassAwareSAM, data: Any, step: Any, tolerance: dict[str, float]) -> None:
    """Train both and compare losses, gradients, buffers, weights and where the generator stands."""
    optimizers = [torch.optim.SGD(s.module.parameters(), lr=0.05, momentum=0.9) for s in (own, eager)]
    for i, (x, y) in enumerate(data):
        for sam in (own, eager):
            if sam.rho:
                sam.rho = [0.05, 0.2][i % 2]
            if i == 4:
                sam.class_weight = [0.1, 0.5, 2.0, 3.0]
        torch.manual_seed(i)
        before = [p.detach().clone() for p in own.module.parameters()]
        loss, found = step(x, y), torch.cuda.get_rng_state()
        assert all(torch.equal(p, b) for p, b in zip(own.module.parameters(), before, strict=True))
        torch.manual_seed(i)
        wanted = eager.backward(of_rows(eager.module, x, y), y)
        assert torch.equal(found, torch.cuda.get_rng_state())
        torch.testing.assert_close(loss, wanted, **tolerance)
        for (name, p), q in zip(own.module.named_parameters(), eager.module.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
        for a, b in zip(own.module.buffers(), eager.module.buffers(), strict=True):
            torch.testing.assert_close(a, b, **tolerance)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("method", METHODS)
def test_captured_is_eager_with_every_oddity(method):
    """BatchNorm, dropout, replaced buffers, tied, frozen and unused parameters, float64."""
    own, eager = pair(method, Net)
    x, y = batches(1, 6)[0]
    step = own.capture(losses_of(own.module), (x, y), pass_sizes=range(2, BATCH, 2))
    compare(own, eager, batches(12, 6), step, {"rtol": 1e-9, "atol": 1e-12})


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda n: nn.GroupNorm(4, n)])
@pytest.mark.parametrize("method", ["sam", "imbsam batch", "imbsam 4", "asam", "imbsam norm", "imbsam classifier"])
def test_channels_last_convolutions(method, norm):
    own, eager = pair(method, lambda: Convolutions(norm, dropout=0.2).to(memory_format=torch.channels_last))
    data = [(x.to(memory_format=torch.channels_last), y) for x, y in batches(8, 3, 8, 8)]
    step = own.capture(losses_of(own.module), data[0], pass_sizes=range(2, BATCH, 2))
    compare(own, eager, data, step, {"rtol": 1e-9, "atol": 1e-12})


@pytest.mark.parametrize("perturb", ["all", "norm"])
def test_split_first_pass(perturb):
    """The two first passes are branches of one graph; fewer rows than the batch in each."""
    torch.manual_seed(0)
    model = Convolutions(lambda n: nn.GroupNorm(4, n)).to("cuda", torch.float64)
    own, eager = (
        ImbSAM(m, COUNTS, first_pass="split", perturb=perturb, rho=0.1) for m in (model, copy.deepcopy(model))
    )

    def losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = own.module(x)
        return F.cross_entropy(logits, y, reduction="none"), logits

    data = batches(10, 3, 8, 8)
    step = own.capture(losses, data[0], pass_sizes=range(2, BATCH, 2))
    compare(own, eager, data, step, {"rtol": 1e-9, "atol": 1e-12})
    shapes = [(passes.source, passes._first_rows) for passes in (r.passes for r in step._static._recordings.values())]
    assert (SharpGradient.FIRST_PASS, BATCH - 6) in shapes
    step(*data[0])
    with torch.no_grad():
        torch.testing.assert_close(step.outputs[0], own.module(data[0][0]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("enclosing", [True, False])
def test_autocast_and_grad_scaler(dtype, enclosing):
    """In half precision other kernels round elsewhere: what is compared is the direction of a gradient."""
    own, eager = pair("imbsam 4", lambda: Convolutions(nn.BatchNorm2d), torch.float32)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, enabled=dtype == torch.float16)

    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype, enabled=not enclosing or torch.is_autocast_enabled("cuda")):
            return F.cross_entropy(model(x).float(), y, reduction="none")

    data = batches(3, 3, 8, 8, dtype=torch.float32)
    step = own.capture(lambda x, y: losses(own.module, x, y), data[0], scaler=scaler, pass_sizes=range(2, BATCH, 2))
    for x, y in data:
        with torch.autocast("cuda", dtype, enabled=enclosing):
            step(x, y)
            labels = y.cuda()
            eager.backward(
                lambda rows, x=x, labels=labels: losses(eager.module, x[rows], labels[rows]),
                y,
                backward=lambda loss, **kw: scaler.scale(loss).backward(**kw),
            )
        found, wanted = (torch.cat([p.grad.flatten() for p in s.module.parameters()]) for s in (own, eager))
        assert F.cosine_similarity(found, wanted, dim=0) > 0.999
        assert 0.99 < found.norm() / wanted.norm() < 1.01
        for sam in (own, eager):
            sam.module.zero_grad()


def test_no_host_synchronisation_and_no_eager_pass_in_a_replayed_step():
    own, _ = pair("imbsam 4", lambda: Convolutions(nn.BatchNorm2d, dropout=0.1), torch.float32)
    data = [(x.cpu().pin_memory(), y) for x, y in batches(3, 3, 8, 8, dtype=torch.float32)]
    step = own.capture(losses_of(own.module), data[0])
    for x, y in data:
        step(x, y)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in data:
            own.module.zero_grad()
            step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Calls.count += "convolution" in str(func)
            return func(*args, **(kwargs or {}))

    with Calls():
        step(*data[0])
    assert Calls.count == 0


@pytest.mark.parametrize(
    "syncing",
    [lambda losses: losses * (1 + 0 * losses.sum().item()), lambda losses: losses if losses.sum() > 0 else -losses],
)
@pytest.mark.parametrize("capture", [True, "auto"])
def test_a_synchronisation_cannot_be_captured(syncing, capture):
    own, eager = pair("imbsam 4", Net)
    x, y = batches(1, 6)[0]
    before = copy.deepcopy(own.module.state_dict())
    step = own.capture(lambda x, y: syncing(losses_of(own.module)(x, y)), (x, y), capture=capture, pass_sizes=[12])
    torch.manual_seed(0)
    if capture is True:
        with pytest.raises(SettingError, match=r"capture is True, and the step cannot be captured: .*capture=False"):
            step(x, y)
        torch.testing.assert_close(own.module.state_dict(), before, rtol=0, atol=0)
        assert all(p.grad is None for p in own.module.parameters())
        own.backward(of_rows(own.module, x, y), y)  # dropout's generator still works
    else:
        with pytest.warns(UserWarning, match="the steps run eagerly"):
            step(x, y)
    torch.manual_seed(0)
    eager.backward(of_rows(eager.module, x, y), y)
    if capture == "auto":
        for p, q in zip(own.module.parameters(), eager.module.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_graphs_share_their_memory():
    torch.manual_seed(0)
    model = Convolutions(nn.BatchNorm2d).cuda()
    sam = ImbSAM(model, COUNTS, context_rows=4)
    x, y = batches(1, 3, 64, 64, dtype=torch.float32)[0]
    step = sam.capture(losses_of(model), (x, y), pass_sizes=range(2, BATCH, 2))
    reserved = []
    for sharp in (0, 2, 4, 6, 8, 10, 12):
        step(x, torch.tensor([3] * sharp + [0] * (BATCH - sharp)))
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] < 2 * reserved[1]


def test_compiled_inside_the_capture_and_reduce_overhead_outside():
    for mode, captured in (("default", True), ("reduce-overhead", False)):
        torch.compiler.reset()
        own, eager = pair("imbsam 4", lambda: Convolutions(lambda n: nn.GroupNorm(4, n)), torch.float32)
        own.module.compile(mode=mode)
        data = batches(4, 3, 8, 8, dtype=torch.float32)
        step = own.capture(losses_of(own.module), data[0], capture=captured, pass_sizes=range(2, BATCH, 2))
        compare(own, eager, data, step, {"rtol": 1e-3, "atol": 1e-5})


def test_all_reduces_stand_between_the_graphs(tmp_path):
    """One rank with NCCL: the split at the all-reduce, and DDP built on a side stream, as torch's notes ask."""
    import torch.distributed as dist

    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        own, eager = pair("imbsam 4", lambda: Convolutions(nn.BatchNorm2d))
        with torch.cuda.stream(torch.cuda.Stream()):
            model = nn.parallel.DistributedDataParallel(own.module)
        torch.cuda.synchronize()
        own = ImbSAM(model, COUNTS, context_rows=4)
        data = batches(6, 3, 8, 8)
        step = own.capture(losses_of(model), data[0], pass_sizes=range(2, BATCH, 2))
        compare(own, eager, data, step, {"rtol": 1e-9, "atol": 1e-12})
    finally:
        dist.destroy_process_group()


def test_between_steps_it_holds_the_gradient_alone():
    """Copies of the weights and gradients on the way lie in the graphs' pool, for the next graph to use."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(16))).cuda()
    parameters = sum(p.numel() * 4 for p in model.parameters())
    x, y = torch.randn(8, 2048, device="cuda"), torch.arange(8)
    step = SAM(model).capture(losses_of(model), (x, y))
    before = torch.cuda.memory_allocated()
    step(x, y)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 1.7 * parameters  # cuBLAS's workspaces are beside it
