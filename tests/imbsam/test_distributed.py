"""Several processes match one process with the joint batch: DDP, synchronised BatchNorm and FSDP2."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from imbsam import CCSAM, GSAM, SAM, SSESAM, ClassAwareSAM, FocalSAM, ImbSAM, Plain, SettingError
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes

COUNTS = [100, 10]
STEPS = 30
SHARDED_STEPS = 10  # FSDP2 is slow on the CPU
ROWS = 6  # of a rank


def joint_batches(ranks: int) -> list[tuple[Tensor, Tensor]]:
    """Tail rows on every rank, on rank 1 only, nowhere, and rank 1 all tail."""
    generator = torch.Generator().manual_seed(0)
    mixed, none, all_tail = [0, 1, 0, 0, 1, 0], [0] * ROWS, [1] * ROWS
    others = (none + mixed) * (ranks // 2 - 1)
    labels = [mixed * ranks, none + mixed + others, none * ranks, none + all_tail + others]
    return [
        (torch.randn(ranks * ROWS, 5, dtype=torch.float64, generator=generator), torch.tensor(labels[i % 4]))
        for i in range(STEPS)
    ]


class GlooSyncBatchNorm(nn.SyncBatchNorm):
    """SyncBatchNorm does not run on the CPU; this one computes the same, with differentiable all-reduces."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0, self.eps)
        ones = x.new_ones(1)
        sums = dist_nn.all_reduce(torch.cat([x.sum(0), x.square().sum(0), ones * len(x)]))
        n = sums[-1]
        mean, square = sums[: x.shape[1]] / n, sums[x.shape[1] : -1] / n
        var = square - mean.square()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


def model(norm: Callable[[int], nn.Module] = nn.LayerNorm) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), norm(8), nn.Tanh(), nn.Linear(8, 2)).double()


ENGINES: dict[str, Callable[..., ClassAwareSAM]] = {
    "sam": lambda m, **kw: SAM(m, rho=0.3, **kw),
    "imbsam": lambda m, **kw: ImbSAM(m, COUNTS, rho=0.3, **kw),
    "imbsam batch": lambda m, **kw: ImbSAM(m, COUNTS, rho=0.3, context_rows="batch", **kw),
    "imbsam adaptive": lambda m, **kw: ImbSAM(m, COUNTS, rho=0.3, adaptive=True, **kw),
    "focal_sam": lambda m, **kw: FocalSAM(m, COUNTS, rho=0.3, **kw),
    "gsam": lambda m, **kw: GSAM(m, rho=0.3, **kw),
    "cc_sam": lambda m, **kw: CCSAM(m, COUNTS, rho=0.3, **kw),
    "sse_sam batch": lambda m, **kw: SSESAM(m, COUNTS, eta=20, rho=0.3, head_rho=0.1, context_rows="batch", **kw),
    "imbsam split": lambda m, **kw: ImbSAM(m, COUNTS, rho=0.3, first_pass="split", **kw),
    "imbsam norm": lambda m, **kw: ImbSAM(m, COUNTS, rho=0.3, perturb="norm", **kw),
    "gsam norm": lambda m, **kw: GSAM(m, rho=0.3, perturb="norm", **kw),
    "cc_sam classifier": lambda m, **kw: CCSAM(m, COUNTS, rho=0.3, perturb="classifier", **kw),
    "sgd": lambda m, **kw: Plain(m, **kw),
}
ONE_GROUP = len([i for i in range(STEPS) if i % 4 == 2])  # batches of the head alone
TWO_GROUPS = 4 * STEPS - ONE_GROUP  # which groups the joint batch has, a gradient for each, and the sum
REDUCTIONS = {
    "sgd": STEPS,
    "cc_sam": TWO_GROUPS,
    "cc_sam classifier": TWO_GROUPS,
    "sse_sam batch": TWO_GROUPS,
}  # the others: 2 a step
SHARDED = [name for name in ENGINES if name != "sgd"]
SYNCHRONISED = ["sam", "imbsam batch", "focal_sam", "sse_sam batch"]


def train(
    net: nn.Module, sam: ClassAwareSAM, ranks: int, rows: slice, steps: int = STEPS, validate: bool = False
) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    for joint_x, joint_y in joint_batches(ranks)[:steps]:
        x, y = joint_x[rows], joint_y[rows]
        if validate:
            with torch.no_grad():
                net(x)
        sam.backward(lambda r, x=x, y=y: F.cross_entropy(net(x[r]), y[r], reduction="none"), y)
        optimizer.step()
        optimizer.zero_grad()


def state(net: nn.Module) -> dict[str, Tensor]:
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in net.state_dict().items()}
    return {k.removeprefix("module."): v.detach().clone() for k, v in whole.items()}


class Counter:
    """Counts the all-reduces of the engine, which go through `dist.all_reduce`."""

    def __init__(self) -> None:
        self.calls = 0
        self.numbers: list[int] = []
        self._all_reduce = dist.all_reduce
        dist.all_reduce = self

    def __call__(self, *args: Any, **kw: Any) -> Any:
        self.calls += 1
        self.numbers.append(args[0].numel())
        return self._all_reduce(*args, **kw)


def worker(rank: int, ranks: int, folder: str) -> None:
    """Train with every engine and setting, and keep the results."""
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    found: dict[str, Any] = {}
    counter = Counter()
    for name, engine in ENGINES.items():
        if ranks > 2 and name not in ("sam", "imbsam"):
            continue
        net: nn.Module = nn.parallel.DistributedDataParallel(model())
        counter.calls, counter.numbers = 0, []
        train(net, engine(net), ranks, rows)
        found[f"numbers {name}"] = counter.numbers
        found[f"ddp {name}"], found[f"reductions {name}"] = state(net), counter.calls
    if ranks == 2:
        for name in ("imbsam", "gsam", "cc_sam", "imbsam split", "imbsam norm"):
            counter.calls = 0
            net = nn.parallel.DistributedDataParallel(model())
            train(net, ENGINES[name](net, perturbation="per_rank"), ranks, rows)
            found[f"ddp per_rank {name}"], found[f"reductions per_rank {name}"] = state(net), counter.calls
        mesh = init_device_mesh("cpu", (2,))
        for name in SHARDED:
            net = model()
            fully_shard(net[0], mesh=mesh)
            fully_shard(net, mesh=mesh)
            train(net, ENGINES[name](net), ranks, rows, SHARDED_STEPS)
            found[f"fsdp {name}"] = state(net)
        for name in (
            "sam",
            "imbsam",
            "imbsam batch",
        ):  # FSDP2 keeps gathered weights after a forward without a backward
            net = fully_shard(model(), mesh=mesh)
            train(net, ENGINES[name](net), ranks, rows, SHARDED_STEPS, validate=True)
            found[f"fsdp validated {name}"] = state(net)
            net = fully_shard(model(), mesh=mesh)
            net.set_reshard_after_backward(False)
            train(net, ENGINES[name](net), ranks, rows, SHARDED_STEPS)
            found[f"fsdp not resharded {name}"] = state(net)
        for name in SYNCHRONISED:
            net = model(GlooSyncBatchNorm)  # bare, since DistributedDataParallel refuses it on the CPU
            train(net, ENGINES[name](net, process_group=dist.group.WORLD), ranks, rows)
            found[f"sync {name}"] = state(net)
        net = model(GlooSyncBatchNorm)
        train(
            net, ENGINES["imbsam"](net, process_group=dist.group.WORLD), ranks, rows
        )  # a different number of rows on each rank: it must not hang
        found["sync imbsam"] = state(net)
        found.update(single_checks(rank, mesh))
    torch.save(found, f"{folder}/rank{rank}.pt")


def single_checks(rank: int, mesh: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    net = nn.ModuleDict({"used": nn.Linear(5, 2), "on_rank_1": nn.Linear(5, 2), "unused": nn.Linear(5, 2)}).double()
    ddp = nn.parallel.DistributedDataParallel(net)

    def losses(rows: Tensor) -> Tensor:
        logits = net["used"](x[rows]) + (net["on_rank_1"](x[rows]) if rank == 1 else 0)
        return F.cross_entropy(logits, y[rows], reduction="none")

    ENGINES["imbsam"](ddp).backward(losses, y)
    found["unreached"] = {name: layer.weight.grad is None for name, layer in net.items()}

    norm = nn.BatchNorm1d(5).double()
    sam = ENGINES["imbsam"](nn.parallel.DistributedDataParallel(nn.Sequential(norm, nn.Linear(5, 2).double())))
    norm(x + rank)
    before = norm.running_mean.clone()
    sam.broadcast_buffers()
    found["buffers"] = (before, norm.running_mean.clone())

    def refused(module: nn.Module, called: nn.Module | None = None, **settings: Any) -> str:
        sam = ENGINES["imbsam"](module, **settings)
        with pytest.raises(SettingError) as error:
            sam.backward(lambda rows: F.cross_entropy((called or module)(x[rows]), y[rows], reduction="none"), y)
        return str(error.value)

    hooked = nn.parallel.DistributedDataParallel(model())
    hooked.register_comm_hook(None, lambda state, bucket: None)
    found["comm hook"] = refused(hooked)
    stepping = model()
    stepping[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    found["hook"] = refused(stepping)
    sharded = fully_shard(model(), mesh=mesh)
    found["per_rank under fsdp"] = refused(sharded, perturbation="per_rank")
    sharded.set_requires_gradient_sync(False)
    found["no gradient sync"] = refused(sharded)
    found["static graph"] = refused(nn.parallel.DistributedDataParallel(model(), static_graph=True))
    joined = nn.parallel.DistributedDataParallel(model())
    with joined.join():
        found["join"] = refused(joined)
        joined(x[:0])  # join() counts forwards
    inner = model()
    found["built before DDP"] = refused(inner, called=nn.parallel.DistributedDataParallel(inner))

    partly = model()
    ignored = {partly[0].weight}
    fully_shard(partly, mesh=mesh, ignored_params=ignored)  # DTensors and a plain parameter
    ENGINES["imbsam"](partly).backward(lambda rows: F.cross_entropy(partly(x[rows]), y[rows], reduction="none"), y)
    found["plain and sharded"] = {n: p.grad is not None for n, p in partly.named_parameters()}
    found["ignored weight"] = state(partly)

    rows = slice(0, 4 if rank == 0 else 0)
    for name in ("imbsam", "cc_sam"):
        net = nn.parallel.DistributedDataParallel(model())
        loss = ENGINES[name](net).backward(
            lambda r, net=net: F.cross_entropy(net(x[rows][r]), y[rows][r], reduction="none"), y[rows]
        )
        found[f"empty batch {name}"] = loss, [p.grad for p in net.parameters()], x
    return found


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, Any]]]:
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    run_ranks(worker, ranks, ranks, str(folder))
    return ranks, [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, found: tuple[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    if found[0] != 2:
        pytest.skip("two processes say it all")
    return found[1]


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", list(ENGINES))
def test_ddp_is_one_process_with_the_joint_batch(found, name):
    ranks, results = found
    if f"ddp {name}" not in results[0]:
        pytest.skip("two processes say it all")
    net = model()
    train(net, ENGINES[name](net), ranks, slice(None))
    for result in results:
        assert_same(result[f"ddp {name}"], state(net))
        assert result[f"reductions {name}"] == REDUCTIONS.get(name, 2 * STEPS)


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp2_is_one_process_with_the_joint_batch(two, name):
    net = model()
    train(net, ENGINES[name](net), 2, slice(None), SHARDED_STEPS)
    for result in two:
        assert_same(result[f"fsdp {name}"], state(net))


@pytest.mark.parametrize("name", ["sam", "imbsam", "imbsam batch"])
@pytest.mark.parametrize("case", ["validated", "not resharded"])
def test_fsdp2_whose_weights_are_gathered_between_the_steps(two, name, case):
    net = model()
    train(net, ENGINES[name](net), 2, slice(None), SHARDED_STEPS)
    for result in two:
        assert_same(result[f"fsdp {case} {name}"], state(net))


def test_plain_and_sharded_parameters_together(two):
    for result in two:
        assert all(result["plain and sharded"].values())
        assert_same(result["ignored weight"], state(model()), atol=0)


@pytest.mark.parametrize("name", ["imbsam", "cc_sam"])
def test_rank_with_an_empty_batch_contributes_nothing(two, name):
    """The others need not wait for it; the mean over the ranks counts it as 0."""
    net, y = model(), torch.tensor([0, 0, 1, 1])
    x = two[0][f"empty batch {name}"][2]
    loss = ENGINES[name](net).backward(lambda r: F.cross_entropy(net(x[r]), y[r], reduction="none"), y)
    assert two[0][f"empty batch {name}"][0] == loss
    assert two[1][f"empty batch {name}"][0] == 0
    for result in two:
        for found, p in zip(result[f"empty batch {name}"][1], net.parameters(), strict=True):
            torch.testing.assert_close(found, p.grad / 2)


@pytest.mark.parametrize("name", SYNCHRONISED)
def test_synchronised_batch_norm_is_that_of_the_joint_batch(two, name):
    net = model(nn.BatchNorm1d)
    train(net, ENGINES[name](net), 2, slice(None))
    for result in two:
        assert_same(result[f"sync {name}"], state(net), atol=1e-10)


def test_synchronised_batch_norm_with_context_rows_keeps_the_ranks_together(two):
    assert_same(two[0]["sync imbsam"], two[1]["sync imbsam"], atol=0)


@pytest.mark.parametrize("name", ["imbsam", "gsam", "cc_sam", "imbsam split", "imbsam norm"])
def test_per_rank_perturbation_is_the_mean_of_the_ranks_own_gradients(two, name):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    for x, y in joint_batches(2):
        optimizer.zero_grad()
        for rows in (slice(0, ROWS), slice(ROWS, 2 * ROWS)):
            own = copy.deepcopy(net)
            own.zero_grad()
            ENGINES[name](own).backward(
                lambda r, x=x[rows], y=y[rows], own=own: F.cross_entropy(own(x[r]), y[r], reduction="none"), y[rows]
            )
            for p, q in zip(net.parameters(), own.parameters(), strict=True):
                p.grad = q.grad / 2 if p.grad is None else p.grad + q.grad / 2
        optimizer.step()
    for result in two:
        assert_same(result[f"ddp per_rank {name}"], state(net))
        assert result[f"reductions per_rank {name}"] == STEPS


def test_only_the_gradients_of_what_is_perturbed_are_averaged_for_e(two):
    """The weights and biases of a layer's norm, and a number for each parameter that says who has a gradient."""
    params = list(model().parameters())
    gradient = sum(p.numel() for p in params) + len(params)
    for result in two:
        assert result["numbers imbsam"][:2] == [gradient, gradient]
        assert result["numbers imbsam norm"][:2] == [2 * 8 + 2, gradient]


def test_parameter_that_no_rank_reaches_keeps_grad_none(two):
    for result in two:
        assert result["unreached"] == {"used": False, "on_rank_1": False, "unused": True}


def test_broadcast_buffers_copies_rank_0(two):
    (before_0, after_0), (before_1, after_1) = (result["buffers"] for result in two)
    assert not torch.equal(before_0, before_1)
    assert torch.equal(after_0, before_0)
    assert torch.equal(after_1, before_0)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("comm hook", "module has a DDP communication hook"),
        ("hook", "0.weight has a hook on its accumulated gradient"),
        ("per_rank under fsdp", 'perturbation is "per_rank", but module is sharded by FSDP2'),
        ("no gradient sync", "module has set_requires_gradient_sync(False)"),
        ("static graph", "static_graph=True"),
        ("join", "module is under DistributedDataParallel.join()"),
        ("built before DDP", "process_group is None on several processes"),
    ],
)
def test_what_cannot_work_is_refused_by_name(two, case, message):
    for result in two:
        assert message in result[case]


def test_perturbation_setting_is_checked():
    with pytest.raises(SettingError, match=r'perturbation is \'local\': give "global" or "per_rank"'):
        ImbSAM(model(), COUNTS, perturbation="local")
