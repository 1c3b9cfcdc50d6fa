"""Towers in training and inference: time, memory and FLOPs of every scorer against the dense one.

Parity: the dense loop is bit by bit timm's own forward, and every scorer's row of the first stage
is as near to fp64 as the official one's, from the same tokens.
"""

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch

import elip_models
from benchmarks.cases import DEVICE, DTYPE_NAMES, tower_cases
from benchmarks.parity import judged, relative_error
from elip_models.profiling.rows import DENSE, count, in_mode, measure
from elip_models.profiling.workload import Workload
from elip_models.reduction.schedule import PRESETS
from elip_models.reduction.scorers import SCORERS
from elip_models.reduction.strategies.elip import Elip
from elip_models.towers import as_tower

SCHEDULE = PRESETS["albef"]


@torch.no_grad()
def held_to_fp64(model, image, text):
    """Parity of `model`, which comes back as it was."""
    tower, strategy = as_tower(model), Elip(SCHEDULE)
    dense = elip_models.encode_image(model, image, text, schedule=f"{tower.depth}(100%)")
    assert torch.equal(dense, model.forward_features(image))
    stage = strategy.schedule.stages(tower.num_patches)[0]
    tokens = tower.embed(image)
    for block in tower.blocks[: stage.first]:
        tokens = block(tokens)

    def rows(dtype):
        model.to(dtype)
        inputs = (tower, stage, tokens.to(dtype), text.to(dtype))
        return {name: replace(strategy, scorer=name).score(*inputs) for name in SCORERS}

    exact, found = rows(torch.float64), rows(image.dtype)
    errors = {name: relative_error(found[name], exact[name]) for name in SCORERS}
    return judged(errors, ours=[name for name in SCORERS if name != "official"])


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("case", tower_cases(), ids=str)
def test_tower(record, rounds, case, mode):
    model = timm.create_model(case.name, img_size=case.size, num_classes=0)
    model = model.to(DEVICE, case.dtype).eval()
    random = {"device": DEVICE, "dtype": case.dtype}
    image = torch.randn(1, 3, case.size, case.size, **random)
    held = held_to_fp64(model, image, torch.randn(1, model.embed_dim, **random))
    workload = Workload(model, case.B)
    strategies = {DENSE: None} | {name: Elip(SCHEDULE, scorer=name) for name in SCORERS}
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
            parity=held,
        )
