"""Time of reduced models relative to dense by batch size: eager, compiled, and in a CUDA graph.

`benchmarks.break_even` predicts from which batch on a reduced model is faster; this measures it.

Parity: as in `bench_strategies`, for the eager models.
"""

from copy import deepcopy
from functools import partial

import pytest
import timm
import torch

from benchmarks.bench_strategies import compare_with_fp64
from benchmarks.break_even import STRATEGIES as PREDICTED
from benchmarks.cases import DEVICE, DTYPE_NAMES, MAIN_DTYPE, ON_GPU
from elip_models import reduce_
from elip_models.profiling.measure import milliseconds, ratios_to, time_side_by_side
from elip_models.reduction.strategies import STRATEGIES
from elip_models.towers import as_tower

MODES = {"eager": None, "compiled": "default", "graph": "reduce-overhead"}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128) if ON_GPU else (1, 2)
BASE, SMALL, TINY = (f"vit_{size}_patch16_224" for size in ("base", "small", "tiny"))
DENSE, KEEP = "dense", 0.7
NAMES = (*PREDICTED, "resize")


def modes(scale):
    """Return the modes of a scale: all on a GPU, where alone there are CUDA graphs."""
    if ON_GPU:
        return [*MODES]
    return ["eager", "compiled"] if scale == "full" else ["eager"]


def prepared(model, mode):
    """Return the model in a mode; one compilation serves every batch."""
    return model if MODES[mode] is None else torch.compile(model, mode=MODES[mode], dynamic=True)


@pytest.mark.cases(mode=modes)
@torch.no_grad()
def test_break_even(record, rounds, scale, mode):
    name, size = (TINY, 96) if scale == "smallest" else (BASE if ON_GPU else SMALL, 224)
    model = timm.create_model(name, img_size=size, num_classes=0).to(DEVICE, MAIN_DTYPE).eval()
    tower = as_tower(model)
    strategies = {each: STRATEGIES[each]().fitted(tower).at_keep(tower, KEEP) for each in NAMES}
    checked = compare_with_fp64(model, strategies)
    reduced = {each: reduce_(deepcopy(model), each, keep=KEEP) for each in NAMES}
    models = {each: prepared(found, mode) for each, found in ({DENSE: model} | reduced).items()}
    by_batch = {}
    for B in BATCHES:
        images = torch.randn(B, 3, size, size, device=DEVICE, dtype=MAIN_DTYPE)
        steps = {each: partial(found, images) for each, found in models.items()}
        times = time_side_by_side(steps, device=DEVICE, rounds=rounds)
        by_batch[B] = {"ratios": ratios_to(DENSE, times), "milliseconds": milliseconds(times)}
    last = by_batch[BATCHES[-1]]
    record(
        steps["tome"],
        op=name,
        direction=f"inference, {mode}",
        rounds=rounds,
        ratios={each: last["ratios"][each] for each in NAMES},
        milliseconds=last["milliseconds"],
        by_batch={str(B): found for B, found in by_batch.items()},
        faster_from={each: first_faster(by_batch, each) for each in NAMES},
        shape={"B": BATCHES[-1], "image": size},
        dtype=DTYPE_NAMES[MAIN_DTYPE],
        parity=checked,
    )


def first_faster(by_batch, strategy):
    """Return the smallest measured batch from which on all are faster than dense, or None."""
    slower = [B for B, found in by_batch.items() if found["ratios"][strategy] >= 1]
    last = max(slower, default=0)
    return next((B for B in by_batch if last < B), None)
