"""`calibrate` chooses as a full table does, and what it saves reduces a model."""

import json

import pytest
import torch
from PIL import Image

import elip_models
from elip_models.analysis.calibrate import (
    STRATEGIES,
    _Search,
    calibrate,
)
from elip_models.intervals import Interval
from elip_models.strategies.flops import inference_ratio
from elip_models.strategies.spec import parse_spec
from elip_models.towers import as_tower
from tests.helpers.tiny_run import elip
from tests.helpers.towers import images, plain_vit

FEW = ("tome:compare=keys", "tome", "evit")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return plain_vit().eval()


@pytest.fixture(scope="module")
def pictures():
    torch.manual_seed(1)
    return images(12)


def test_every_strategy_without_a_text_is_compared():
    """`patch_dropout` does nothing in inference, `trips` needs a text, `random` is a control."""
    compared = {parse_spec(text)[0] for text in STRATEGIES}
    assert compared == elip_models.STRATEGIES.keys() - {"patch_dropout", "trips", "random"}


class Losses:
    """Losses that rise as the FLOPs fall, steeper for later strategies of `FEW`."""

    def __init__(self):
        self.tower = as_tower(plain_vit(depth=12))
        self.size = self.tower.size

    def loss(self, strategy):
        steep = 1 + [elip_models.ToMe, elip_models.EViT].index(type(strategy))
        mean = steep * (1 - inference_ratio(strategy, self.size)) ** 2
        return Interval(mean, mean / 2, 1.1 * mean)


@pytest.mark.parametrize("order", [FEW, FEW[::-1]])
@pytest.mark.parametrize("tolerance", [1e-3, 0.01, 0.1, 0.3, 1.0])
def test_the_search_chooses_as_the_full_table_and_tries_less(tolerance, order):
    found, full = (
        _Search(Losses(), tolerance, every=every, progress=lambda text: None)
        for every in (False, True)
    )
    for text in order:
        found.add(text)
        full.add(text)
    within, expected = (
        [each.flops for each in search.trials if each.loss.high <= tolerance]
        for search in (found, full)
    )
    assert min(within, default=1) == pytest.approx(min(expected, default=1), abs=0.01)
    assert len(found.trials) < len(full.trials) / 2


def test_the_model_stays_as_it_was(pictures):
    model = plain_vit().train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    calibrate(model, pictures, strategies=("tome",), tolerance=0.5, time=False)
    assert not elip_models.is_reduced(model) and model.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_saved_choice_reduces_a_model(model, pictures, tmp_path):
    found = calibrate(model, pictures, strategies=FEW, tolerance=0.9, metric="neighbours")
    assert all(each.time > 0 for each in found.trials)
    found.save(tmp_path / "calibrated.json")
    reduced = elip_models.reduce_(plain_vit(), str(tmp_path / "calibrated.json"))
    assert elip_models.reduction_summary(reduced).strategy == found.chosen.strategy
    saved = json.loads((tmp_path / "calibrated.json").read_text())["calibration"]
    assert saved["result"] == found.sentence() in str(found)
    assert len(saved["trials"]) == len(found.trials)


def test_no_setting_within_the_tolerance_is_said(model, pictures, tmp_path):
    found = calibrate(model, pictures, strategies=FEW, tolerance=1e-9, time=False)
    assert found.chosen is None
    assert found.sentence().startswith("No setting is within 1e-09 on these 12 images: the nearest")
    assert len(found.trials) == len(FEW)
    with pytest.raises(ValueError, match="expected a choice to save, got none: No setting"):
        found.save(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "cosin"}, ValueError, "metric: expected cosine or .*did you mean 'cosine'"),
        ({"metric": lambda a, b: 0.1}, TypeError, r"metric: expected a function that returns .*8,"),
        ({"images": images(7)}, ValueError, "images: expected .* at least 8 images, got"),
    ],
)
def test_a_bad_argument_is_named(model, options, error, message):
    with pytest.raises(error, match=message):
        calibrate(**{"model": model, "images": images(8), "time": False} | options)


@pytest.mark.parametrize("options", [{"metric": "neighbours"}, {"labels": torch.arange(12) % 2}])
def test_features_that_are_not_finite_are_an_error(model, pictures, options):
    pictures = pictures.index_fill(0, torch.tensor([3]), torch.nan)
    with pytest.raises(ValueError, match=r"dense model for 1 of 12 images, .* images\[3\]; remove"):
        calibrate(model, pictures, time=False, strategies=FEW, **options)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    photographs = tmp_path / "photographs" / "of summer"
    photographs.mkdir(parents=True)
    for i in range(9):
        noise = torch.randint(256, (70, 90, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(photographs / f"{i}.png")
    (photographs / "a.jpg").write_bytes(b"no image")
    own = tmp_path / "own.py"
    own.write_text("def changed(dense, reduced):\n    return (dense - reduced).abs().mean(1)\n")
    output = tmp_path / "found.json"
    arguments = "timm:test_vit", tmp_path / "photographs", "--no-pretrained", "--output", output
    assert elip("calibrate", *arguments, "--metric", f"{own}:changed", "--tolerance", 1) == 0
    shown = capsys.readouterr()
    assert "1 of 10 images were not read" in shown.err
    assert "within 1 on these 9 images" in shown.out
    assert {path.name for path in tmp_path.glob("found*")} == {"found.json", "found.png"}
    before = output.read_bytes()
    assert elip("calibrate", *arguments, "--tolerance", 1e-9) == 1
    shown = capsys.readouterr()
    assert "No setting is within 1e-09" in shown.out
    assert "found.json was not written" in shown.err and "from an earlier run" in shown.err
    assert output.read_bytes() == before
    output.unlink()
    assert elip("calibrate", *arguments, "--tolerance", 1e-9) == 1
    assert "from an earlier run" not in capsys.readouterr().err and not output.exists()
