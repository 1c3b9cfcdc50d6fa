"""`python -m benchmarks.real`: settings, features after unmerge, results, times, and their page."""

import copy
import json

import pytest
import torch

import elip_models
from benchmarks.real import __main__ as command
from benchmarks.real import evaluation
from benchmarks.real.dinov2 import PIXELS, transformers_model
from benchmarks.real.evaluation import features, read_settings
from benchmarks.real.photographs import batches, photograph_paths
from elip_models.analysis import feature_measures
from elip_models.intervals import bootstrap_interval
from elip_models.reduction.strategies import Dense
from tests.benchmarks.weights import needs_weights
from tests.project.test_docs import script

N = 12  # photographs of `folder`


@pytest.fixture
def results(folder, model, monkeypatch, tmp_path):
    """Return a function that runs the command with the small model, and returns its JSON."""
    monkeypatch.setattr(command, "MODELS", {"timm": lambda: model})
    monkeypatch.setattr(command, "onnx_error", lambda model, paths: {"images": len(paths)})

    def run(*arguments):
        output = tmp_path / "results.json"
        assert command.main([str(folder), "--output", str(output), *map(str, arguments)]) == 0
        return json.loads(output.read_text())

    return run


def features_of(model, setting, images):
    (setting,) = read_settings(setting, model)
    return features(setting.unreduced, [images], setting.summary, lambda _: None), setting


@pytest.mark.parametrize("text", ["tome 0.5", "elip:merge=nearest 0.6", "tome:r=9"])
def test_the_features_are_those_of_the_reduced_model(model, text):
    images = torch.randn(2, 3, 224, 224)
    found, setting = features_of(model, text, images)
    with torch.no_grad():
        tokens, _ = setting.model.forward_intermediates(images, indices=1, output_fmt="NLC")
        torch.testing.assert_close(found.cls, setting.model(images))
    assert tokens.shape[1] == 197
    torch.testing.assert_close(found.patches, tokens[:, 1:])


def test_a_folder_of_a_trained_model_is_a_setting(model, results, tmp_path):
    trained = elip_models.reduce_(copy.deepcopy(model), "tome", keep=0.5)
    with torch.no_grad():
        trained.blocks[0].mlp.fc1.weight.mul_(1.5)
    elip_models.save_reduced(trained, tmp_path / "trained-0.5")
    found, setting = features_of(model, f"{tmp_path}/trained-0.5", torch.randn(2, 3, 224, 224))
    assert setting.text == "trained-0.5" and found.patches.shape == (2, 196, 24)
    document = results("--images", 12, "--settings", f"tome 0.5, {tmp_path}/trained-0.5")
    plain, other = document["settings"]
    assert (other["setting"], other["flops"]) == ("trained-0.5", plain["flops"])
    assert other["cosine"]["mean"] != plain["cosine"]["mean"]


def test_dropped_patches_have_no_features(model):
    found, _ = features_of(model, "elip:merge=none 0.6", torch.randn(2, 3, 224, 224))
    dense = features(model, [torch.randn(2, 3, 224, 224)], whole(model), lambda _: None)
    assert found.patches is None and dense.patches.shape == (2, 196, 24)


def whole(model):
    return elip_models.reduction_summary(model)


def test_the_grid_of_a_smaller_image_is_interpolated(model):
    images = torch.randn(2, 3, 224, 224)
    found, setting = features_of(model, "resize:size=112", images)
    tokens = elip_models.encode_image(model, images, strategy=setting.summary.strategy)
    assert tokens.shape[1] == 1 + 7 * 7 and found.patches.shape == (2, 196, 24)
    corners = [found.patches[:, i] for i in (0, 13, 182, 195)]
    torch.testing.assert_close(torch.stack(corners, 1), tokens[:, [1, 7, 43, 49]])


def test_a_model_that_reduces_nothing_has_the_best_values(results):
    (row,) = results("--images", N, "--settings", "tome:r=0")["settings"]
    assert row["flops"] == row["kept"] == 1
    for name in evaluation.MEASURES:
        assert row[name] == {"mean": 1.0, "low": 1.0, "high": 1.0}, name


def test_differences_are_paired_by_image(folder, model, results):
    options = ("--settings", "tome 0.5, evit:merge=none 0.5", "--against", "tome 0.5")
    document = results("--images", N, *options)
    tome, evit = document["settings"]
    assert evit["patches"] is None and "difference" not in tome
    assert evit["difference"]["patches"] is None
    images = list(batches(photograph_paths(folder)))
    dense = torch.cat([elip_models.encode_image(model, each, strategy=Dense()) for each in images])
    cosines = [
        feature_measures.cosine(dense[:, 0], features_of(model, text, torch.cat(images))[0].cls)
        for text in ("evit:merge=none 0.5", "tome 0.5")
    ]
    gap = (cosines[0] - cosines[1]).detach().double()
    expected = bootstrap_interval(gap.numpy())._asdict()
    assert evit["difference"]["cosine"] == pytest.approx(expected, abs=2e-5)


def test_sets_are_disjoint_and_their_neighbours_are_their_own(monkeypatch, results):
    monkeypatch.setattr(feature_measures, "NEIGHBOURS", 3)
    document = results("--images", 5, "--sets", 2, "--settings", "resize 0.5")
    (row,) = document["settings"]
    assert document["photographs"]["sets"] == 2
    for name in evaluation.MEASURES:
        assert len(row["by_set"][name]) == 2
        assert row[name]["mean"] == pytest.approx(sum(row["by_set"][name]) / 2, abs=2e-5)


def test_times_are_added_to_results(results):
    document = results("--images", N, "--settings", "tome 0.5, resize 0.5")
    timed = results("--time", "--rounds", 1)
    added = timed.pop("time")
    assert timed == document
    assert list(added["by_threads"]) == ["1", "2"]
    for found in added["by_threads"].values():
        assert list(found["ratios"]) == ["dense", "tome 0.5", "resize 0.5"]
        assert found["ratios"]["dense"] == 1 and min(found["milliseconds"].values()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "7", "--sets", "2"], "sets of 1 to 12 photographs in all"),
        (["--settings", "tome 0.5, tome 0.5"], "expected each once, got 'tome 0.5' twice"),
        (["--settings", "tone 0.5"], "strategy: expected NAME"),
        (
            ["--settings", "tome 0.5", "--against", "tome 0.6"],
            "against: expected one of the settings, got 'tome 0.6'",
        ),
        (["--output", "absent/x.json"], "expected a file in a folder that exists"),
        (["--time"], "time: expected --output"),
    ],
)
def test_wrong_arguments_are_refused_before_the_run(
    folder, model, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(command, "MODELS", {"timm": lambda: model})
    with pytest.raises(SystemExit, match="2"):
        command.main([str(folder), "--images", str(N), *arguments])
    assert message in capsys.readouterr().err


def test_times_are_of_the_model_of_the_results(folder, results, tmp_path, monkeypatch, capsys):
    results("--images", N, "--settings", "tome 0.5")
    monkeypatch.setattr(command, "MODELS", {"timm": None, "transformers": None})
    arguments = [str(folder), "--output", str(tmp_path / "results.json"), "--time"]
    with pytest.raises(SystemExit, match="2"):
        command.main([*arguments, "--model", "transformers"])
    assert "model: expected that of" in capsys.readouterr().err


@needs_weights
@torch.no_grad()
@pytest.mark.parametrize("text", ["dense", "tome 0.5"])
def test_two_libraries_give_the_same_features(folder, text):
    """The largest error over the largest feature is of the rounding of two fp32 programs."""
    (images,) = batches(photograph_paths(folder)[:4])
    found = {}
    for name, make in command.MODELS.items():
        model = make()
        reduction = whole(model) if text == "dense" else features_of(model, text, images)[1].summary
        found[name] = features(model, [images], reduction, lambda _: None), reduction
    (expected, one), (got, other) = found["timm"], found["transformers"]
    assert one.strategy == other.strategy and one.forward_flops == other.forward_flops
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() < 5e-5 * theirs.abs().max()


@needs_weights
@torch.no_grad()
def test_a_model_of_larger_images_is_reduced_by_the_patches_of_a_smaller_one(folder):
    (images,) = batches(photograph_paths(folder)[:2])
    _, setting = features_of(transformers_model(PIXELS), "tome 0.5", images)
    larger = elip_models.reduce_(transformers_model(518), strategy=setting.summary.strategy)
    expected, got = (each(images).last_hidden_state for each in (setting.model, larger))
    assert got.shape == expected.shape and got.shape[1] < 20
    assert (got - expected).abs().max() < 5e-5 * expected.abs().max()


@needs_weights
def test_a_real_model_keeps_more_under_tome_than_under_pruning(
    folder, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(command, "CHECKED", 2)
    output = tmp_path / "results.json"
    settings = ["--images", str(N), "--settings", "tome 0.7, random:merge=none 0.5"]
    assert command.main([str(folder), *settings, "--output", str(output)]) == 0
    document = json.loads(output.read_text())
    tome, pruned = document["settings"]
    assert tome["cosine"]["mean"] > 0.98 > pruned["cosine"]["mean"]
    assert tome["patches"]["mean"] > 0.9 and pruned["patches"] is None
    error = document["onnxruntime"]
    assert max(error["cls_error"], error["patch_error"]) < 5e-5 * error["largest_feature"]
    assert {"device", "versions", "commit", "date", "seed"} <= document.keys()
    assert "tome 0.7" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["real_model", "vlm"])
def test_the_tables_of_a_page_are_up_to_date(page):
    assert script(page).main(["--check"]) == 0


def test_a_stale_page_is_found_and_rewritten(tmp_path, capsys):
    module, page = script("real_model"), tmp_path / "real_model.md"
    first = f"{module.FIRST}\nold\n{module.LAST}"
    page.write_text(f"before\n{first}\n{module.BEGIN}\nold\n{module.END}\nafter\n")
    assert module.main(["--check", "--page", str(page)]) == 1
    assert "is stale: run python docs/real_model.py" in capsys.readouterr().err
    assert module.main(["--page", str(page)]) == 0
    assert module.main(["--check", "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    page.write_text("no markers")
    assert module.main(["--page", str(page)]) == 1
