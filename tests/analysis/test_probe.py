"""A probe of features, and `calibrate` with labels."""

import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

import elip_models
from elip_models.analysis.calibrate import calibrate
from elip_models.analysis.probe import FOLDS, Probe, ProbeLoss
from tests.helpers.tiny_run import elip
from tests.helpers.towers import images, plain_vit

CLASSES, N = 3, 60


@pytest.fixture
def blobs():
    """Return features (N, 8) of three classes, and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % CLASSES
    return torch.eye(8)[labels] + 0.3 * torch.randn(N, 8, generator=generator), labels


def test_the_probe_is_scikit_learns(blobs):
    features, labels = blobs
    probe = Probe.fit(features[:40], labels[:40], inverse_penalty=0.1)
    scaled = ((features.double() - probe.mean) / probe.deviation).numpy()
    oracle = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(scaled[:40], labels[:40])
    # scikit-learn subtracts the mean over classes, which changes no probability
    weight = probe.weight - probe.weight.mean(0)
    torch.testing.assert_close(weight, torch.tensor(oracle.coef_), atol=1e-4, rtol=0)
    expected = torch.from_numpy(oracle.predict(scaled[40:]))
    assert probe.correct(features[40:], expected).mean() == 1


def test_the_loss_is_of_held_out_images_and_paired(blobs):
    features, labels = blobs
    loss = ProbeLoss(labels)
    assert sorted(torch.cat(loss.folds).tolist()) == list(range(N)) and len(loss.folds) == FOLDS
    assert loss(features, features).abs().sum() == 0
    others = features.roll(1, 0)  # of another class each
    correct = loss.correct(features)
    assert correct.mean() > 0.8
    assert torch.equal(loss(features, others), correct - loss.correct(others))
    assert loss(features, others).mean() > 0.5
    noise = torch.randn(N, 200, generator=torch.Generator().manual_seed(1))
    memorised = ProbeLoss(labels)
    memorised(noise, noise)
    assert memorised.correct(noise).mean() < 0.6  # it would be 1 for images of its own fold


def test_labels_decide_what_calibrate_chooses():
    """Classes that differ in brightness can be told from few tokens."""
    torch.manual_seed(0)
    model, labels = plain_vit().eval(), torch.arange(24) % 2
    pictures = images(24) * 0.1 + labels[:, None, None, None] * 3
    calibration = calibrate(
        model, pictures, labels=labels, strategies=("tome", "resize"), tolerance=0.5, time=False
    )
    assert calibration.metric == "top-1"
    assert calibration.chosen.flops < 0.5 and calibration.chosen.loss.high <= 0.5
    elip_models.reduce_(model, calibration.chosen.strategy)
    with pytest.raises(ValueError, match="expected one that reduce_ has not changed"):
        calibrate(model, pictures, labels=labels)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": [0, 1]}, TypeError, r"labels: expected an int64 tensor \(n,\), got"),
        ({"labels": torch.zeros(8).long()}, ValueError, "labels: expected at least two classes"),
        ({"labels": torch.zeros(0).long()}, ValueError, "labels: expected 8, one an image, got 0"),
        (
            {"labels": torch.arange(8) // 4},
            ValueError,
            "labels: expected at least 5 images of each",
        ),
        ({"labels": torch.arange(9)}, ValueError, "labels: expected 8, one an image, got 9"),
        (
            {"labels": torch.arange(8), "metric": "cosine"},
            ValueError,
            "metric: expected none with labels",
        ),
    ],
)
def test_a_bad_argument_is_named(options, error, message):
    with pytest.raises(error, match=message):
        calibrate(plain_vit().eval(), images(8), time=False, **options)


def test_the_command_reads_labels_of_folders_and_of_a_file(tmp_path, capsys):
    rows = []
    for i in range(12):
        kind = ("dark", "light")[i % 2]
        path = tmp_path / "photographs" / kind / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (200 * (i % 2) + i,) * 3).save(path)
        rows.append(f"{kind}/{i}.png,{kind}")
    table, output = tmp_path / "labels.csv", tmp_path / "found.json"
    table.write_text("\n".join(rows))
    arguments = "timm:test_vit", tmp_path / "photographs", "--no-pretrained", "--output", output
    for labels in ("folders", table):
        assert elip("calibrate", *arguments, "--labels", labels, "--tolerance", 0.9) == 0
        shown = capsys.readouterr().out
        assert "loss (top-1)" in shown and "The probe classifies 100.0% of" in shown
    table.write_text("\n".join(rows[1:]))
    assert elip("calibrate", *arguments, "--labels", table) == 2
    table.write_bytes(b"\x80.png,cat")
    assert elip("calibrate", *arguments, "--labels", table) == 2
    assert "dark/0.png" in capsys.readouterr().err
