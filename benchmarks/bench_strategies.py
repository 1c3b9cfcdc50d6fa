"""Every strategy at equal training FLOPs, dense beside them: a training step and inference.

The share of the dense FLOPs is what ELIP's own schedule leaves with the scorer 'last'; the others
are set to it by `at_flops`, `resize` to the nearest size. Batch 1, and the largest power of two
whose benchmark fits two minutes.

Parity: each strategy's tokens, in the dtype that is timed, against fp64 tokens of which the same
were kept and merged, of the same small image for `resize`; at most twice as far off as dense.
"""

import pytest
import timm
import torch

from benchmarks.cases import DEVICE, DTYPE_NAMES, MAIN_DTYPE, ON_GPU
from benchmarks.parity import judged, relative_error
from elip_models.profiling.measure import time_side_by_side
from elip_models.profiling.rows import DENSE, count, in_mode, measure
from elip_models.profiling.workload import Workload
from elip_models.reduction.flops import training_ratio
from elip_models.reduction.step import Forward
from elip_models.reduction.strategies import STRATEGIES, Dense
from elip_models.reduction.strategies.elip import Elip
from elip_models.towers import as_tower

NAME, SIZE = ("vit_base_patch16_224" if ON_GPU else "vit_small_patch16_224"), 224
SECONDS, LARGEST = 120, 256


def strategies_at_equal_flops(tower):
    """By name, and the share of the dense training FLOPs."""
    share = training_ratio(Elip(), tower.size)
    strategies = {name: strategy().fitted(tower) for name, strategy in STRATEGIES.items()}
    return {name: each.at_flops(tower, share) for name, each in strategies.items()}, share


def run(tower, image, text, strategy, replays=None):
    """Tokens of an image of any size, and what each step did; `replays`: what it is to do again."""
    forward = Forward(tower, strategy, text, replays=replays)
    tokens = tower.enter(tower.patchify(image))
    for i in range(tower.depth):
        tokens, info = forward.block(i, tokens)
        if info is not None:
            forward.infos[i] = info
    return tower.finish(tokens), list(forward.infos.values())


@torch.no_grad()
def held_to_fp64(model, strategies):
    """Parity of `model`, which comes back as it was."""
    tower, dtype = as_tower(model), next(model.parameters()).dtype
    image = torch.randn(1, 3, SIZE, SIZE, device=DEVICE, dtype=dtype)
    text = torch.randn(1, tower.width, device=DEVICE, dtype=dtype)
    every = {DENSE: Dense(), **strategies}
    images = {name: image for name in every} | {"resize": every["resize"].smaller(tower, image)}
    found = {name: run(tower, images[name], text, each) for name, each in every.items()}
    model.double()
    errors = {}
    for name, (tokens, infos) in found.items():
        exact, _ = run(tower, images[name].double(), text.double(), every[name], infos)
        errors[name] = relative_error(tokens, exact)
    model.to(dtype)
    return judged(errors, ours=list(strategies))


def largest_batch(model, mode, count, rounds):
    """The largest power of two at which `count` strategies take two minutes; dense is the guide."""
    workload = Workload(model, 1)
    with in_mode(workload, mode):
        forward = workload.forward(None)
        step = (lambda: workload.train_step(forward)) if mode == "training" else forward
        seconds = min(time_side_by_side({DENSE: step}, device=DEVICE, rounds=3)[DENSE])
    batch = 1
    while batch < LARGEST and 2 * batch * seconds * count * (rounds + 3) < SECONDS:
        batch *= 2
    return batch


@pytest.mark.parametrize("batch", ["B1", "largest"])
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_strategies(record, rounds, mode, batch):
    model = timm.create_model(NAME, num_classes=0).to(DEVICE, MAIN_DTYPE).eval()
    strategies, share = strategies_at_equal_flops(as_tower(model))
    held = held_to_fp64(model, strategies)
    every = {DENSE: None, **strategies}
    B = 1 if batch == "B1" else largest_batch(model, mode, len(every), rounds)
    workload = Workload(model, B)
    measured = measure(workload, every, mode, rounds=rounds)
    flops = {name: sum(each) for name, each in count(workload, every, mode).items()}
    with in_mode(workload, mode):
        record(
            workload.forward(strategies["elip"]),
            op=NAME,
            direction=mode,
            rounds=rounds,
            ratios={name: measured[name].time_ratio for name in strategies},
            milliseconds={name: 1e3 * each.seconds for name, each in measured.items()},
            strategies={name: str(each) for name, each in strategies.items()},
            strategy_flops={name: each / flops[DENSE] for name, each in flops.items()},
            share=share,
            memory={name: each.memory for name, each in measured.items()},
            shape={"B": B, "image": SIZE},
            dtype=DTYPE_NAMES[MAIN_DTYPE],
            parity=held,
        )
