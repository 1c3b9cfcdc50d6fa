"""`calibrate` chooses as a full table does, on images that do not judge the choice."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import elip_models
from elip_models.calibration import run
from elip_models.calibration.calibrate import _slowest_first, calibrate
from elip_models.calibration.candidates import STRATEGIES, TowerCandidates
from elip_models.calibration.choice import is_within, split
from elip_models.calibration.classes import Head
from elip_models.calibration.costs import Cost
from elip_models.calibration.pictures import merged_picture
from elip_models.calibration.run import Run
from elip_models.calibration.search import Search
from elip_models.intervals import Interval
from elip_models.strategies.spec import parse_spec
from tests.helpers.towers import images, plain_vit

FEW = ("tome:compare=keys", "tome", "evit")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return plain_vit().eval()


@pytest.fixture(scope="module")
def pictures():
    torch.manual_seed(1)
    return images(24)


@pytest.fixture(scope="module")
def head(model, pictures):
    """Return a task whose labels are what the dense model answers."""
    with torch.no_grad():
        return Head(pictures, model(pictures).argmax(1), classes=list("abcde"))


def named(results, role):
    return next((setting for setting in results.settings if setting.role == role), None)


def test_every_strategy_without_a_text_is_compared():
    """`patch_dropout` does nothing in inference, `trips` needs a text, `random` is a control."""
    compared = {parse_spec(text)[0] for text in STRATEGIES}
    assert compared == elip_models.STRATEGIES.keys() - {"patch_dropout", "trips", "random"}


@pytest.mark.parametrize("order", [FEW, FEW[::-1]])
@pytest.mark.parametrize("tolerance", [1e-3, 0.01, 0.1, 0.3, 1.0])
def test_the_search_chooses_as_the_full_table_and_tries_less(tolerance, order):
    """Losses rise as the FLOPs fall, steeper for EViT."""
    candidates = TowerCandidates(plain_vit(depth=12))

    def is_low(setting):
        steep = 1 + isinstance(setting.strategy, elip_models.EViT)
        return 1.1 * steep * (1 - setting.flops) ** 2 <= tolerance

    found, full = (Search(is_low, every=every) for every in (False, True))
    for text in order:
        for search in (found, full):
            search.add(candidates.falling(text))
    cheapest, expected = (
        min((setting.flops for setting in search.within), default=1) for search in (found, full)
    )
    assert cheapest == pytest.approx(expected, abs=0.01)
    assert len(found.tried) < len(full.tried) / 2


def test_a_setting_that_fails_on_few_images_is_not_measured_on_all(model, head, monkeypatch):
    measured = []

    def is_within(setting):
        measured.append(setting)
        return setting.flops > 0.6

    falling = TowerCandidates(plain_vit(depth=12)).falling("tome")
    search = Search(is_within, is_promising=lambda setting: setting.flops > 0.5)
    search.add_all([falling])
    assert search.tried == measured and min(s.flops for s in measured) > 0.5
    assert min(s.flops for s in search.within) == min(s.flops for s in falling if s.flops > 0.6)


def test_if_every_setting_fails_on_few_images_the_safest_is_reported(model, head, monkeypatch):
    monkeypatch.setattr(run, "PORTIONS", (6,))
    monkeypatch.setattr(run, "may_be_within", lambda *_: False)
    results = calibrate(model, task=head, strategies=FEW, tolerance=1e-9, time=False)
    tried = [setting for setting in results.settings if setting.role == "tried"]
    assert results.chosen is None
    assert len(tried) == 1 and f"The nearest is `{tried[0].name}`" in results.sentence()


def test_the_model_stays_as_it_was(pictures):
    model = plain_vit().train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    calibrate(model, pictures, strategies=("tome",), tolerance=0.5, time=False)
    assert not elip_models.is_reduced(model) and model.training
    assert model.num_classes == 5
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_the_images_needed_go_by_the_wider_interval_of_both_parts(model, head):
    options = {"seed": 0, "minutes": 0, "folder": None, "batch_size": 8}
    run = Run(model, head, 0.01, progress=lambda text: None, announce=lambda text: None, **options)
    narrow, wide = Interval(-0.005, -0.02, 0.01), Interval(0.0, -0.08, 0.08)
    for pair in ((narrow, wide), (wide, narrow)):
        of_parts = ({"top-1": interval} for interval in pair)
        choice = SimpleNamespace(**dict(zip(("differences", "held_back"), of_parts, strict=True)))
        margin = pair[1].mean + 0.01
        assert run.needed(choice, ()) == pytest.approx(24 * (0.08 / margin) ** 2, abs=2)


def test_the_nearest_setting_is_that_of_the_images_that_lose_most(model, head):
    """The control can be nearer, but nobody tried it."""
    results = calibrate(model, task=head, strategies=("merge", "evit"), tolerance=1e-9, time=False)
    tried = [setting for setting in results.settings if setting.role == "tried"]
    assert results.chosen is None and results.nearest in tried
    assert results.nearest.differences["top-1"].low == max(
        setting.differences["top-1"].low for setting in tried
    )


def test_a_setting_that_saves_no_time_is_chosen_only_if_none_saves_any():
    def tested(*times):
        settings = [SimpleNamespace(name=str(i), flops=1 - i / 10) for i in range(len(times))]
        costs = {str(i): Cost({"8": time}, None) for i, time in enumerate(times)}
        return "".join(setting.name for setting in _slowest_first(settings, costs))

    assert tested(0.9, 0.8, 0.7, 0.5, 0.52) == "234"
    assert tested(0.96, 0.98) == "0" and tested(1.0, 1.02) == "01"


def test_the_choice_is_measured_on_images_that_did_not_choose(model, pictures, head):
    results = calibrate(model, task=head, strategies=("tome",), tolerance=0.6, time=False)
    chosen_on, held_back = split(24, head.groups(), seed=0)
    reduced = elip_models.reduce_(plain_vit().eval(), "tome", r=0)
    reduced.load_state_dict(model.state_dict())
    elip_models.reduce_(reduced, results.chosen.strategy["strategy"], r=_rate(results.chosen))
    with torch.no_grad():
        right = (reduced(pictures).argmax(1) == head.labels).double()
    for part, interval in (
        (chosen_on, results.chosen.differences["top-1"]),
        (held_back, results.chosen.held_back["top-1"]),
    ):
        assert interval.mean == pytest.approx(right[list(part)].mean() - 1)
    assert results.confirmed == is_within(results.chosen.held_back["top-1"], 0.6)
    assert results.counts == {"chosen_on": len(chosen_on), "held_back": len(held_back)}


def _rate(setting):
    rate = setting.strategy["settings"]["r"]
    return tuple(rate) if isinstance(rate, list) else rate


def test_the_picture_has_patches_if_the_last_block_drops_all(model, pictures, head):
    reduced = elip_models.reduce_(copy.deepcopy(model), "merge:class_token_only=true", keep=0.7)
    picture = Image.open(io.BytesIO(merged_picture(head, reduced, 0)))
    assert len(picture.getcolors(1 << 20)) > 10


def test_a_smaller_image_of_the_same_cost_is_the_control(model, head):
    results = calibrate(model, task=head, strategies=("tome",), tolerance=0.9, time=False)
    control = named(results, "control")
    assert control.strategy["strategy"] == "resize"
    assert control.held_back and control.flops == pytest.approx(results.chosen.flops, abs=0.15)


def test_compared_settings_are_measured_and_not_chosen(model, head):
    options = {"strategies": ("tome",), "time": False, "tolerance": 0.9}
    results = calibrate(model, task=head, compare=["evit 0.5"], **options)
    compared = named(results, "compared")
    assert compared.strategy["strategy"] == "evit" and compared.held_back
    assert compared.kept == pytest.approx(0.5, abs=0.05)
    assert results.chosen == calibrate(model, task=head, **options).chosen


def test_times_are_of_one_image_and_of_a_batch(model, head):
    results = calibrate(model, task=head, strategies=("tome", "evit"), tolerance=0.9, batch_size=4)
    assert results.chosen.time.keys() == {"1", "4"}
    assert all(time > 0 for time in results.chosen.time.values())
    fastest = min(setting.time["4"] for setting in results.settings if setting.role != "control")
    assert results.chosen.time["4"] <= fastest + 0.03


def test_a_few_images_give_a_first_answer(model, pictures, monkeypatch):
    monkeypatch.setattr(run, "PORTIONS", (2, 4))
    answers = []
    calibrate(
        *(model, pictures),
        strategies=("tome",),
        tolerance=0.9,
        time=False,
        announce=answers.append,
    )
    (answer,) = answers
    assert answer.startswith("First answer, on 4 images: tome 0.")
    assert "points of cosine (95% CI" in answer


def test_minutes_bound_the_number_of_images(model, head, monkeypatch):
    monkeypatch.setattr(run, "PORTIONS", (8, 16))
    announced = []
    options = {"task": head, "strategies": ("tome",), "tolerance": 0.9, "time": False}
    short = calibrate(model, minutes=1e-9, announce=announced.append, **options)
    assert sum(short.counts.values()) == pytest.approx(8, abs=4)  # of each class its share
    assert announced == [f"About 8 of {head.count} images, for 1e-09 minutes."]
    assert sum(calibrate(model, minutes=1e9, **options).counts.values()) == head.count


def test_a_second_run_computes_no_outputs(model, head, tmp_path, monkeypatch):
    options = {"task": head, "strategies": ("tome",), "tolerance": 0.6, "time": False}
    first = calibrate(model, folder=tmp_path, **options)
    monkeypatch.setattr(type(head), "outputs", None)
    assert calibrate(model, folder=tmp_path, **options) == first


@pytest.mark.slow
def test_a_distilled_setting_is_one_step_cheaper(model, head, tmp_path):
    saved = []
    results = calibrate(
        model, task=head, strategies=("evit",), tolerance=0.9, distill=2, save=saved.append
    )
    distilled = named(results, "distilled")
    assert distilled.flops <= results.chosen.flops and distilled.held_back
    assert elip_models.is_reduced(saved[0])


def test_no_setting_within_the_tolerance_has_no_choice(model, head):
    results = calibrate(model, task=head, strategies=FEW, tolerance=1e-9, time=False)
    assert results.chosen is None and not results.confirmed
    assert len([setting for setting in results.settings if setting.role == "tried"]) == len(FEW)


def test_a_strategy_that_cannot_reduce_the_model_is_reported(pictures):
    model = plain_vit(class_token=False, global_pool="avg").eval()
    results = calibrate(model, pictures, strategies=("evit", "tome"), tolerance=0.9, time=False)
    assert "evit" in results.refused and results.chosen is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": "cosin"}, ValueError, "task: expected 'cosine' or .*did you mean 'cosine'"),
        ({"task": "probe"}, ValueError, "task: expected 'cosine' or .*; pass labels"),
        ({"labels": torch.arange(24) % 2, "task": "cosine"}, ValueError, "'probe' or 'own-probe'"),
        ({"task": lambda a, b: 0.1}, TypeError, r"task: expected a function that returns .*12,"),
        ({"images": images(7)}, ValueError, "images: expected .* at least 8, got 7"),
        ({"images": None}, TypeError, "images: expected .* got None"),
        ({"images": torch.zeros(8, 3, 32, 32)}, ValueError, "images: expected 48 x 48 pixels"),
        ({"compare": "evit"}, TypeError, "compare: expected a sequence of texts"),
        ({"strategies": "evit"}, TypeError, "strategies: expected a sequence of texts"),
        ({"compare": ["evti 0.7"]}, ValueError, "did you mean 'evit'"),
        ({"tolerance": 0}, ValueError, "tolerance: expected"),
    ],
)
def test_a_bad_argument_is_named(model, pictures, options, error, message):
    with pytest.raises(error, match=message):
        calibrate(**{"model": model, "images": pictures, "time": False} | options)


def test_a_reduced_model_is_refused(pictures):
    with pytest.raises(ValueError, match="expected one that reduce_ has not changed"):
        calibrate(elip_models.reduce_(plain_vit()), pictures)


def test_the_former_name_of_the_task_warns(model, pictures):
    with pytest.warns(DeprecationWarning, match="`metric` is now `task`; version 0.3.0 removes"):
        results = calibrate(
            model, pictures, metric="neighbours", strategies=("tome",), tolerance=0.9, time=False
        )
    assert results.task == "neighbours"


def test_features_that_are_not_finite_are_an_error(model, pictures):
    pictures = pictures.index_fill(0, torch.tensor([3]), torch.nan)
    with pytest.raises(ValueError, match=r"NaN or infinity for images\[3\]; remove it"):
        calibrate(model, pictures, task="neighbours", time=False, strategies=FEW)
