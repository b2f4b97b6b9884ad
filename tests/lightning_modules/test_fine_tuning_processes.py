"""Fine-tuning by the command on two processes: frozen parts, what one process would give, and interruption."""

import json

import pytest
import torch

from lightning_modules.backbones import SmallCNN, Timm
from tests.pretrained import randomize
from tests.training import RANKS, csv_rows

pytestmark = pytest.mark.processes

VIT = {"img_size": 8, "in_chans": 1, "patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2}
ARGS = [*RANKS, "--model.sam.rho=0.5", "--data.eval_batch_size=45"]
NETWORKS = {
    "head": [
        *("--model.backbone=SmallCNN", "--model.backbone.width=8", "--model.backbone.norm=batch"),
        *("--model.tune=HeadOnly", "--model.tune.save_frozen=false"),
    ],
    "lora": [
        *("--model.backbone=Timm", "--model.backbone.name=vit_tiny_patch16_224"),
        f"--model.backbone.settings={json.dumps(VIT)}",
        *("--model.tune=LoRA", "--model.tune.rank=2"),
    ],
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request, tmp_path_factory):
    """Settings of the network and of what is trained, and its weights."""
    torch.manual_seed(5)
    built = SmallCNN(10, width=8, norm="batch") if request.param == "head" else Timm("vit_tiny_patch16_224", VIT)(10)
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.pth"
    torch.save(randomize(built).state_dict(), path)
    return [*NETWORKS[request.param], f"--model.backbone_weights={path}"], torch.load(path, weights_only=True)


def last(folder):
    run = folder / "logs/digits_lt/imbsam/version_0"
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True), csv_rows(run / "metrics.csv")


def test_two_processes_train_as_one_and_resume(network, run_imbsam, tmp_path):
    """The progress bar is on; two processes are stopped in their first epoch, and then resume."""
    settings, frozen = network
    found = []
    for processes in (1, 2):
        (folder := tmp_path / str(processes)).mkdir()
        args = [*ARGS, *settings, f"--trainer.devices={processes}", f"--data.batch_size={32 // processes}"]
        args += ["--trainer.precision=64-true"]
        if processes == 2:
            answer = run_imbsam(folder, *args, processes=2, signal=["SIGTERM", 5])
            assert answer["codes"] == [0, 0], answer["err"]
            assert "resume with --ckpt_path last" in answer["out"][0]
        answer = run_imbsam(folder, *args, processes=processes)
        assert answer["codes"] == [0] * processes, answer["err"]
        found.append(last(folder))
    (one, one_log), (two, two_log) = found
    assert two["state_dict"].keys() == one["state_dict"].keys()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=0, atol=1e-10)
        plain = name.removeprefix("backbone.")
        if plain in frozen and plain.partition(".")[0] not in ("fc", "head"):
            assert torch.equal(value, frozen[plain].to(value.dtype)), name  # BatchNorm's statistics too
    for name in ("test/loss", "test/all", "train/loss_epoch"):
        values = [[float(row[name]) for row in rows if row[name]] for rows in (one_log, two_log)]
        assert values[1][-1] == pytest.approx(values[0][-1], rel=1e-6), name
