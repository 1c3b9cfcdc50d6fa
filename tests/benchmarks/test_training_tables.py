"""Tables of trainings: intervals over seeds, times of both ends, arms without a reduced model."""

import pytest
from scipy.stats import ttest_rel

from benchmarks.real.training_tables import difference, study_table, tables
from elip_models.saving.files import write_json

DENSE = {0: 0.70, 1: 0.72, 2: 0.71}
MERGED = {0: 0.68, 1: 0.71, 2: 0.70}


def document():
    runs = [
        {"arm": arm, "seed": seed, "ends": ends}
        for seed in DENSE
        for arm, ends in {
            "dense": {"dense": {"dense": {"top1": DENSE[seed]}}},
            "dense 0.5": {"dense": {"dense": {"top1": DENSE[seed]}}},
            "merge 0.5": {
                end: {"dense": {"top1": DENSE[seed]}, "reduced": {"top1": MERGED[seed]}}
                for end in ("reduced", "finished")
            },
        }.items()
    ]
    return {
        "device": "a machine",
        "date": "2026-01-01",
        "commit": {"id": "0123456789"},
        "settings": {
            "train": 3068, "held_out": 713, "test": 9, "steps": 200, "batch": 16, "pixels": 112
        },
        "runs": runs,
        "time": {"rounds": 11, "threads": 1, "ratios": {"dense": 1.0, "merge 0.5": 0.5}},
    }  # fmt: skip


def test_the_interval_is_that_of_the_paired_test():
    found = ttest_rel(list(MERGED.values()), list(DENSE.values())).confidence_interval()
    low, high = (f"{100 * end:.1f}".replace("-", "−") for end in found)
    assert difference(MERGED, DENSE) == f"−1.3 ({low} to {high})"
    certain = {seed: value - 0.2 - 0.001 * seed for seed, value in DENSE.items()}
    assert difference(certain, DENSE).startswith("**−20.1 (")
    assert difference({0: 0.5}, DENSE) == "−20.0"
    assert difference({}, DENSE) == "–"


def test_a_row_for_each_arm_and_end():
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in study_table(document()).split("\n")
    ]
    assert rows[0] == ["arm", "tokens", "time of training", "top-1", "top-1, reduced"]
    by_arm = {row[0]: row[1:] for row in rows[2:]}
    assert by_arm["`dense`"] == ["1.00", "1.00", "71.0", "–"]
    assert by_arm["`dense 0.5`"][:2] == ["1.00", "0.50"]
    assert by_arm["`merge 0.5`"][:2] == ["0.50", "0.50"]
    assert by_arm["`merge 0.5` + finish"][1] == "0.55"
    assert by_arm["`merge 0.5`"][3].startswith("−1.3")


@pytest.mark.parametrize("file", ["finetune.json", "clip.json"])
def test_the_page_has_the_studies_whose_results_are_there(file, tmp_path):
    assert tables(tmp_path) == ""
    write_json(tmp_path / file, document())
    text = tables(tmp_path)
    assert text.count("### ") == 1 and "3,068 photographs" in text
    assert "Seeds of each arm: 3;" in text
    begun = document()
    begun["runs"].append(begun["runs"][0] | {"seed": 3})
    write_json(tmp_path / file, begun)
    assert "Seeds of each arm: 3 to 4;" in tables(tmp_path)
