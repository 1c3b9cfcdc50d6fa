"""`elip profile`: FLOPs on the meta device, and times of tiny models."""

import json

import pytest

from benchmarks.paper import SHARED, TABLE1, ratios, step_counts
from elip_models.profiling.measure import count_step
from elip_models.profiling.runner import profile_model, verdict
from elip_models.profiling.workload import Workload
from elip_models.strategies.elip import ELIP
from elip_models.strategies.evit import EViT
from elip_models.strategies.tome import ToMe
from elip_models.towers import as_image_text
from tests.helpers.models import hf_blip, hf_clip, open_clip_pair
from tests.helpers.tiers import tiered
from tests.helpers.tiny_run import elip
from tests.helpers.towers import SCHEDULE

PAIRS = {"open_clip": open_clip_pair, "CLIPModel": hf_clip, "Blip": hf_blip}


@pytest.mark.slow
def test_flops_only_of_two_models_as_json(tmp_path, capsys):
    output = tmp_path / "table.json"
    models = ("--model", "timm:vit_base_patch16_224", "--model", "clip_tiny")
    strategies = ("--strategy", "elip:scorer=exact", "--strategy", "tome:r=4")
    options = ("--schedule", "clip", "--flops-only", "--output", output, "--batch-size", 2)
    assert elip("profile", *models, *strategies, *options) == 0
    printed = capsys.readouterr().out
    for text in ("vit_base_patch16_224", "2×197 2×178 6×129 2×80", "image tower or whole model"):
        assert text in printed
    found = json.loads(output.read_text())
    assert found["device"] == "meta" and found["left_out"] == []
    rows = {(r["model"], r["mode"], r["strategy"]): r for r in found["rows"]}
    assert len(rows) == len(found["rows"]) == 2 * 2 * 3
    row = rows["timm:vit_base_patch16_224", "training", "elip:scorer=exact"]
    assert row["tokens"][2] == [178, 178]
    assert row["retained"] == pytest.approx((2 * 197 + 2 * 178 + 6 * 129 + 2 * 80) / 12 / 197)
    assert row["flops_ratio"] == pytest.approx(0.877, abs=0.001)
    assert row["backward_flops"] == pytest.approx(49.466e9, rel=1e-4)
    assert row["seconds"] is row["time_ratio"] is row["memory"] is None
    assert "scorer='exact'" in row["settings"]
    assert rows["clip_tiny", "inference", "dense"]["backward_flops"] == 0


@pytest.mark.slow
def test_a_timed_run_prints_ratios(tmp_path, capsys):
    output = tmp_path / "table.json"
    options = ("--strategy", "elip:scorer=last", "--rounds", 1, "--batch-size", 1)
    assert elip("profile", "--model", "clip_tiny", *options, "--output", output) == 0
    assert "bytes saved for backward" in capsys.readouterr().out
    dense, reduced, *inference = json.loads(output.read_text())["rows"]
    assert dense["time_ratio"] == dense["memory_ratio"] == 1 and dense["verdict"] == ""
    assert reduced["seconds"] > 0
    assert reduced["memory_ratio"] == reduced["memory"] / dense["memory"] < 1
    assert [row["memory"] for row in inference] == [None, None]


@pytest.mark.parametrize("name", tiered(PAIRS, []))
def test_a_whole_model_counts_its_second_text_pass(name):
    model, strategies = PAIRS[name](), {"evit": EViT(), "elip": ELIP(SCHEDULE)}
    options = {"batch_size": 2, "modes": ["inference"], "rounds": None}
    whole = profile_model(name, model, strategies, **options)
    image = profile_model(name, as_image_text(model).image_model, strategies, **options)
    assert {row.step for row in whole} == {"whole model"}
    dense, evit, elip_ = (
        w.forward_flops - i.forward_flops for w, i in zip(whole, image, strict=True)
    )
    twin = Workload(model, 2).on_meta()
    image_text = as_image_text(twin.model)
    with twin.tracing():
        again = count_step(lambda: image_text.text_cls(**twin.inputs), backward=False)
    text_pass = again.forward / 2
    if name == "Blip":  # whose text attends to fewer image tokens
        assert evit < dense and evit < elip_ < evit + 1.1 * text_pass
    else:
        assert elip_ - dense == pytest.approx(text_pass)
        assert evit == pytest.approx(dense)


def test_no_gain_for_a_time_ratio_above_the_threshold():
    assert [verdict(ToMe(), ratio) for ratio in (0.969, 0.97, None)] == ["", "no gain", ""]
    assert verdict(None, 1.4) == ""


@pytest.fixture(scope="module")
def blip_counts():
    """Return the FLOPs of a step of full-size BLIP, counted on the meta device."""
    return step_counts("blip")


@pytest.mark.slow
def test_a_step_of_blip_is_the_papers(blip_counts):
    paper, counted = TABLE1["BLIP"], ratios(blip_counts)
    assert blip_counts["dense"] == pytest.approx(paper.dense, rel=0.01)
    assert 0.80 < counted["exact"] < 0.85
    assert 0.74 < counted["last"] < 0.79
    assert counted[SHARED] < counted["last"]
    said = {"official": paper.elip, "EViT": paper.evit, "ToMe": paper.tome}
    for method, flops in said.items():
        assert counted[method] == pytest.approx(flops / paper.dense, rel=0.01)


def test_table_1_has_the_papers_figure_for_a_method():
    assert [TABLE1["METER"].of(m) for m in ("dense", "exact", "ToMe")] == [8.66, 6.43, None]
