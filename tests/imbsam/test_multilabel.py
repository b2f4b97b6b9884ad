"""Multi-label targets: every pair of a row and a class is what a row is otherwise, compared with the reference."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imbsam import CCSAM, GSAM, SAM, ClassAwareSAM, FocalSAM, ImbSAM, Plain, SettingError, reference
from imbsam.extra_passes import extra_pass_rows
from tests.imbsam.capture.nets import captured
from tests.ranks import run_ranks

BATCH, CLASSES = 16, 3
COUNTS = torch.tensor([[300, 200], [450, 50], [495, 5]])  # of 500 samples: without and with the class
Y = torch.zeros(BATCH, CLASSES, dtype=torch.int64)
Y[::2, 0] = Y[[1, 2, 5], 1] = Y[[4, 5, 9], 2] = 1
WEIGHT = [[0.5, 1.0], [1.0, 2.0], [1.0, 3.0]]
EACH = [[0.0, 0.3], [0.2, 1.0], [0.0, 1.1]]

METHODS: dict[str, Callable[..., ClassAwareSAM]] = {
    "sam": lambda m, **kw: SAM(m, **kw),
    "imbsam": lambda m, **kw: ImbSAM(m, COUNTS, **kw),
    "imbsam doubled": lambda m, **kw: ImbSAM(m, COUNTS, tail_weight=2.0, **kw),
    "imbsam named": lambda m, **kw: ImbSAM(m, COUNTS, tail_classes=[2], **kw),
    "imbsam whole class": lambda m, **kw: ImbSAM(m, COUNTS[:, 1], **kw),
    "focal_sam": lambda m, **kw: FocalSAM(m, COUNTS, **kw),
    "gsam": lambda m, **kw: GSAM(m, COUNTS, alpha=0.7, **kw),
    "own": lambda m, **kw: ClassAwareSAM(m, sharpness_weight=EACH, **kw),
    "plain": lambda m, **kw: Plain(m, **kw),
}
SHARPNESS = {
    "sam": torch.ones(3, 2),
    "imbsam": torch.tensor([[0, 0], [0, 0], [0, 1]]),
    "imbsam doubled": torch.tensor([[0, 0], [0, 0], [0, 1]]),
    "imbsam named": torch.tensor([[0, 0], [0, 0], [0, 1]]),
    "imbsam whole class": torch.tensor([[0, 0], [0, 0], [1, 1]]),
    "focal_sam": 0.8 * (1 - COUNTS.double() / 500) ** 3,
    "gsam": torch.ones(3, 2),
    "own": torch.tensor(EACH, dtype=torch.float64),
    "plain": torch.zeros(3, 2),
}
"""c of each class and label, written out."""


def network(norm: nn.Module | None = None) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), norm or nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    return net, torch.randn(BATCH, 5, dtype=torch.float64)


def pair_losses(net: nn.Module, x: Tensor, y: Tensor = Y) -> Callable[[Tensor], Tensor]:
    def losses(rows: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(net(x[rows]), y[rows].double(), reduction="none")

    return losses


def of_pairs(weights: Any, y: Tensor = Y) -> Tensor:
    """The weight of every pair, one by one."""
    weights = torch.as_tensor(weights, dtype=torch.float64)
    return torch.stack([torch.stack([weights[j, y[i, j]] for j in range(y.shape[1])]) for i in range(len(y))])


def gradient(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def expected(net: nn.Module, x: Tensor, c: Tensor, a: Tensor | float = 1.0, **settings: Any) -> tuple[Tensor, Tensor]:
    """Gradient and loss of the reference, to which every pair is a sample."""
    own = copy.deepcopy(net)
    a = a.flatten() if isinstance(a, Tensor) else a
    losses = pair_losses(own, x)
    loss = reference.backward(
        lambda: losses(torch.arange(BATCH)).flatten(), list(own.parameters()), c.flatten(), a, rho=0.1, **settings
    )
    return gradient(own), loss


@pytest.mark.parametrize("weights", [None, WEIGHT], ids=["unweighted", "class weights"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("context_rows", [0, "batch", "auto", 4])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_the_objectives(method, context_rows, adaptive, weights):
    net, x = network()
    settings = {} if method == "plain" else {"rho": 0.1, "adaptive": adaptive}
    sam = METHODS[method](net, class_weight=weights, context_rows=context_rows, **settings)
    a = of_pairs(WEIGHT) if weights else torch.ones(BATCH, CLASSES, dtype=torch.float64)
    if method == "imbsam doubled":
        a = a * (1 + of_pairs(SHARPNESS[method]))
    more = {"alpha": 0.7} if method == "gsam" else {}
    wanted, wanted_loss = expected(net, x, of_pairs(SHARPNESS[method]), a, adaptive=adaptive, **more)
    loss = sam.backward(pair_losses(net, x), Y)
    torch.testing.assert_close(gradient(net), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, wanted_loss)


def test_sam_is_two_plain_passes_of_the_mean():
    net, x = network()
    own = copy.deepcopy(net)
    SAM(net, rho=0.1).backward(pair_losses(net, x), Y)
    plain = nn.BCEWithLogitsLoss()  # its mean is over the pairs
    first = torch.autograd.grad(plain(own(x), Y.double()), list(own.parameters()))
    norm = torch.cat([g.flatten() for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(own.parameters(), first, strict=True):
            p += 0.1 * g / norm
    plain(own(x), Y.double()).backward()
    torch.testing.assert_close(gradient(net), gradient(own), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [ImbSAM, FocalSAM])
def test_a_single_class_is_the_binary_problem(method):
    """One column of labels, and the same labels as class indices 0 and 1 with the class counts of both."""
    net, x = network()
    net[3] = nn.Linear(8, 1).double()
    y, grads, losses = Y[:, 2], [], []
    for targets, counts in ((y, COUNTS[2]), (y[:, None], COUNTS[2:])):
        net.zero_grad()

        def loss_of(rows: Tensor, targets: Tensor = targets) -> Tensor:
            logits = net(x[rows]).reshape(len(rows), *targets.shape[1:])
            return F.binary_cross_entropy_with_logits(logits, targets[rows].double(), reduction="none")

        losses.append(method(net, counts, rho=0.1, tail_weight=2.0).backward(loss_of, targets))
        grads.append(gradient(net))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("method", ["imbsam", "imbsam doubled", "focal_sam", "sam"])
def test_micro_batches_are_one_batch(method):
    net, x = network()
    METHODS[method](net, rho=0.1).backward(pair_losses(net, x), Y)
    joint = gradient(net)
    net.zero_grad()
    parts = [torch.arange(0, 4), torch.arange(4, 11), torch.arange(11, BATCH)]  # the first without a sharp row
    METHODS[method](net, rho=0.1).backward([(pair_losses(net, x[part], Y[part]), Y[part]) for part in parts])
    torch.testing.assert_close(gradient(net), joint, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("method", ["imbsam", "imbsam doubled"])
def test_batch_norm_sees_the_sharp_rows_and_their_context(method):
    """g_all(w) + g_s(w + e) - g_s(w), with g_s by passes over the rows with a sharp pair and 6 others."""
    net, x = network(nn.BatchNorm1d(8))
    own = copy.deepcopy(net)
    params, losses = list(own.parameters()), pair_losses(own, x)
    rows = torch.tensor(extra_pass_rows([4, 5, 9], BATCH, 6))
    a = 2.0 if method == "imbsam doubled" else 1.0

    def g_s() -> list[Tensor]:
        return list(torch.autograd.grad(a * losses(rows)[:3, 2].sum() / (BATCH * CLASSES), params))

    weights = 1 + (a - 1) * of_pairs(SHARPNESS["imbsam"])
    g_all = torch.autograd.grad((weights * losses(torch.arange(BATCH))).mean(), params)
    at_w = g_s()
    norm = torch.cat([g.flatten() for g in at_w]).norm()
    with torch.no_grad():
        for p, g in zip(params, at_w, strict=True):
            p += 0.1 * g / norm
    wanted = torch.cat([(g + up - at).flatten() for g, up, at in zip(g_all, g_s(), at_w, strict=True)])

    METHODS[method](net, rho=0.1, context_rows=6).backward(pair_losses(net, x), Y)
    torch.testing.assert_close(gradient(net), wanted, rtol=1e-10, atol=1e-13)
    assert int(net[1].num_batches_tracked) == 1


def test_only_the_rows_with_a_sharp_pair_take_extra_passes():
    net, x = network()
    seen = []

    def losses(rows: Tensor) -> Tensor:
        seen.append(rows.tolist())
        return pair_losses(net, x)(rows)

    METHODS["imbsam"](net).backward(losses, Y)
    assert seen == [list(range(BATCH)), [4, 5, 9, 0], [4, 5, 9, 0]]  # 3 rows, rounded up to 4
    seen.clear()
    METHODS["imbsam"](net).backward(losses, Y * torch.tensor([1, 1, 0]))
    assert seen == [list(range(BATCH))]


@pytest.mark.parametrize("first_pass", ["whole", "split"])
@pytest.mark.parametrize("perturb", ["all", "classifier"])
def test_a_split_first_pass_and_a_part_of_the_parameters(first_pass, perturb):
    net, x = network()
    chosen = [perturb == "all" or name.startswith("3.") for name, _ in net.named_parameters()]
    wanted, _ = expected(net, x, of_pairs(SHARPNESS["imbsam"]), perturbed=chosen)
    METHODS["imbsam"](net, rho=0.1, first_pass=first_pass, perturb=perturb).backward(pair_losses(net, x), Y)
    torch.testing.assert_close(gradient(net), wanted, rtol=1e-10, atol=1e-12)


def test_own_sharpness_weights_of_pairs():
    net, x = network()
    c = torch.rand(BATCH, CLASSES, dtype=torch.float64).where(Y == 1, 0.0)
    wanted, _ = expected(net, x, c)
    SAM(net, rho=0.1).backward(pair_losses(net, x), sharpness_weight=c)
    torch.testing.assert_close(gradient(net), wanted, rtol=1e-10, atol=1e-12)


def test_grad_scaler():
    net, x = network()
    net.float()
    losses = pair_losses(net, x.float(), Y)
    sam = METHODS["imbsam"](net, rho=0.1, context_rows="batch")
    sam.backward(lambda rows: losses(rows).float(), Y)
    wanted = gradient(net)
    net.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    sam.backward(lambda rows: losses(rows).float(), Y, backward=lambda loss, **kw: scaler.scale(loss).backward(**kw))
    scaler.unscale_(torch.optim.SGD(net.parameters(), lr=0.1))
    torch.testing.assert_close(gradient(net), wanted)


def train(net: nn.Module, sam: ClassAwareSAM, rows: slice) -> list[Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        x = torch.randn(BATCH, 5, dtype=torch.float64, generator=generator)[rows]
        y = [Y, Y * torch.tensor([1, 1, 0]), Y.roll(7, 0)][step % 3][rows]
        sam.backward(pair_losses(net, x, y), y)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in net.parameters()]


def rank_of_two(rank: int, folder: str) -> None:
    found = {}
    for method in ("imbsam", "imbsam doubled", "focal_sam", "sam"):
        net = nn.parallel.DistributedDataParallel(network()[0])
        found[method] = train(net, METHODS[method](net, rho=0.3), slice(rank * BATCH // 2, (rank + 1) * BATCH // 2))
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.processes
def test_two_ranks_are_one_process_with_the_joint_batch(tmp_path: Path):
    """Rows 4, 5 and 9 are sharp, or 11, 12 and 0: on both ranks; in every third step none is."""
    run_ranks(rank_of_two, 2, str(tmp_path))
    for method, wanted in torch.load(tmp_path / "0.pt").items():
        net = network()[0]
        for p, q in zip(train(net, METHODS[method](net, rho=0.3), slice(None)), wanted, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_captured_step_refuses_them_or_runs_eagerly():
    net, x = network()

    def losses_of(x: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(net(x), y.double(), reduction="none")

    refusing = captured(METHODS["imbsam"](net), losses_of, (x, Y))
    with pytest.raises(SettingError, match=r"cannot be captured: targets are multi-label"):
        refusing(x, Y)
    eager = captured(METHODS["imbsam"](net), losses_of, (x, Y), fall_back=True)
    with pytest.warns(UserWarning, match="targets are multi-label"):
        eager(x, Y)
    assert gradient(net).any()


@pytest.mark.parametrize(
    ("sam", "targets", "message"),
    [
        (METHODS["imbsam"], Y - 1, r"targets holds -1: multi-label targets"),
        (METHODS["imbsam"], Y[:, :2], r"targets has 2 columns for the 3 classes of sharpness_weight"),
        (METHODS["imbsam"], Y[:, 0], r"sharpness_weight has shape \(3, 2\).*targets is not multi-label"),
        (METHODS["sam"], Y[:, 0], r"losses\(rows\) returned shape \(16, 3\) for 16 rows.*integers 0 and 1, \(B, C\)"),
        (METHODS["sam"], Y.double(), r"row that sums to 2: .*targets.long\(\)"),
        (lambda m: CCSAM(m, COUNTS[:, 1]), Y, r"targets are multi-label, and this method has a perturbation for each"),
        (lambda m: CCSAM(m, COUNTS), Y, r"class_counts has shape \(3, 2\)"),
        (lambda m: SAM(m, class_weight=torch.ones(3, 3)), Y, r"class_weight has shape \(3, 3\)"),
        (lambda m: ImbSAM(m, COUNTS, class_weight=[1.0, 2.0]), Y, r"class_weight has 2 entries for 3 classes"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(sam, targets, message):
    net, x = network()
    with pytest.raises(SettingError, match=message) as error:
        sam(net).backward(pair_losses(net, x), targets)
    assert "\n" not in str(error.value)
    assert all(p.grad is None for p in net.parameters())


def test_losses_of_rows_where_pairs_are_expected():
    net, x = network()
    losses = pair_losses(net, x)
    with pytest.raises(
        SettingError, match=r"returned shape \(16,\) for 16 rows: return one loss for each row and class"
    ):
        METHODS["imbsam"](net).backward(lambda rows: losses(rows).mean(1), Y)
