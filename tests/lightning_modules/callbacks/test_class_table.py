"""The table of classes before the first epoch."""

import re
from functools import partial

import pytest
import torch

from imbsam import ImbSAM
from lightning_modules import LongTailedClassifier
from lightning_modules.callbacks.class_table import class_rows, print_class_table

COUNTS = [3, 500, 20, 100, 19, 101]


def model(counts, **settings):
    made = LongTailedClassifier(**settings)
    made._learn_classes(torch.tensor(counts), [f"class {c}" for c in range(len(counts))])
    return made


def test_rows_have_group_and_tail_and_are_shown_by_training_samples(capsys):
    made = model(COUNTS, sam=partial(ImbSAM, eta=20), many=100, few=20)
    assert [(row.index, row.name, row.samples, row.group, row.tail) for row in class_rows(made)] == [
        (0, "class 0", 3, "few", True),
        (1, "class 1", 500, "many", False),
        (2, "class 2", 20, "medium", False),
        (3, "class 3", 100, "medium", False),
        (4, "class 4", 19, "few", True),
        (5, "class 5", 101, "many", False),
    ]
    print_class_table(made)
    assert re.findall(r"class (\d)", capsys.readouterr().out) == list("153240")
    named = class_rows(model(COUNTS, sam=partial(ImbSAM, tail_classes=[1])))
    assert [row.name for row in named if row.tail] == ["class 1"]


def test_of_a_hundred_classes_the_first_and_the_last_ten_are_shown(capsys):
    print_class_table(model(list(range(100, 0, -1))))
    shown = capsys.readouterr().out
    names = [int(name) for name in re.findall(r"class (\d+)", shown)]
    assert names == [*range(10), *range(90, 100)]
    assert re.search(r"… 80 classes *│ *4,040 ", shown)
    assert "5,050 training samples of 100 classes, imbalance ratio 100" in shown
    assert "0 many (> 100), 81 medium (20 to 100), 19 few (< 20)" in shown
    assert "tail: 19 classes with 3.8 % of the training samples" in shown
    print_class_table(model(list(range(20, 0, -1))))
    assert len(re.findall(r"class \d+", capsys.readouterr().out)) == 20


def test_a_name_with_square_brackets_is_shown_as_it_is(capsys):
    made = model([5, 3])
    made.class_names = ["[red]", "[/]"]
    print_class_table(made)
    assert {"[red]", "[/]"} <= set(capsys.readouterr().out.split())


@pytest.mark.processes
@pytest.mark.parametrize("processes", [1, 2])
def test_rank_zero_prints_it_before_the_first_epoch(run_imbsam, tmp_path, processes):
    """With the progress bar and the model summary of a user."""
    arguments = ["fit", "--config=configs/data/digits_lt.yaml", "--trainer.accelerator=cpu"]
    arguments += [f"--trainer.devices={processes}", "--trainer.max_epochs=1"]
    done = run_imbsam(tmp_path, *arguments, processes=processes)
    assert done["codes"] == [0] * processes, done
    assert [out.count("336 training samples of 10 classes") for out in done["out"]] == [1, 0][:processes]
    assert done["out"][0].index("336 training samples") < done["out"][0].index("test accuracy in %")
