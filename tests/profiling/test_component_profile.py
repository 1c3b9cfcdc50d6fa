"""`elip profile --parts`: the shares of the components add up and match the model."""

import json

import pytest
import torch

from elip_models.pretraining.models.registry import FAMILIES
from elip_models.profiling.component_profile import (
    CALLS,
    FUSION,
    HEADS,
    IMAGE,
    MOMENTUM,
    PARTS,
    SCORING,
    TEXT,
    profile_components,
)
from elip_models.profiling.runner import count
from elip_models.profiling.workload import Workload
from elip_models.saving.open_model import open_model
from elip_models.strategies import Dense
from elip_models.strategies.elip import ELIP
from elip_models.strategies.flops import strategy_flops
from elip_models.strategies.tome import ToMe
from tests.helpers.tiers import slow_except
from tests.helpers.tiny_run import elip
from tests.helpers.towers import plain_vit

EXACT = ELIP("1(100%) 1(50%) 2(25%)", scorer="exact")
STRATEGIES = {"dense": Dense(), "exact": EXACT, "tome": ToMe(r=3)}
SHALLOW = {"vision_depth": 4, "text_depth": 3, "schedule": None}


def workload(family, **options):
    with torch.device("meta"):
        model = open_model(f"{family}_tiny", pretrained=False, **SHALLOW, **options)
        return Workload(model, 2)


@pytest.mark.parametrize("family", slow_except([], ["clip", "albef"]))
def test_components_add_up_to_the_total(family):
    measured = workload(family)
    counted = count(measured, STRATEGIES, "training")
    found = {p.strategy: p for p in profile_components("m", measured, STRATEGIES)}
    for name, flops in counted.items():
        assert sum(found[name].flops.values()) * 2 == sum(flops)
    size, passes = measured.tower.size, 2 if family == "meter" else 1
    for name, strategy in STRATEGIES.items():
        flops, tower = found[name].flops, strategy_flops(strategy, size).training * passes
        assert flops[IMAGE] + flops[SCORING] == pytest.approx(tower, rel=0.01)
    scored = passes * EXACT.scoring_flops(size)
    assert scored <= found["exact"].flops[SCORING] < 1.02 * scored  # merging is counted too
    assert found["tome"].flops[SCORING] > 0 == found["dense"].flops[SCORING]
    assert (found["dense"].flops[MOMENTUM] > 0) == (family in ("albef", "blip"))
    assert (found["dense"].flops[FUSION] > 0) == (family != "clip")
    assert min(found["dense"].flops[part] for part in (IMAGE, TEXT, HEADS)) > 0
    assert found["dense"].flops[MOMENTUM] == found["exact"].flops[MOMENTUM]
    assert found["dense"].flops[FUSION] >= found["exact"].flops[FUSION]


@pytest.mark.slow
def test_parts_are_printed_and_written(tmp_path, capsys):
    output = tmp_path / "table.json"
    command = ("profile", "--model", "clip_tiny", "--strategy", "tome", "--mode", "training")
    assert elip(*command, "--flops-only", "--parts", "--output", output) == 0
    printed = capsys.readouterr().out
    assert "shares of FLOPs" in " ".join(printed.split()) and all(part in printed for part in PARTS)
    dense, tome = json.loads(output.read_text())["parts"]
    assert [dense["strategy"], tome["strategy"]] == ["dense", "tome"]
    assert dense["flops"].keys() == set(PARTS)
    assert dense["flops"][SCORING] == 0 < tome["flops"][SCORING]


def test_a_model_of_another_library_raises():
    assert CALLS.keys() == FAMILIES.keys()
    with pytest.raises(
        ValueError, match=r"parts: expected a model of this library.*VisionTransformer"
    ):
        profile_components("vit", Workload(plain_vit(), 1), {"dense": Dense()})
