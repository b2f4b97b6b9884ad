"""The detectors' losses against their papers' formulas, their scores, their preparation."""

import numpy as np
import pytest
import torch

from imbsam import SettingError
from imbsam.sklearn import ImbSAMOutlierDetector
from lightning_modules.detectors import FEAWAD, DeepSAD, DevNet, PReNet, WeightedClassifier
from tests.pieces import merged

D = 6


@pytest.fixture
def rows():
    """400 samples; the first 20 are labelled anomalies, away from the others."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 + 0.1 * torch.randn(400, D, generator=generator)
    labels = (torch.arange(400) < 20).long()
    x[:20, :3] += 0.4
    return x, labels


def built(kind, x, labels, **settings):
    torch.manual_seed(0)
    detector = kind(x.shape[1:], **settings)
    detector.prepare(x, labels)
    return detector


def test_devnet_loss(rows):
    x, labels = rows
    detector = built(DevNet, x, labels, margin=3.0)
    reference = detector.reference_mean.item(), detector.reference_std.item()
    assert reference == pytest.approx((0, 1), abs=0.05)
    w1, b1, w2, b2 = (p.detach().numpy() for p in detector.parameters())
    assert w1.shape == (20, D)
    phi = np.maximum(x.numpy() @ w1.T + b1, 0) @ w2[0] + b2[0]
    dev = (phi - reference[0]) / reference[1]
    expected = [max(0, 3 - d) if y else abs(d) for d, y in zip(dev, labels.tolist(), strict=True)]
    assert detector.losses(x, labels).tolist() == pytest.approx(expected, abs=1e-5)
    assert detector.scores(x).tolist() == pytest.approx(phi.tolist(), abs=1e-5)


def test_deep_sad_loss_centre_and_spread(rows):
    x, labels = rows
    detector = built(DeepSAD, x, labels, eta=2.0)
    assert all(p.dim() > 1 for p in detector.parameters()), "no bias"
    w1, w2 = (p.detach().double().numpy() for p in detector.parameters())
    hidden = x.double().numpy() @ w1.T
    phi = np.where(hidden > 0, hidden, 0.01 * hidden) @ w2.T
    centre = phi.mean(0)
    near = np.abs(centre) < 0.1
    assert near.any()
    centre[near] = np.where(centre[near] < 0, -0.1, 0.1)
    distance = ((phi - centre) ** 2).sum(1)
    distance /= distance.mean()
    expected = np.where(labels.numpy() == 1, 2 / (distance + 1e-6), distance)
    assert detector.losses(x, labels).tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert detector.scores(x).tolist() == pytest.approx(distance.tolist(), rel=1e-4)


def test_there_is_one_deep_sad(rows):
    """Detector and estimator: the same network, settings and objective, so the same scores from the same weights."""
    x, labels = rows
    estimator = ImbSAMOutlierDetector(max_epochs=2, random_state=0).fit(x, np.where(labels == 1, -1, 1))
    detector = DeepSAD((D,)).double()
    assert [p.shape for p in detector.encoder.parameters()] == [p.shape for p in estimator.network_.parameters()]
    assert [type(m) for m in detector.encoder] == [type(m) for m in estimator.network_]
    detector.encoder.load_state_dict(estimator.network_.state_dict())
    detector.objective.load_state_dict(estimator.objective_.state_dict())
    scaled = torch.from_numpy(estimator.scaler_.transform(x))
    np.testing.assert_allclose(detector.scores(scaled).detach(), -estimator.score_samples(x), rtol=1e-10)
    config = merged("data/anomaly_table", "detector/deep_sad")
    optimizer = config["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.Adam"
    assert optimizer["init_args"]["lr"] == estimator.learning_rate
    assert optimizer["init_args"]["weight_decay"] == estimator.weight_decay
    assert config["data"]["init_args"]["batch_size"] == estimator.batch_size
    (stopping,) = config["trainer"]["callbacks"]
    assert stopping["init_args"]["passes_without_validation"] == ImbSAMOutlierDetector().max_epochs


def test_deep_sad_pretraining_learns_to_reconstruct(rows):
    from lightning_modules.detectors.autoencoder import pretrain
    from lightning_modules.detectors.detector import mlp

    torch.manual_seed(0)
    encoder, decoder = mlp([D, 16, 4]), mlp([4, 16, D])
    x, _ = rows

    def error():
        return (decoder(encoder(x)) - x).square().mean().item()

    before = error()
    pretrain(encoder, decoder, x, steps=200, lr=1e-2)
    assert error() < before / 5
    assert all(p.grad is None for p in encoder.parameters())


def test_deep_sad_takes_images():
    images, labels = torch.rand(40, 3, 8, 8), (torch.arange(40) < 4).long()
    detector = built(DeepSAD, images, labels, pretrain_steps=2)
    assert detector.losses(images, labels).shape == (40,)
    with pytest.raises(SettingError, match="divisible by 4"):
        DeepSAD((1, 6, 6))
    with pytest.raises(SettingError, match="takes tables"):
        DevNet((1, 8, 8))


def test_prenet_loss_and_scores(rows):
    x, labels = rows
    detector = built(PReNet, x, labels, references=5)
    w1, b1, w2, b2 = (p.detach().numpy() for p in detector.parameters())

    def phi(left, right):
        both = np.concatenate([np.maximum(part @ w1.T + b1, 0) for part in (left, right)])
        return float(both @ w2[0] + b2[0])

    chosen = torch.tensor([[0, 1], [2, 300], [301, 3], [310, 320]])
    pairs, pair_labels = x[chosen], labels[chosen]
    expected = [
        abs(target - phi(*pair)) for target, pair in zip((8, 4, 4, 0), pairs.numpy().astype(np.float64), strict=True)
    ]
    assert detector.losses(pairs, pair_labels).tolist() == pytest.approx(expected, abs=1e-5)

    anomalous, unlabelled = detector.anomalous_references.numpy(), detector.unlabelled_references.numpy()
    known = {tuple(row) for row in x[labels == 1].tolist()}
    assert all(tuple(row.tolist()) in known for row in detector.anomalous_references)
    assert not any(tuple(row.tolist()) in known for row in detector.unlabelled_references)
    row = x[50].numpy()
    expected_score = (sum(phi(a, row) for a in anomalous) + sum(phi(row, u) for u in unlabelled)) / 10
    assert detector.scores(x[50:51]).item() == pytest.approx(expected_score, abs=1e-5)


def test_feawad_loss(rows):
    x, labels = rows
    detector = built(FEAWAD, x, labels, encoder=[5, 3], hidden=[7, 4], pretrain_steps=20)
    p = {name: value.detach().double().numpy() for name, value in detector.named_parameters()}
    rows_ = x.double().numpy()

    def linear(name, inputs):
        return inputs @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    code = np.maximum(linear("encoder.0.2", np.maximum(linear("encoder.0.0", rows_), 0)), 0)
    residual = rows_ - linear("decoder.2", np.maximum(linear("decoder.0", code), 0))
    e = np.linalg.norm(residual, axis=1, keepdims=True)
    out = np.maximum(linear("layers.0", np.hstack([code, residual / e, e])), 0)
    out = np.maximum(linear("layers.1", np.hstack([out, e])), 0)
    phi, e = linear("layers.2", np.hstack([out, e]))[:, 0], e[:, 0]
    expected = np.where(labels.numpy() == 1, np.maximum(0, 5 - phi) + np.maximum(0, 5 - e), np.abs(phi) + e)
    assert detector.losses(x, labels).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert detector.scores(x).tolist() == pytest.approx(phi.tolist(), abs=1e-4)


def test_feawad_has_a_gradient_where_the_reconstruction_is_perfect():
    detector = FEAWAD((D,))
    for p in detector.parameters():
        torch.nn.init.zeros_(p)
    detector.losses(torch.zeros(2, D), torch.tensor([0, 1])).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())


def test_classifier_loss(rows):
    x, labels = rows
    for weighted in (True, False):
        detector = built(WeightedClassifier, x, labels, weighted=weighted)
        weights = np.array([400 / (2 * 380), 400 / (2 * 20)]) if weighted else np.ones(2)
        phi = detector.scores(x).detach().double().numpy()
        sign = 2 * labels.numpy() - 1
        expected = weights[labels.numpy()] * np.log1p(np.exp(-sign * phi))
        assert detector.losses(x, labels).tolist() == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("kind", [DevNet, DeepSAD, PReNet, FEAWAD, WeightedClassifier])
def test_learns_to_score_anomalies_higher(kind, rows):
    x, labels = rows
    detector = built(kind, x, labels)
    optimizer = torch.optim.Adam(detector.parameters(), lr=5e-3)
    for _ in range(150):
        # half anomalies; pairs of all kinds
        chosen = torch.cat([torch.randint(20, (32,)), torch.randint(20, 400, (32,))])
        if detector.uses_pairs:
            chosen = torch.stack([chosen, chosen[torch.randperm(64)]], dim=1)
        optimizer.zero_grad()
        detector.losses(x[chosen], labels[chosen]).mean().backward()
        optimizer.step()
    scores = detector.scores(x)
    assert (scores[:20, None] > scores[None, 20:]).float().mean() > 0.95


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DevNet, {"hidden": [0]}, "hidden is"),
        (PReNet, {"targets": [0, 8]}, "give three"),
        (FEAWAD, {"pretrain_steps": -1}, "pretrain_steps is -1"),
    ],
)
def test_wrong_settings(kind, settings, message, rows):
    with pytest.raises(SettingError, match=message):
        built(kind, *rows, **settings)


@pytest.mark.parametrize("kind", [PReNet, WeightedClassifier])
def test_no_labelled_anomaly(kind, rows):
    x, labels = rows
    with pytest.raises(SettingError, match="labelled anomal"):
        built(kind, x, torch.zeros_like(labels))


@pytest.mark.parametrize("kind", [DevNet, DeepSAD, FEAWAD, WeightedClassifier])
def test_no_hidden_layer_is_a_linear_detector(kind, rows):
    assert built(kind, *rows, hidden=[]).scores(rows[0]).shape == (400,)


def test_nothing_to_compare_or_encode_is_refused():
    with pytest.raises(SettingError, match=r"hidden is \[\]: PReNet compares features"):
        PReNet((D,), hidden=[])
    with pytest.raises(SettingError, match=r"encoder is \[\]: FEAWAD needs an autoencoder"):
        FEAWAD((D,), encoder=[])
