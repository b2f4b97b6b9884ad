"""What cannot be captured, and what a captured step cannot take, is refused in one line."""

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

from imbsam import CCSAM, GSAM, SAM, ImbSAM, SettingError
from imbsam.capture.captured_step import CapturedStep
from tests.imbsam.capture.nets import BATCH, COUNTS, batches, captured, losses_of


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


X, Y = batches(1)[0][0].float(), batches(1)[0][1]


class Named(ImbSAM):
    """Only chooses the sharpness weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, COUNTS)


def test_a_method_that_only_chooses_weights_is_captured():
    model = net()
    assert captured(Named(model), losses_of(model), (X, Y))(X, Y).isfinite()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda m, f: SAM(m).capture(f, (X, Y)),
            r'capture is True and module is on cpu: CUDA graphs need a GPU; .*"auto"',
        ),
        (lambda m, f: SAM(m).capture(f, (X, Y), capture="always"), "capture is 'always': give True, False or \"auto\""),
        (
            lambda m, f: SAM(m).capture(lambda rows: f(X[rows], Y[rows]), (X, Y), capture="auto"),
            r"losses_of\(rows\) does not take the 2 tensors of a batch: .* not of their indices as for backward\(\)",
        ),
        (lambda m, f: SAM(m).capture(3, (X, Y), capture="auto"), "losses_of is a int: give a function"),
        (lambda m, f: SAM(m).capture(f, X, capture="auto"), "example is a Tensor: give the tensors of one batch"),
        (lambda m, f: SAM(m).capture(f, (X, Y[:3]), capture="auto"), r"example has tensors of \[24, 3\] rows"),
        (
            lambda m, f: captured(GSAM(m, COUNTS), f, (X, Y)),
            r"cannot be captured: GSAM has a step of its own \(_plan, _reduction\); set capture=False",
        ),
        (
            lambda m, f: captured(CCSAM(m, COUNTS), f, (X, Y)),
            r"cannot be captured: PartitionedSAM has a step of its own \(_plan\); set capture=False",
        ),
        (lambda m, f: captured(SAM(m), f, (X, Y), pass_sizes=[0]), "pass_sizes is .0.: give whole numbers from 1"),
    ],
)
def test_what_cannot_be_captured_is_refused(build, message):
    model = net()
    with pytest.raises(SettingError, match=message) as caught:
        build(model, losses_of(model))
    assert "\n" not in str(caught.value)


def freeze(model: nn.Module) -> None:
    model[0].bias.requires_grad_(False)


def grow(model: nn.Module) -> None:
    model.append(nn.Linear(4, 4))


def normalise(model: nn.Module) -> None:
    model.append(nn.BatchNorm1d(4, affine=False))


def prune(model: nn.Module) -> None:
    """The same parameters in the same order, under other names."""
    for name in ("weight", "bias"):
        nn.utils.prune.l1_unstructured(model[0], name, 0.5)


def move(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data.clone()


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (lambda p: p.register_hook(lambda grad: 2 * grad), r"2.bias has a hook on its gradient \(register_hook\)"),
        (
            lambda p: p.register_post_accumulate_grad_hook(lambda p: None),
            r"2.bias has a hook on its accumulated gradient",
        ),
    ],
)
def test_a_hook_on_a_parameter_is_refused_after_the_capture_too(hook, message):
    """A replay would not run it."""
    model = net()
    step = captured(ImbSAM(model, COUNTS), losses_of(model), (X, Y))
    step(X, Y)
    before = [p.grad.clone() for p in model.parameters()]
    handle = hook(model[2].bias)
    with pytest.raises(SettingError, match=message) as caught:
        step(X, Y)
    assert "\n" not in str(caught.value)
    handle.remove()
    step(X, Y)
    for p, g in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, 2 * g)


class Counted(dict):
    """A dictionary that counts how often it is gone through."""

    times = 0

    def items(self):
        self.times += 1
        return super().items()

    def values(self):
        self.times += 1
        return super().values()


def test_the_checks_of_a_step_go_through_the_parameters_once():
    model = net()
    step = captured(ImbSAM(model, COUNTS), losses_of(model), (X, Y))
    step(X, Y)
    model[0]._parameters = found = Counted(model[0]._parameters)
    step(X, Y)
    assert found.times == 1


def compiled_step(how: str, mode: str | None) -> CapturedStep:
    model = net()
    losses = losses_of(model)
    if how == "module":
        model.compile(mode=mode)
    elif how == "layer":
        model[0].compile(mode=mode)
    elif how == "wrapped":
        model = torch.compile(model, mode=mode)
    else:
        losses = torch.compile(losses, mode=mode)
    return captured(ImbSAM(model, COUNTS), losses, (X, Y))


@pytest.mark.parametrize("how", ["module", "layer", "wrapped", "losses_of"])
def test_graphs_of_torch_compile_are_refused_by_name(how):
    """Only the setting counts: nothing is compiled here."""
    compiled_step(how, "default")
    for mode in ("reduce-overhead", "max-autotune"):
        with pytest.raises(
            SettingError,
            match=r'torch.compile makes CUDA graphs of its own .mode="reduce-overhead" or "max-autotune".: compile '
            "without that mode inside a captured step",
        ) as caught:
            compiled_step(how, mode)
        assert "\n" not in str(caught.value)


def test_frozen_parameters_must_not_move_either():
    model = net()
    freeze(model)
    step = captured(ImbSAM(model, COUNTS), losses_of(model), (X, Y))
    step(X, Y)
    model[0].bias.data = model[0].bias.data.clone()
    with pytest.raises(SettingError, match=r"module's parameters have moved since capture\(\)"):
        step(X, Y)


@pytest.mark.parametrize(
    ("change", "batch", "message"),
    [
        (None, (X.double(), Y), "tensor 0 of the batch has shape .24, 6. and dtype torch.float64, captured were"),
        (None, (torch.cat([X, X]), torch.cat([Y, Y])), r"tensor 0 of the batch has shape \(48, 6\)"),
        (None, (X[:, :3], Y), r"tensor 0 of the batch has shape \(24, 3\)"),
        (None, (X,), r"the batch is \(Tensor\): give 2 tensors"),
        (None, ([],), "the list of micro-batches is empty"),
        (None, ([(X, Y), (X,)],), r"the batch is \(Tensor\): give 2 tensors"),
        (freeze, (X, Y), "module has 3 trained parameters that are not the 4 it was captured with"),
        (grow, (X, Y), "module has 6 trained parameters that are not the 4 it was captured with"),
        (normalise, (X, Y), "module has other submodules than it was captured with"),
        (prune, (X, Y), "module has other hooks than it was captured with: call capture\\(\\) again"),
        (move, (X, Y), r"module's parameters have moved since capture\(\)"),
        (None, (X, Y + 9), "targets holds the label 12"),
        (None, (X, Y[:3]), r"the batch has tensors of \[24, 3\] rows: give as many in each"),
    ],
)
def test_what_a_step_refuses(change, batch, message):
    model = net()
    step = captured(ImbSAM(model, COUNTS), losses_of(model), (X, Y))
    if change:
        change(model)
    with pytest.raises(SettingError, match=message) as caught:
        step(*batch)
    assert "\n" not in str(caught.value)
    assert all(p.grad is None for p in model.parameters())


def test_micro_batches_without_their_targets_are_refused():
    model = net()
    step = captured(ImbSAM(model, COUNTS), losses_of(model), (X, Y))
    with pytest.raises(SettingError, match="targets has 1 entries for 2 micro-batches"):
        step([(X, Y), (X, Y)], targets=[Y])


@pytest.mark.parametrize("name", ["targets", "sharpness_weight"])
def test_as_many_rows_as_the_batch_has(name):
    model = net()
    step = captured(ImbSAM(model, COUNTS), losses_of(model), (X, Y))
    with pytest.raises(SettingError, match=f"{name} has 3 rows and the batch 24: give one for each row"):
        step(X, Y, **{name: Y[:3]})


@pytest.mark.parametrize(
    ("kept", "found"),
    [(lambda z: {"logits": z}, "dict"), (lambda z: z.mean(), r"shape \(\)"), (lambda z: z[:3], "shape")],
)
@pytest.mark.parametrize("rows", [BATCH, 20], ids=["captured", "eager"])
def test_outputs_that_are_not_one_tensor_with_an_entry_a_row(kept, found, rows):
    model = net()
    step = captured(SAM(model), lambda x, y: (losses_of(model)(x, y), kept(model(x))), (X, Y))
    with pytest.raises(SettingError, match=rf"losses_of\(x, y\) returned {found}.* beside the losses of {rows} rows"):
        step(X[:rows], Y[:rows])
    assert all(p.grad is None for p in model.parameters())


def test_losses_that_are_not_one_a_row_are_refused():
    model = net()
    step = captured(SAM(model), lambda x, y: F.cross_entropy(model(x), y), (X, Y))
    with pytest.raises(SettingError, match=rf"losses_of\(x, y\) returned shape \(\) for {BATCH} rows"):
        step(X, Y)
