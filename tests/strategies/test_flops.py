"""FLOPs computed from token counts against FLOPs counted op by op, on the meta device.

Both of every strategy in the registry, so that a new one is held to it.
"""

from dataclasses import replace
from functools import cache

import open_clip
import pytest
import timm
import torch
import transformers

from elip_models.profiling.runner import count
from elip_models.profiling.workload import Workload
from elip_models.strategies import STRATEGIES
from elip_models.strategies.evit import EViT
from elip_models.strategies.flops import dense_flops, strategy_flops, training_ratio
from elip_models.strategies.scorers import SCORERS
from elip_models.strategies.tome import ToMe
from tests.helpers.tiers import tiered

CASES = {name: strategy() for name, strategy in STRATEGIES.items()}
CASES |= {f"elip-{s}": replace(CASES["elip"], scorer=s) for s in (*SCORERS, 1, 2)}
CASES |= {"evit-all": EViT(layers="all")}
NEAREST = ("elip", "evit")
CASES |= {f"{name}-nearest": replace(CASES[name], merge="nearest") for name in NEAREST}
AT_FLOPS = [*STRATEGIES, "elip-official", "elip-last"]
STRENGTHS = [k / 500 for k in range(501)]
VIT = "timm-ViT-B-16"
MODELS = {
    VIT: lambda: timm.create_model("vit_base_patch16_224", num_classes=0),
    "open_clip-ViT-B-16": lambda: open_clip.create_model("ViT-B-16", device="meta").visual,
    "transformers-CLIP-B-32": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig()),
    "transformers-SigLIP-B-16": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig()
    ),
    "transformers-DINOv2-B-14": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(use_swiglu_ffn=True)
    ),
}
TRAINING = "training"
COUNTED = [(model, case) for model in MODELS for case in CASES]
CASES |= {"tome-class": ToMe(class_token_only=True)}
COUNTED += [(VIT, "tome-class")]
QUICK = [("transformers-CLIP-B-32", "elip"), (VIT, "elip"), (VIT, "tome"), (VIT, "tome-class")]


@cache
def workload(name):
    with torch.device("meta"):
        return Workload(MODELS[name](), 1)


@cache
def counted_dense(name):
    return count(workload(name), {"dense": None}, TRAINING)["dense"]


@pytest.mark.parametrize("model", tiered(MODELS, [VIT]))
def test_computed_and_counted_flops_of_a_dense_tower_are_equal(model):
    worked_out, counted = dense_flops(workload(model).tower.size), counted_dense(model)
    assert worked_out.forward == pytest.approx(counted.forward, rel=0.01)
    assert worked_out.training == pytest.approx(sum(counted), rel=0.01)


@pytest.mark.parametrize(
    ("model", "case"),
    tiered(
        COUNTED,
        QUICK,
    ),
)
def test_computed_and_counted_flops_are_equal(model, case):
    reason = CASES[case].why_unsupported(workload(model).tower)
    if reason is not None:
        pytest.skip(f"{case} does not take this tower: {reason}")
    worked_out = strategy_flops(CASES[case], workload(model).tower.size)
    counted = count(workload(model), {case: CASES[case]}, TRAINING)[case]
    alone = counted_dense(model) if CASES[case].training_only else counted
    assert worked_out.forward == pytest.approx(alone.forward, rel=0.01)
    assert worked_out.training == pytest.approx(sum(counted), rel=0.01)
    assert sum(counted) < sum(counted_dense(model))


@pytest.mark.parametrize(
    ("case", "ratio"),
    tiered(
        [(case, ratio) for case in AT_FLOPS for ratio in (0.9, 0.75, 0.6)],
        [("elip", 0.75)],
    ),
)
def test_at_flops_sets_the_counted_flops(case, ratio):
    tower = workload(VIT).tower
    reach = [training_ratio(CASES[case].at_strength(tower.size, s), tower.size) for s in STRENGTHS]
    nearest = min(reach, key=lambda reached: abs(reached - ratio))
    if abs(nearest / ratio - 1) > 0.01 and CASES[case].name != "resize":
        with pytest.raises(ValueError, match=f"nearest is {nearest:.4f}"):
            CASES[case].at_flops(tower, ratio)
        return
    expected = nearest if CASES[case].name == "resize" else ratio  # in whole patches alone
    counted = count(workload(VIT), {case: CASES[case].at_flops(tower, ratio)}, TRAINING)[case]
    assert sum(counted) / sum(counted_dense(VIT)) == pytest.approx(expected, rel=0.01)
