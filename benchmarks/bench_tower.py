"""Time, memory and FLOPs of towers with every scorer against dense, in training and inference.

Parity: the dense loop equals timm's own forward bit for bit. The scores of the first stage have at
most twice the error of the official scorer, from the same tokens. The scorer `bf16` computes the
layers of an fp32 model in bf16, so it is compared with the official scorer of a bf16 model.
"""

import copy
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch

import elip_models
from benchmarks.cases import DEVICE, DTYPE_NAMES, tower_cases
from benchmarks.parity import check_coarser_errors, check_errors, relative_error
from elip_models.profiling.runner import DENSE, count, in_mode, measure
from elip_models.profiling.workload import Workload
from elip_models.strategies.elip import ELIP
from elip_models.strategies.schedule import PRESETS
from elip_models.strategies.scorers import SCORERS
from elip_models.towers import as_tower

SCHEDULE = PRESETS["albef"]


@torch.no_grad()
def compare_with_fp64(model, image, text):
    """Return the parity of `model`."""
    tower, strategy = as_tower(model), ELIP(SCHEDULE)
    dense = elip_models.encode_image(model, image, text, schedule=f"{tower.depth}(100%)")
    assert torch.equal(dense, model.forward_features(image))
    stage = strategy.schedule.stages(tower.num_patches)[0]
    tokens = tower.embed(image)
    for block in tower.blocks[: stage.first]:
        tokens = block(tokens)

    def rows(dtype):
        converted = as_tower(copy.deepcopy(model).to(dtype))
        inputs = (converted, stage, tokens.to(dtype), text.to(dtype))
        return {name: replace(strategy, scorer=name).score(*inputs) for name in SCORERS}

    def errors(dtype):
        found = rows(dtype)
        return {name: relative_error(found[name], exact[name]) for name in SCORERS}

    exact = rows(torch.float64)
    found, coarser = errors(image.dtype), {}
    if image.dtype == torch.float32:
        replaced = errors(torch.bfloat16)["official"]
        coarser = {"coarser": check_coarser_errors({"bf16": found.pop("bf16")}, replaced, "bf16")}
    return check_errors(found, ours=[name for name in found if name != "official"]) | coarser


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.cases(case=tower_cases)
def test_tower(record, rounds, case, mode):
    model = timm.create_model(case.name, img_size=case.size, num_classes=0)
    model = model.to(DEVICE, case.dtype).eval()
    random = {"device": DEVICE, "dtype": case.dtype}
    image = torch.randn(1, 3, case.size, case.size, **random)
    checked = compare_with_fp64(model, image, torch.randn(1, model.embed_dim, **random))
    workload = Workload(model, case.B)
    strategies = {DENSE: None} | {name: ELIP(SCHEDULE, scorer=name) for name in SCORERS}
    measured = measure(workload, strategies, mode, rounds=rounds)
    flops = {name: sum(each) for name, each in count(workload, strategies, mode).items()}
    with in_mode(workload, mode):
        step = workload.forward(strategies["last"])
        record(
            partial(workload.train_step, step) if mode == "training" else step,
            op=case.name,
            direction=mode,
            rounds=rounds,
            ratios={name: measured[name].time_ratio for name in SCORERS},
            milliseconds={name: 1e3 * each.seconds for name, each in measured.items()},
            flops=flops,
            memory={name: each.memory or 0 for name, each in measured.items()},
            schedule=SCHEDULE,
            shape={"B": case.B, "image": case.size},
            dtype=DTYPE_NAMES[case.dtype],
            parity=checked,
        )
