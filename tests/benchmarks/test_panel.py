"""`python -m benchmarks.real.panel`: labelled sets, outcomes by photograph, paired differences."""

import json
import shutil

import pytest
import torch

from benchmarks.real import dinov2, materials, panel
from elip_models.intervals import paired_interval


@pytest.fixture
def sets(folder, tmp_path):
    """The materials with the clothes as groceries, too."""
    shutil.copytree(folder / "clothes", tmp_path / "clothes")
    shutil.copytree(folder / "clothes", tmp_path / "groceries")
    for split in panel.SPLITS:
        found = materials.clothes(folder, split)
        name = "val" if split == "validation" else split
        rows = [
            f"{path.relative_to(folder / 'clothes').as_posix()}, {label}, 0"
            for path, label in zip(found.paths, found.labels.tolist(), strict=True)
        ]
        (tmp_path / "groceries" / f"{name}.txt").write_text("\n".join(rows))
    return tmp_path


def test_outcomes_and_differences_of_each_set_agree(sets, model, monkeypatch):
    monkeypatch.setattr(dinov2, "timm_model", lambda: model)
    output = sets / "panel.json"
    arguments = ["--own", "--settings", "tome 0.5, resize 0.5", "--output", str(output)]
    assert panel.main([str(sets), *arguments]) == 0
    document = json.loads(output.read_text())
    assert set(document["sets"]) == set(materials.LABELLED)
    for found in document["sets"].values():
        count = found["photographs"]["test"]
        for row in found["settings"]:
            for measure, gap in row["difference"].items():
                dense, reduced = (int(each["correct"][measure], 16) for each in (found, row))
                gains, losses = (reduced & ~dense).bit_count(), (dense & ~reduced).bit_count()
                assert (gap["gains"], gap["losses"]) == (gains, losses)
                assert gap["mean"] == pytest.approx((gains - losses) / count, abs=1e-5)
                low = paired_interval(gains, losses, count).low
                assert gap["non_inferior"] == (low > -panel.MARGIN)
    first, second = document["sets"].values()
    assert first["settings"] == second["settings"]


def test_outcomes_are_stored_in_the_order_of_the_photographs():
    assert panel.packed(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])) == "23"
    assert panel.packed(torch.zeros(9)) == "000"
