"""`imbsam check`."""

import shutil

from tests.pieces import anomaly

SHORT = ["--config", "configs/data/digits_lt.yaml"]


def test_it_shows_the_classes_and_leaves_nothing_behind(imbsam, tmp_path):
    code, out, _ = imbsam("check", *SHORT)
    assert code == 0
    assert "336 training samples of 10 classes" in out
    assert "tail: 5 classes" in out
    assert "training: 11 batches, the first one float32 (32, 1, 8, 8), int64 (32,)" in out
    assert "validation: none" in out
    assert list(tmp_path.iterdir()) == []


def test_every_file_that_cannot_be_read_is_named(imbsam, tmp_path, image_folder_root):
    """Of training, validation and test; whatever a training would do with them."""
    root = tmp_path / "images"
    shutil.copytree(image_folder_root, root)
    config = ["--config=configs/data/image_folder.yaml", f"--data.root={root}", "--data.val_share=0"]
    code, out, _ = imbsam("check", *config)
    assert (code, "the data can be read" in out) == (0, True)
    bad = [root / "train/ant/train 3.jpg", root / "val/bee/val 0.jpg", root / "test/dog/test 1.jpg"]
    bad[0].write_bytes(b"")
    bad[1].write_text("no image")
    bad[2].write_bytes(bad[2].read_bytes()[:100])
    for more in ([], ["--data.corrupt_images=skip"]):
        code, out, err = imbsam("check", *config, *more)
        assert code == 2
        assert "ant" in out  # the table all the same
        assert f"{bad[0]}: the file is empty" in out
        assert f"{bad[1]}: the file is not an image" in out
        assert f"{bad[2]}: " in out
        assert err.splitlines()[-1].startswith("imbsam: error: 3 files cannot be read: ")


def test_tables_of_anomalies_too(imbsam):
    code, out, _ = imbsam("check", *anomaly("devnet", "imbsam"))
    assert code == 0
    assert "training samples: 995 unlabelled, 10 anomaly" in out
    assert "the data can be read" in out


def test_what_a_training_would_refuse_is_one_line(imbsam, tmp_path):
    code, _, err = imbsam("check", "--config=configs/data/image_folder.yaml", "--data.root=nowhere")
    assert (code, "data.root is nowhere, which is no folder" in err) == (2, True)
