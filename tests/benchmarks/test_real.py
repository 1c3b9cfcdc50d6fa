"""`python -m benchmarks.real`: measures, features after unmerge, results, times and their page."""

import copy
import json

import pytest
import torch
from PIL import Image

import elip_models
from benchmarks.real import __main__ as command
from benchmarks.real import dinov2, evaluation
from benchmarks.real.dinov2 import batches, photograph_paths
from benchmarks.real.evaluation import features, finds_itself, patch_cosine, read_settings
from elip_models.analysis import feature_measures
from elip_models.analysis.feature_measures import NEIGHBOURS, cosine, neighbours
from elip_models.intervals import bootstrap_interval
from elip_models.reduction.strategies import Dense
from elip_models.saving.open_model import open_model
from tests.benchmarks.weights import needs_weights
from tests.project.test_docs import script

N = 12  # photographs of `folder`


@pytest.fixture
def results(folder, model, monkeypatch, tmp_path):
    """Return a function that runs the command with the small model, and returns its JSON."""
    monkeypatch.setattr(dinov2, "timm_model", lambda: model)
    monkeypatch.setattr(command, "onnx_error", lambda model, paths: {"images": len(paths)})

    def run(*arguments):
        output = tmp_path / "results.json"
        assert command.main([str(folder), "--output", str(output), *map(str, arguments)]) == 0
        return json.loads(output.read_text())

    return run


def features_of(model, setting, images):
    (setting,) = read_settings(setting, model)
    return features(setting.unreduced, [images], setting.summary, lambda _: None), setting


def test_equal_features_have_the_best_value_of_each_measure():
    dense = torch.randn(30, 8)
    for measure in (cosine, neighbours, finds_itself):
        torch.testing.assert_close(measure(dense, 3 * dense), torch.ones(30))
    patches = torch.randn(30, 5, 8)
    torch.testing.assert_close(patch_cosine(patches, 3 * patches), torch.ones(30))
    assert finds_itself(torch.eye(30), torch.eye(30).roll(1, 0)).sum() == 0


def test_neighbours_are_counted_against_a_plain_form():
    dense, reduced = torch.randn(30, 8), torch.randn(30, 8)

    def nearest(features, i):
        unit = features / features.norm(dim=1, keepdim=True)
        order = sorted(range(30), key=lambda j: -float(unit[i] @ unit[j]))
        return set([j for j in order if j != i][:NEIGHBOURS])

    shares = [len(nearest(dense, i) & nearest(reduced, i)) / NEIGHBOURS for i in range(30)]
    torch.testing.assert_close(neighbours(dense, reduced), torch.tensor(shares))
    with pytest.raises(ValueError, match=r"images: expected more than 10, .* got 10"):
        neighbours(torch.randn(10, 4), torch.randn(10, 4))


def test_photographs_come_in_the_order_of_their_list(tmp_path):
    with pytest.raises(ValueError, match="expected photographs, got none in"):
        photograph_paths(tmp_path)
    for i, name in enumerate(("b.jpg", "a.jpg", "c.png")):
        Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(tmp_path / name)
    (tmp_path / "names.txt").write_text("c.png\nabsent.jpg\nb.jpg\n")
    assert [path.name for path in photograph_paths(tmp_path)] == ["a.jpg", "b.jpg", "c.png"]
    listed = photograph_paths(tmp_path, tmp_path / "names.txt")
    assert [path.name for path in listed] == ["c.png", "b.jpg"]
    (images,) = batches(listed, pixels=28)
    assert images.shape == (2, 3, 28, 28) and images[0].mean() > images[1].mean()


@pytest.mark.parametrize("text", ["tome 0.5", "elip:merge=nearest 0.6", "tome:r=9"])
def test_the_features_are_those_of_the_reduced_model(model, text):
    images = torch.randn(2, 3, 224, 224)
    result, setting = features_of(model, text, images)
    with torch.no_grad():
        tokens, _ = setting.model.forward_intermediates(images, indices=1, output_fmt="NLC")
        torch.testing.assert_close(result.cls, setting.model(images))
    torch.testing.assert_close(result.patches, tokens[:, 1:])


def test_dropped_patches_have_no_features_and_those_of_a_smaller_image_are_interpolated(model):
    images = torch.randn(2, 3, 224, 224)
    assert features_of(model, "elip:merge=none 0.6", images)[0].patches is None
    result, setting = features_of(model, "resize:size=112", images)
    tokens = elip_models.encode_image(model, images, strategy=setting.summary.strategy)
    assert tokens.shape[1] == 1 + 7 * 7 and result.patches.shape == (2, 196, 24)
    corners = [result.patches[:, i] for i in (0, 13, 182, 195)]
    torch.testing.assert_close(torch.stack(corners, 1), tokens[:, [1, 7, 43, 49]])


def test_a_model_that_reduces_nothing_and_a_folder_of_a_trained_one(model, results, tmp_path):
    trained = elip_models.reduce_(copy.deepcopy(model), "tome", keep=0.5)
    with torch.no_grad():
        trained.blocks[0].mlp.fc1.weight.mul_(1.5)
    elip_models.save_reduced(trained, tmp_path / "trained-0.5")
    settings = f"tome:r=0, tome 0.5, {tmp_path}/trained-0.5"
    dense, plain, other = results("--images", N, "--settings", settings)["settings"]
    assert dense["flops"] == dense["kept"] == 1
    for name in evaluation.MEASURES:
        assert dense[name] == {"mean": 1.0, "low": 1.0, "high": 1.0}, name
    assert (other["setting"], other["flops"]) == ("trained-0.5", plain["flops"])
    assert other["cosine"]["mean"] != plain["cosine"]["mean"]


def test_differences_are_paired_by_image(folder, model, results):
    options = ("--settings", "tome 0.5, evit:merge=none 0.5", "--against", "tome 0.5")
    tome, evit = results("--images", N, *options)["settings"]
    assert evit["patches"] is None and "difference" not in tome
    images = list(batches(photograph_paths(folder)))
    dense = torch.cat([elip_models.encode_image(model, b, strategy=Dense()) for b in images])
    cosines = [
        cosine(dense[:, 0], features_of(model, text, torch.cat(images))[0].cls)
        for text in ("evit:merge=none 0.5", "tome 0.5")
    ]
    gap = (cosines[0] - cosines[1]).detach().double()
    expected = bootstrap_interval(gap.numpy())._asdict()
    assert evit["difference"]["cosine"] == pytest.approx(expected, abs=2e-5)


def test_sets_are_disjoint_and_their_neighbours_are_their_own(monkeypatch, results):
    monkeypatch.setattr(feature_measures, "NEIGHBOURS", 3)
    (row,) = results("--images", 5, "--sets", 2, "--settings", "resize 0.5")["settings"]
    for name in evaluation.MEASURES:
        assert len(row["by_set"][name]) == 2
        assert row[name]["mean"] == pytest.approx(sum(row["by_set"][name]) / 2, abs=2e-5)


def test_times_are_added_to_results(results):
    before = results("--images", N, "--settings", "tome 0.5, resize 0.5")
    document = results("--time", "--rounds", 2)
    added = document.pop("time")
    assert document == before
    assert list(added["by_threads"]) == ["1", "2"]
    for times in added["by_threads"].values():
        assert list(times["ratios"]) == ["dense", "tome 0.5", "resize 0.5"]
        assert times["ratios"]["dense"] == 1 and min(times["milliseconds"].values()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "7", "--sets", "2"], "sets of 1 to 12 photographs in all"),
        (["--settings", "tome 0.5, tome 0.5"], "expected each once, got 'tome 0.5' twice"),
        (
            ["--settings", "tome 0.5", "--against", "tome 0.6"],
            "against: expected one of the settings, got 'tome 0.6'",
        ),
        (["--time"], "time: expected --output"),
    ],
)
def test_wrong_arguments_are_refused_before_the_run(
    folder, model, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(dinov2, "timm_model", lambda: model)
    with pytest.raises(SystemExit, match="2"):
        command.main([str(folder), "--images", str(N), *arguments])
    assert message in capsys.readouterr().err


@needs_weights
def test_the_weights_give_the_features_of_the_file(tmp_path):
    """The largest error over the largest feature is of the rounding of two fp32 programs."""
    images = torch.randn(2, 3, dinov2.PIXELS, dinov2.PIXELS)
    expected = dinov2.onnx_features(images)
    dinov2.save(tmp_path)
    saved = open_model(f"timm:local-dir:{tmp_path}").eval()
    for model in (dinov2.timm_model(), saved):
        with torch.no_grad():
            error = (model.forward_features(images) - expected).abs().max()
        assert error < 5e-5 * expected.abs().max()


@needs_weights
def test_the_picture_counts_the_tokens_of_a_photograph(tmp_path):
    from benchmarks.real import picture

    titles = [*picture.panels(picture.default_photograph(), [1, 12])]
    assert titles[0] == "photograph:\n256 tokens"
    counts = [int(title.split()[-2]) for title in titles[1:]]
    assert 256 > counts[0] > counts[1] > 1 and titles[1].startswith("after layer 1 of 12:")
    picture.main([str(tmp_path / "out.png"), "--layers", "12"])
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG" and image.width > 1.5 * image.height


@pytest.mark.parametrize("page", ["real_model", "vlm"])
def test_the_tables_of_a_page_are_up_to_date(page):
    assert script(page).main(["--check"]) == 0
