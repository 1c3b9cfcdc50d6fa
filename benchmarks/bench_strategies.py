"""Time of every strategy at equal training FLOPs against dense, in training and inference.

The share of the dense FLOPs is that of ELIP with the paper's schedule and the scorer 'last'.
`at_flops` sets the other strategies to it; `resize` takes the nearest size.

Parity: the tokens of each strategy in the timed dtype against fp64 with the same kept and merged
tokens, and the same small image if the strategy has one. The error is at most twice that of dense.
"""

import pytest
import timm
import torch

from benchmarks.cases import DEVICE, DTYPE_NAMES, MAIN_DTYPE, ON_GPU, OTHER_DTYPE
from benchmarks.parity import check_errors, relative_error
from elip_models.engine.forward_state import ForwardState
from elip_models.profiling.runner import DENSE, count, in_mode, measure
from elip_models.profiling.workload import Workload
from elip_models.strategies import STRATEGIES, Dense
from elip_models.strategies.elip import ELIP
from elip_models.strategies.flops import training_ratio
from elip_models.strategies.schedule import PAPER
from elip_models.towers import as_tower

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
BASE, SMALL, TINY = (f"vit_{size}_patch16_224" for size in ("base", "small", "tiny"))


def steps(scale):
    """Return mode, batch size and dtype of each case, as 'training-B2-fp32'."""
    main, other = DTYPE_NAMES[MAIN_DTYPE], DTYPE_NAMES[OTHER_DTYPE]
    if scale == "full":
        one, many = 1, 64 if ON_GPU else 8
        cases = [f"{mode}-B{B}-{main}" for mode in ("training", "inference") for B in (one, many)]
        return [*cases, f"inference-B{many}-{other}"]
    return [f"training-B2-{main}", f"inference-B1-{main}"]


def created(scale, dtype):
    """Create the tower of a scale in the timed dtype."""
    name, size = (TINY, 96) if scale == "smallest" else (BASE if ON_GPU else SMALL, 224)
    model = timm.create_model(name, img_size=size, num_classes=0)
    return name, model.to(DEVICE, dtype).eval()


def strategies_at_equal_flops(tower):
    """Return the strategies by name, and their share of the dense training FLOPs."""
    share = training_ratio(ELIP(PAPER), tower.size)
    strategies = {name: strategy().fitted(tower) for name, strategy in STRATEGIES.items()}
    return {name: each.at_flops(tower, share) for name, each in strategies.items()}, share


def run(tower, image, text, strategy, replays=None):
    """Return the tokens of an image of any size and the info of each step; `replays` are reused."""
    forward = ForwardState(tower, strategy, text, replays=replays)
    tokens = tower.enter(tower.patchify(image))
    for i in range(tower.depth):
        tokens, info = forward.run_block(i, tokens)
        if info is not None:
            forward.infos[i] = info
    return tower.finish(tokens), list(forward.infos.values())


def in_fp64(info):
    """Convert the attention row of a `StageInfo` to fp64."""
    return info if info.attention is None else info._replace(attention=info.attention.double())


@torch.no_grad()
def compare_with_fp64(model, strategies):
    """Return the parity of `model`, whose weights do not change."""
    tower, dtype = as_tower(model), next(model.parameters()).dtype
    image = torch.randn(1, 3, *tower.image_size, device=DEVICE, dtype=dtype)
    text = torch.randn(1, tower.width, device=DEVICE, dtype=dtype)
    every = {DENSE: Dense(), **strategies}
    images = {name: strategy.resize(tower, image) for name, strategy in every.items()}
    found = {name: run(tower, images[name], text, each) for name, each in every.items()}
    model.double()
    errors = {}
    for name, (tokens, infos) in found.items():
        replays = [in_fp64(info) for info in infos]
        exact, _ = run(tower, images[name].double(), text.double(), every[name], replays)
        errors[name] = relative_error(tokens, exact)
    model.to(dtype)
    return check_errors(errors, ours=list(strategies))


@pytest.mark.cases(case=steps)
def test_strategies(record, rounds, scale, case):
    mode, batch, dtype_name = case.split("-")
    batch = int(batch.removeprefix("B"))
    name, model = created(scale, DTYPES[dtype_name])
    strategies, share = strategies_at_equal_flops(as_tower(model))
    checked = compare_with_fp64(model, strategies)
    every = {DENSE: None, **strategies}
    workload = Workload(model, batch)
    measured = measure(workload, every, mode, rounds=rounds)
    flops = {name: sum(each) for name, each in count(workload, every, mode).items()}
    with in_mode(workload, mode):
        record(
            workload.forward(strategies["elip"]),
            op=name,
            direction=mode,
            rounds=rounds,
            ratios={name: measured[name].time_ratio for name in strategies},
            milliseconds={name: 1e3 * each.seconds for name, each in measured.items()},
            strategies={name: str(each) for name, each in strategies.items()},
            strategy_flops={name: each / flops[DENSE] for name, each in flops.items()},
            share=share,
            memory={name: each.memory for name, each in measured.items()},
            shape={"B": batch, "image": workload.tower.image_size[0]},
            dtype=dtype_name,
            parity=checked,
        )
