"""Towers in training and inference: time, memory and FLOPs of every scorer against the dense one.

Parity: the dense loop is bit by bit timm's own forward, and every scorer's row of the first stage
is as near to fp64 as the official one's, from the same tokens.
"""

import warnings
from dataclasses import replace
from functools import partial
from statistics import median

import pytest
import timm
import torch

import elip_models
from benchmarks.cases import DEVICE, DTYPE_NAMES, ON_GPU, tower_cases
from benchmarks.parity import judged, relative_error
from elip_models.profiling.measure import (
    count_flops,
    peak_bytes,
    ratios_to,
    saved_bytes,
    time_side_by_side,
)
from elip_models.profiling.workload import Workload
from elip_models.reduction.once import SlowScorerWarning
from elip_models.reduction.schedule import PRESETS
from elip_models.reduction.scorers import SCORERS
from elip_models.reduction.strategies.elip import Elip
from elip_models.towers import as_tower

SCHEDULE = PRESETS["albef"]


@torch.no_grad()
def held_to_fp64(model, image, text):
    """Parity of `model`, which comes back as it was."""
    tower, settings = as_tower(model), Elip(SCHEDULE)
    dense = elip_models.encode_image(model, image, text, schedule=f"{tower.depth}(100%)")
    assert torch.equal(dense, model.forward_features(image))
    stage = settings.schedule.stages(tower.num_patches)[0]
    tokens = tower.embed(image)
    for block in tower.blocks[: stage.first]:
        tokens = block(tokens)

    def rows(dtype):
        model.to(dtype)
        inputs = (tower, stage, tokens.to(dtype), text.to(dtype))
        return {name: replace(settings, scorer=name).score(*inputs) for name in SCORERS}

    exact, found = rows(torch.float64), rows(image.dtype)
    errors = {name: relative_error(found[name], exact[name]) for name in SCORERS}
    return judged(errors, ours=[name for name in SCORERS if name != "official"])


def memory_of(model, step):
    """Bytes of a call: the peak on a GPU, what autograd saves for backward on a CPU."""
    if ON_GPU:
        return peak_bytes(step, DEVICE)
    with saved_bytes(model.parameters()) as count:
        step()
    return count()


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("case", tower_cases(), ids=str)
def test_tower(record, rounds, case, mode):
    warnings.simplefilter("ignore", SlowScorerWarning)
    model = timm.create_model(case.name, img_size=case.size, num_classes=0)
    model = model.to(DEVICE, case.dtype).eval()
    random = {"device": DEVICE, "dtype": case.dtype}
    image = torch.randn(1, 3, case.size, case.size, **random)
    held = held_to_fp64(model, image, torch.randn(1, model.embed_dim, **random))
    workload = Workload(model, case.B)
    plans = {"dense": None} | {name: Elip(SCHEDULE, scorer=name) for name in SCORERS}
    steps = {name: workload.forward(plan) for name, plan in plans.items()}
    if mode == "training":
        model.train()
        steps = {name: partial(workload.train_step, step) for name, step in steps.items()}
    with torch.inference_mode(mode == "inference"):
        times = time_side_by_side(steps, device=DEVICE, rounds=rounds)
        flops = {name: count_flops(step) for name, step in steps.items()}
        memory = {name: memory_of(model, step) for name, step in steps.items()}
        record(
            steps["last"],
            op=case.name,
            direction=mode,
            rounds=rounds,
            ratios={name: ratios_to("dense", times)[name] for name in SCORERS},
            milliseconds={name: 1e3 * median(values) for name, values in times.items()},
            flops=flops,
            memory=memory,
            schedule=SCHEDULE,
            shape={"B": case.B, "image": case.size},
            dtype=DTYPE_NAMES[case.dtype],
            parity=held,
        )
