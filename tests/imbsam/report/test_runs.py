"""Reading runs: what counts, and what is skipped by name."""

import shutil

import pytest

from imbsam.report.runs import find_folders, read_run, read_runs


def test_what_cannot_be_reported_is_skipped_by_name(tmp_path, write_run):
    good = write_run(tmp_path, "a/sgd", seed=0)
    broken = {}

    def spoil(seed, reason):
        run = write_run(tmp_path, "a/sgd", seed=seed)
        broken[run] = reason
        return run

    cut = spoil(1, "metrics.csv is cut off") / "metrics.csv"
    cut.write_text(cut.read_text()[:-4])
    row = spoil(2, "metrics.csv is cut off") / "metrics.csv"
    row.write_text(row.read_text().rstrip("\n").rpartition(",")[0] + "\n")
    going = spoil(3, "not tested yet") / "metrics.csv"
    going.write_text("epoch,step,train/loss_epoch\n0,9,2.0\n")
    (spoil(4, "metrics.csv is empty") / "metrics.csv").write_text("")
    (spoil(5, "config.yaml is empty or no mapping") / "config.yaml").write_text("")
    (spoil(6, "config.yaml cannot be read") / "config.yaml").write_text("model: {init_args: {rho: 0.")
    (spoil(7, "it has no config.yaml") / "config.yaml").unlink()
    tested = spoil(8, "a test, a prediction") / "metrics.csv"
    tested.write_text("epoch,step,test/all\n0,0,0.9\n")
    (spoil(9, "its per_class.csv has no column accuracy") / "per_class.csv").write_text("class,count\n0,5\n")
    words = spoil(10, "its metrics.csv has 'zero' as lr") / "metrics.csv"
    words.write_text(words.read_text().replace("0.1,", "zero,"))
    older = spoil(11, "its log has no test/medium") / "metrics.csv"
    older.write_text(older.read_text().replace("test/medium", "test/middle"))
    empty = tmp_path / "a/sgd/version_99"
    empty.mkdir()
    broken[empty] = "no metrics.csv"

    runs, skipped = read_runs([tmp_path])
    assert [run.folder for run in runs] == [good]
    assert set(skipped) == set(broken)
    for run, reason in broken.items():
        assert reason in skipped[run], run


def test_a_run_without_the_evaluation_files_is_read(tmp_path, write_run):
    run = read_run(write_run(tmp_path, "a/sgd", files=False))
    assert run.classes == []
    assert run.final["test/all"] > 0


def test_the_newest_of_the_same_settings_and_seed_counts(tmp_path, write_run):
    folders = [write_run(tmp_path, "a/sgd", seed=0) for _ in range(11)]
    other = write_run(tmp_path, "b/sgd", seed=0)  # the code may have changed
    runs, skipped = read_runs([tmp_path, folders[3]])
    assert [run.folder.parent.parent.name for run in runs] == ["a", "b"]
    assert runs[0].folder.name == "version_10"
    assert runs[1].folder == other
    assert len(skipped) == 10


def test_an_evaluation_beside_a_run_is_no_run(tmp_path, write_run):
    run = write_run(tmp_path, "a/sgd", seed=0)
    shutil.copytree(run, run.with_name("test_0"))
    assert find_folders(tmp_path) == [run]
    assert find_folders(run.with_name("test_0")) == [run.with_name("test_0")]  # asked for by name


def test_folders_without_runs_are_named(tmp_path):
    runs, skipped = read_runs([tmp_path, tmp_path / "nowhere"])
    assert runs == []
    assert list(skipped.values()) == ["there is no run in it", "no such folder"]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.yaml", b"\xff\xfe: 1", "its config.yaml cannot be read"),
        (
            "per_class.csv",
            b"class,class_name,training_samples,group,tail,test_samples,accuracy\n0,a,x,many,0,1,1\n",
            "'x' as",
        ),
        ("metrics.csv", b"epoch,test/average_precision\n1,0.5\n", "its log has no training loss: a test"),
    ],
)
def test_a_damaged_run_is_skipped_by_name(tmp_path, write_run, file, content, reason):
    good, bad = write_run(tmp_path, "data/good"), write_run(tmp_path, "data/bad")
    (bad / file).write_bytes(content)
    runs, skipped = read_runs([tmp_path])
    assert [run.folder for run in runs] == [good]
    assert reason in skipped[bad]
