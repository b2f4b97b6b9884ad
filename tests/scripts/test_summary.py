"""scripts/summary.py on the logs of runs, and on the committed results."""

import csv
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import summary

ROOT = Path(__file__).resolve().parents[2]


def log(folder, sam, seed, few):
    """The files of a finished run that the script reads."""
    folder = folder / f"version_{len(list(folder.glob('version_*')))}"
    folder.mkdir(parents=True)
    config = {
        "seed_everything": seed,
        "trainer": {"max_epochs": 1, "callbacks": None},
        "model": {"class_path": "LongTailedClassifier", "init_args": {"sam": sam}},
        "data": {"class_path": "DigitsLTDataModule", "init_args": {"seed": seed}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    columns = "epoch,train/loss_epoch,test/loss,test/many,test/medium,test/few,test/all"
    (folder / "metrics.csv").write_text(f"{columns}\n0,0.1,0.2,0.9,0.8,{few},{few / 2}\n")


def test_differences_are_paired_by_seed_and_a_second_add_replaces_the_first(tmp_path, monkeypatch, capsys):
    for seed, plain in enumerate((0.5, 0.7)):
        log(tmp_path / "logs/sgd", {"class_path": "imbsam.Plain", "init_args": {}}, seed, plain)
        log(tmp_path / "logs/sgd", {"class_path": "imbsam.Plain", "init_args": {"tail_weight": 2.0}}, seed, plain + 0.1)
        imbsam = {"rho": 0.1, "tail_weight": 2.0, "context_rows": "batch"}
        log(
            tmp_path / "logs/imbsam",
            {"class_path": "imbsam.ImbSAM", "init_args": imbsam},
            seed,
            plain + 0.1 * (seed + 1),
        )
    file, figure = tmp_path / "results/runs.csv", tmp_path / "figure.png"
    method = "ImbSAM, rho 0.1, published gradient, tail loss doubled"
    others = ("SGD", "SGD, tail loss doubled", "SAM, rho 0.05")
    monkeypatch.setattr(summary, "COMPARISONS", [summary.Comparison("my title", "mine", method, others)])

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["", f"--file={file}", f"--figure={figure}", *map(str, arguments)])
        summary.main()
        return capsys.readouterr().out

    run("add", "others", tmp_path / "logs/sgd")
    for _ in range(2):
        run("add", "mine", tmp_path / "logs")
    with file.open(newline="") as lines:
        assert [row["data"] for row in csv.DictReader(lines)] == ["mine"] * 6 + ["others"] * 4
    printed = run().splitlines()
    # few: 10 and 20 points over plain training, 0 and 10 over the doubled loss; all: half of it; SAM was not run.
    # The standard error is 5, and Student's t with one degree of freedom 12.7.
    assert printed[-1] == "| my title | +15.0 ± 63.5 | +5.0 ± 63.5 |  | +7.5 ± 31.8 | +2.5 ± 31.8 |  | 2 |"
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_star_marks_what_remains_of_all_comparisons(monkeypatch):
    gains = {"sure": (2.0, 2.1, 1.9), "likely": (1.0, 1.5, 2.0), "unsure": (-1.0, 1.0, 0.5)}
    found = {}
    for data, values in gains.items():
        for seed, gain in enumerate(values):
            found[data, "SGD", seed] = {"few": 10.0, "all": 50.0}
            found[data, "ImbSAM", seed] = {"few": 10.0, "all": 50.0 + gain}

    def stars(*data):
        comparisons = [summary.Comparison(title, title, "ImbSAM", ("SGD", "", "")) for title in data]
        monkeypatch.setattr(summary, "COMPARISONS", comparisons)
        return ["*" in line for line in summary.table(found).splitlines()[2:]]

    p_values = {title: summary.difference(found, title, "ImbSAM", "SGD", "all").p_value for title in gains}
    assert p_values == pytest.approx({"sure": 0.0008, "likely": 0.0351, "unsure": 0.8075}, abs=1e-4)
    assert summary.difference(found, "sure", "ImbSAM", "SGD", "few").p_value == 1  # no difference at all
    one = {key: values for key, values in found.items() if key[2] == 0}
    assert summary.difference(one, "sure", "ImbSAM", "SGD", "all").p_value == 1
    assert stars("sure") == [True]
    # the equal accuracies of the few-shot classes are comparisons as well: 0.0351 x 2 is too much
    assert stars("likely") == [False]
    assert stars("sure", "likely", "unsure") == [True, False, False]


@pytest.mark.parametrize("comparison", summary.COMPARISONS, ids=lambda comparison: comparison.title)
def test_the_committed_results_have_every_comparison(comparison):
    found = summary.accuracies(ROOT / summary.FILE) | summary.heads(ROOT / summary.HEADS)
    for other in comparison.others:
        assert summary.difference(found, comparison.data, comparison.imbsam, other, "all") is not None, other
