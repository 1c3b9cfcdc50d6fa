"""`python -m benchmarks.real.panel` and `.camvid`: what is measured, and differences from dense."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from scipy import stats
from sklearn.metrics import jaccard_score

from benchmarks.real import (
    calibrated,
    camvid,
    dinov2,
    panel,
    panel_tables,
    retrieval,
    sets,
    unmeasured,
    variants,
)
from benchmarks.real.measures import OWN
from elip_models.intervals import Interval, paired_interval

SETTINGS = "tome 0.5, resize 0.5"
KINDS = "aerial", "clothes"


@pytest.fixture
def photographs(folder, tmp_path):
    """Two sets of the same photographs: clothes, and objects, of which some are not measured."""
    shutil.copytree(folder / "clothes", tmp_path / "clothes")
    for split in (tmp_path / "clothes").iterdir():
        for each in split.glob("*/*"):
            target = tmp_path / "aerial" / each.parent.name / f"{split.name}{each.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(each, target)
    return tmp_path


def test_a_file_counts_once_and_measured_photographs_are_not_explored(photographs, monkeypatch):
    source = sets.SOURCES["aerial"]._replace(per_class=4)
    monkeypatch.setitem(sets.SOURCES, "aerial", source)
    flower = photographs / "aerial" / "flower"
    shutil.copy(next(flower.iterdir()), flower / "again.png")
    measured = sets.read(photographs, "aerial")
    explored = sets.read(photographs, "aerial", explore=True)
    assert measured.labels.tolist() == [0] * 4 + [1] * 4
    assert not {path.read_bytes() for path in measured.paths} & {
        path.read_bytes() for path in explored.paths
    }
    assert len(sets.read(photographs, "clothes").paths) == 18


def test_a_choice_is_judged_by_photographs_that_did_not_choose_it(photographs, monkeypatch):
    source = sets.SOURCES["aerial"]._replace(per_class=4)
    monkeypatch.setitem(sets.SOURCES, "aerial", source)
    monkeypatch.setattr(calibrated, "COUNT", 5)
    found = calibrated.of_a_user(photographs, "aerial", seed=0)
    (fold,) = found.folds
    assert sorted(torch.cat([fold.train, fold.tune]).tolist()) == list(range(5))
    measured = sets.read(photographs, "aerial")
    assert [found.paths[i] for i in fold.test] == measured.paths
    assert found.labels[fold.test].tolist() == measured.labels.tolist()
    assert not set(found.paths[:5]) & set(measured.paths)
    monkeypatch.setattr(calibrated, "COUNT", 500)
    with pytest.raises(ValueError, match="sets"):
        calibrated.of_a_user(photographs, "aerial", seed=0)


def test_each_photograph_is_tested_once_by_a_probe_of_others():
    folds = sets.cross_fitted(23)
    assert sorted(torch.cat([fold.test for fold in folds]).tolist()) == list(range(23))
    for fold in folds:
        assert sorted(torch.cat(fold).tolist()) == list(range(23))


def test_a_set_that_is_not_there_or_is_held_out_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="RSSCN7"):
        sets.read(tmp_path, "aerial")
    for name in (sets.HELD_OUT, "clothes"):
        with pytest.raises(ValueError, match="sets"):
            sets.read(tmp_path, name, explore=True)
    assert sets.names(list(sets.SOURCES))[-1] == sets.HELD_OUT


def test_outcomes_and_differences_of_each_set_agree(photographs, model, monkeypatch):
    monkeypatch.setattr(dinov2, "timm_model", lambda: model)
    output = photographs / "panel.json"
    arguments = ["--sets", "aerial", "clothes", "--settings", SETTINGS, "--output", str(output)]
    assert panel.main([str(photographs), *arguments, "--dtype", "float32"]) == 0
    document = json.loads(output.read_text())
    assert list(document["sets"]) == ["clothes", "aerial"]
    for found in document["sets"].values():
        count = found["photographs"]
        assert count == 18
        for row in found["settings"]:
            for measure, gap in row["difference"].items():
                dense, reduced = (int(each["correct"][measure], 16) for each in (found, row))
                gains, losses = (reduced & ~dense).bit_count(), (dense & ~reduced).bit_count()
                assert (gap["gains"], gap["losses"]) == (gains, losses)
                assert gap["mean"] == pytest.approx((gains - losses) / count, abs=1e-5)
                low = paired_interval(gains, losses, count).low
                assert gap["non_inferior"] == (low > -panel.MARGIN)
    rows = panel_tables.rows(document, OWN)
    assert [row.setting for row in rows] == SETTINGS.split(", ")
    assert "not measured" not in panel_tables.panel_table(document, OWN)


def test_times_are_added_to_the_results(model):
    settings = panel.read_settings("tome 0.5", model)
    found = panel.add_times(settings, torch.nn.Module.__call__, (224, 224), 6, Console(quiet=True))
    for run in found["time"]["runs"]:
        assert run["ratios"]["dense"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
        ratio = run["ratios"]["tome 0.5"]
        assert 0 < ratio["low"] <= ratio["mean"] <= ratio["high"]
    assert panel_tables.times(found, 8)["tome 0.5"].mean == ratio["mean"]


def test_outcomes_are_stored_in_the_order_of_the_photographs():
    assert panel.packed(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])) == "23"
    assert panel.packed(torch.zeros(9)) == "000"
    assert panel_tables.contrast("23", "03", 6) == paired_interval(1, 0, 6)


def test_the_mean_of_sets_has_the_interval_of_a_mean_of_independent_sets():
    sets_ = [Interval(0.0, -0.03, 0.03), Interval(-0.04, -0.08, 0.0)]
    mean = panel_tables.mean_over_sets(sets_)
    assert mean == pytest.approx((-0.02, -0.045, 0.005))


def test_recalls_are_those_of_maps_of_the_other_half(folder, model, monkeypatch, tmp_path):
    """Without a reduction nothing differs; the digits are the captions found for a photograph."""
    monkeypatch.setattr(dinov2, "timm_model", lambda: model)
    output = tmp_path / "retrieval.json"
    options = ["--settings", "tome 0.5, tome:r=0", "--dtype", "float32", "--output", str(output)]
    assert retrieval.main([str(folder), *options]) == 0
    document = json.loads(output.read_text())
    reduced, unchanged = document["settings"]
    assert document["photographs"] == 12
    assert unchanged["recalled"] == document["recalled"]
    for name, dense in document["recalled"].items():
        of = 5 if name.startswith("text") else 1
        found, expected = (
            np.array(list(map(int, each))) / of for each in (reduced["recalled"][name], dense)
        )
        gap = reduced["difference"]["own"][name]["mean"]
        assert gap == pytest.approx((found - expected).mean(), abs=1e-5)
        assert unchanged["difference"]["own"][name]["mean"] == 0
    first, second = retrieval.halves(12, seed=0)
    assert sorted(torch.cat([first, second]).tolist()) == list(range(12))


@pytest.fixture
def frames(tmp_path, monkeypatch):
    """Frames of 30 x 40 pixels with annotations, and a small model for images of 56 x 84."""
    monkeypatch.setattr(camvid, "PIXELS", (56, 84))
    monkeypatch.setattr(camvid, "GROUP", 1)
    rng, root = np.random.default_rng(0), tmp_path / "camvid"
    for split in ("train", "val", "test"):
        rows = []
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for i in range(3):
            mask = rng.integers(0, camvid.CLASSES + 1, (6, 8)).repeat(5, 0).repeat(5, 1)
            pixels = (mask[..., None] * [20, 10, 5]).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            Image.fromarray(mask.astype(np.uint8)).save(root / f"{split}annot" / f"{i}.png")
            rows.append(f"/CamVid/{split}/{i}.png /CamVid/{split}annot/{i}.png")
        (root / f"{split}.txt").write_text("\n".join(rows))

    def small(size):
        torch.manual_seed(0)
        options = {"patch_size": 14, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 0}
        return timm.create_model("vit_tiny_patch16_224", img_size=size, **options).eval()

    monkeypatch.setattr(dinov2, "timm_model", small)
    return tmp_path


def test_the_miou_of_camvid_is_that_of_scikit_learn(frames):
    (dense,) = panel.read_settings("", dinov2.timm_model(camvid.PIXELS))
    head, _ = camvid.dense_head(dense, frames, lambda count: None)
    pairs = camvid.frames(frames, "test")
    (totals,) = camvid.totals(dense.model, [head], pairs, lambda count: None)
    ((images, masks),) = camvid.batches(pairs)
    features = camvid.grids(dense.model, images).double().permute(0, 2, 3, 1)
    logits = (features - head.mean) / head.deviation @ head.weight.T + head.bias
    logits = torch.nn.functional.interpolate(
        logits.permute(0, 3, 1, 2), masks.shape[1:], mode="bilinear"
    )
    known = masks < camvid.CLASSES
    expected = jaccard_score(masks[known], logits.argmax(1)[known], average="macro")
    assert camvid.miou(totals) == pytest.approx(expected, abs=1e-5)


def test_camvid_compares_reduced_models_and_smaller_images_with_dense(frames):
    output = frames / "camvid.json"
    arguments = ["--settings", "tome 0.8, dense@28, dense@56", "--dtype", "float32"]
    assert camvid.main([str(frames), *arguments, "--output", str(output)]) == 0
    document = json.loads(output.read_text())
    reduced, smaller, same = document["settings"]
    assert same["difference"]["own"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert smaller["totals"]["own"] != document["totals"]["own"] != reduced["totals"]["own"]
    assert panel_tables.camvid_table(document).count("\n") == 4


def test_the_power_is_that_of_simulated_photographs():
    gap = {"gains": 20, "losses": 34}
    entry = {"setting": "tome 0.5", "difference": {OWN: gap}}
    document = {"margin": 0.01, "sets": {"a": {"photographs": 1500, "settings": [entry]}}}
    changed = np.random.default_rng(0).multinomial(1500, [0.018, 0.018, 0.964], size=1000)
    passed = [paired_interval(*map(int, each[:2]), 1500).low > -0.01 for each in changed]
    assert panel_tables.power(document, "tome 0.5") == pytest.approx([np.mean(passed)], abs=0.05)


def test_variants_have_the_flops_of_the_first_and_are_judged_on_the_same_photographs(
    photographs, model, monkeypatch
):
    monkeypatch.setattr(dinov2, "timm_model", lambda: model)
    monkeypatch.setitem(sets.SOURCES, "aerial", sets.SOURCES["aerial"]._replace(per_class=4))
    monkeypatch.setattr(variants, "SETS", ("aerial",))
    depth = len(model.blocks)
    early = [1.0] + [0.0] * (depth - 1)
    monkeypatch.setattr(variants, "GROUPS", {"merge 0.9": {"early": early, "again": "merge 0.9"}})
    file = photographs / "variants.json"
    assert variants.main([str(photographs), "--output", str(file), "--dtype", "float32"]) == 0
    document = json.loads(file.read_text())
    assert document["photographs"] == {"aerial": 8}
    first, of_early, again = document["groups"]["merge 0.9"]
    assert of_early["flops"] == pytest.approx(first["flops"], abs=0.05)
    assert of_early["strategy"].startswith("merge(r=(")
    nothing = {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert again["from_first"] == {"cross_entropy": nothing, "top1": nothing}
    assert again["from_dense"] == first["from_dense"]


def test_a_contrast_weighs_each_set_alike():
    generator = torch.Generator().manual_seed(0)
    judged, reference = (
        {name: torch.rand(2, n, generator=generator) for name, n in (("a", 30), ("b", 50))}
        for _ in range(2)
    )
    gaps = [(judged[name] - reference[name])[0].numpy() for name in ("a", "b")]
    error = sum(stats.sem(gap) ** 2 for gap in gaps) ** 0.5 / 2
    mean = np.mean([gap.mean() for gap in gaps])
    low, high = stats.norm.interval(0.95, mean, error)
    expected = {"mean": mean, "low": low, "high": high}
    assert variants.contrast(judged, reference)[0] == pytest.approx(expected, abs=1e-5)


def test_the_pool_has_no_measured_photograph(photographs, monkeypatch):
    monkeypatch.setitem(sets.SOURCES, "aerial", sets.SOURCES["aerial"]._replace(per_class=4))
    monkeypatch.setattr(unmeasured, "SETS", ("aerial",))
    monkeypatch.setattr(unmeasured, "SPLIT", "clothes")
    pool = photographs / "pool"
    assert unmeasured.main([str(photographs), str(pool)]) == 0
    linked = {kind: {path.read_bytes() for path in pool.glob(f"{kind}_*")} for kind in KINDS}
    assert not linked["aerial"] & {p.read_bytes() for p in sets.read(photographs, "aerial").paths}
    clothes = sets.read(photographs, "clothes")
    trained = {clothes.paths[i].read_bytes() for i in clothes.folds[0].train}
    assert len(linked["aerial"]) == 8 and linked["clothes"] == trained
