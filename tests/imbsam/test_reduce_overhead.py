"""Passes of a model under torch.compile(mode="reduce-overhead"); that it works with graphs is for a GPU to show."""

import pytest
import torch

import imbsam.reduce_overhead
from tests.imbsam.capture.nets import assert_same, batches, of_rows, pair, state


@pytest.mark.parametrize(("method", "passes"), [("plain", 1), ("sam", 2), ("imbsam batch", 2), ("imbsam 4", 3)])
def test_each_pass_is_marked_and_gives_the_same(monkeypatch, method, passes):
    marked, plain = pair(method)
    x, y = batches(1)[0]
    torch.manual_seed(0)
    plain.backward(of_rows(plain.module, x, y), y)
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    monkeypatch.setattr(imbsam.reduce_overhead, "_manager", lambda device: object())
    torch.manual_seed(0)
    marked.backward(of_rows(marked.module, x, y), y)
    assert len(marks) == passes
    assert_same(state(marked), state(plain))


def test_nothing_is_asked_of_torch_compile_where_it_has_no_graphs(monkeypatch):
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", pytest.fail)
    sam, _ = pair("imbsam 4")
    x, y = batches(1)[0]
    sam.backward(of_rows(sam.module, x, y), y)
