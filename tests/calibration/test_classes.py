"""Tasks of classes: a head, a probe, and the names that texts have."""

import open_clip
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from timm.utils import accuracy

from elip_models.analysis.model_features import image_features
from elip_models.calibration.classes import FOLDS, Head, Probe, ZeroShot
from elip_models.calibration.linear_probe import LinearProbe
from elip_models.calibration.task import Part
from tests.helpers.models import open_clip_pair
from tests.helpers.towers import images, plain_vit

CLASSES, N = 3, 60


@pytest.fixture
def blobs():
    """Return features (N, 8) of three classes, and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % CLASSES
    return torch.eye(8)[labels] + 0.3 * torch.randn(N, 8, generator=generator), labels


def of_features(model, pixels):
    """A model that returns what it is given."""
    return pixels.flatten(1)


def probe(labels, own=False):
    return Probe(torch.zeros(len(labels), 3, 2, 2), labels, features=of_features, own=own)


def part(numbers, outputs, dense=None):
    outputs = {"features": outputs[list(numbers)]}
    return Part(tuple(numbers), outputs, outputs if dense is None else {"features": dense})


def value(measure):
    return measure.statistic(measure.rows.sum(0)[None]).item()


def test_the_probe_is_scikit_learns(blobs):
    features, labels = blobs
    probe = LinearProbe.fit(features[:40], labels[:40], inverse_penalty=0.1)
    scaled = ((features.double() - probe.mean) / probe.deviation).numpy()
    oracle = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(scaled[:40], labels[:40])
    # scikit-learn subtracts the mean over classes, which changes no probability
    weight = probe.weight - probe.weight.mean(0)
    torch.testing.assert_close(weight, torch.tensor(oracle.coef_), atol=1e-4, rtol=0)
    expected = torch.from_numpy(oracle.predict(scaled[40:]))
    assert probe.correct(features[40:], expected).mean() == 1


@pytest.mark.parametrize("own", [False, True])
def test_images_that_choose_are_measured_by_probes_of_other_folds(own):
    """A probe that has seen an image of noise classifies it rightly."""
    noise = torch.randn(N, 200, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(N) % 2
    task = probe(labels, own)
    chosen_on = Part(tuple(range(N)), {"features": noise}, {"features": noise})
    measured = task.measured(chosen_on)
    assert len(measured) == 1 + own
    assert all(value(measure) < 0.7 for measure in measured.values())
    assert LinearProbe.fit(noise, labels).correct(noise, labels).mean() == 1


@pytest.mark.parametrize("own", [False, True])
def test_images_held_back_are_measured_by_a_probe_of_the_others(blobs, own):
    features, labels = blobs
    halves = range(0, N, 2), range(1, N, 2)
    labels = labels[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    features = torch.eye(8)[labels] + 0.3 * features
    task = probe(labels, own)
    turned = features.roll(1, 1)  # reduced features of another form
    parts = [part(half, turned, features[list(half)]) for half in halves]
    measured = {name: value(measure) for name, measure in task.measured(*parts).items()}
    of_dense = LinearProbe.fit(features[::2], labels[::2])
    assert measured["top-1"] == of_dense.correct(turned[1::2], labels[1::2]).mean()
    if own:
        own_probe = LinearProbe.fit(turned[::2], labels[::2])
        expected = own_probe.correct(turned[1::2], labels[1::2]).mean()
        assert measured["top-1, own probe"] == expected > measured["top-1"] + 0.5
        assert tuple(measured) == ("top-1, own probe", "top-1")


def test_a_probe_at_chance_is_an_error():
    labels = torch.arange(N) % 2
    constant = torch.ones(N, 4)
    with pytest.raises(ValueError, match="labels: expected classes that a linear probe of dense"):
        probe(labels).measured(part(range(N), constant))


@torch.no_grad()
def test_a_head_has_the_accuracy_of_timms_own_evaluation():
    torch.manual_seed(0)
    model, pixels = plain_vit(num_classes=7).eval(), images(20)
    logits = torch.cat([model(batch) for batch in pixels.split(8)])
    labels = logits.argsort(1)[torch.arange(20), torch.tensor([6, 5, 4, 1, 0] * 4)]
    task = Head(pixels, labels, classes=list("abcdefg"), batch_size=8)
    outputs = task.outputs(model, range(20), lambda count: None)
    measured = task.measured(Part(range(20), outputs, {}))
    expected = accuracy(logits, labels, topk=(1, 5))
    assert [100 * value(measured[name]) for name in ("top-1", "top-5")] == pytest.approx(
        [share.item() for share in expected], abs=0
    )
    assert task.answers(range(20), outputs) == ["abcdefg"[i] for i in logits.argmax(1)]
    assert task.truths([3]) == ["abcdefg"[labels[3]]]


def test_a_head_of_few_classes_has_no_top_5():
    assert Head(images(8), torch.zeros(8).long(), classes=list("abcde")).measures == ("top-1",)


def test_a_head_that_is_right_by_chance_is_an_error():
    task = Head(images(8), torch.ones(8).long(), classes=list("abcde"))
    outputs = {"top": torch.zeros(8, 5, dtype=torch.int32)}
    with pytest.raises(
        ValueError, match=r"labels: expected classes that the head tells apart, got"
    ):
        task.measured(Part(range(8), outputs, outputs))


@torch.no_grad()
def test_zero_shot_is_open_clips():
    torch.manual_seed(0)
    model, pixels = open_clip_pair().eval(), torch.randn(8, 3, 32, 32)
    names, templates = ["a", "b", "c"], (lambda name: f"{name} one", lambda name: f"two {name}")

    def tokenizer(texts):
        return torch.tensor([[1, *(ord(x) % 40 + 2 for x in text), 49, 0, 0][:8] for text in texts])

    pixels = torch.randn(8, 3, *model.visual.image_size)
    task = ZeroShot(
        pixels,
        torch.arange(8) % 3,
        model=model,
        tokenizer=tokenizer,
        classes=names,
        templates=templates,
    )
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
    torch.testing.assert_close(task.of_classes.T, expected)
    features, _ = image_features(model)
    wanted = torch.nn.functional.normalize(features(model, pixels), dim=1) @ expected
    outputs = task.outputs(model, range(8), lambda count: None)
    assert torch.equal(outputs["top"][:, 0].long(), wanted.argmax(1))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1], TypeError, r"labels: expected an int64 tensor \(n,\), got"),
        (torch.zeros(8).long(), ValueError, "labels: expected at least two classes"),
        (torch.zeros(0).long(), ValueError, "labels: expected 8, one an image, got 0"),
        (torch.arange(9), ValueError, "labels: expected 8, one an image, got 9"),
        (torch.arange(8) // 4, ValueError, f"expected at least {2 * FOLDS} images of each class"),
        (torch.arange(8) - 1, ValueError, "labels: expected numbers from 0, got -1"),
    ],
)
def test_bad_labels_are_named(labels, error, message):
    with pytest.raises(error, match=message):
        Probe(images(8), labels, features=of_features)
