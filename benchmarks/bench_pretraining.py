"""Time of a pre-training step of CLIP, ALBEF, BLIP and METER: dense, and reduced with each scorer.

A step is forward and backward of all objectives, with momentum towers and without the optimiser.

Parity, in fp64, without dropout, on two pairs: `exact` keeps the tokens of `official` and has the
same loss with the same random numbers.
"""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.cases import DEVICE, DTYPE_NAMES, pretraining_case
from elip_models.engine.encode import run_tower
from elip_models.pretraining.models.momentum_model import MomentumModel
from elip_models.pretraining.models.registry import FAMILIES, create_model
from elip_models.profiling.measure import (
    count_step,
    memory_of,
    milliseconds,
    ratios_to,
    time_side_by_side,
)
from elip_models.profiling.runner import DENSE
from elip_models.profiling.workload import shared_copy
from elip_models.user_warnings import SlowScorerWarning

BOUND = 1e-6  # relative error: towers run in fp64, but losses are fp32
SHARED = "last, shared"
SCORERS = {
    "official": {"scorer": "official"},
    "exact": {"scorer": "exact"},
    "last": {"scorer": "last"},
    SHARED: {"scorer": "last", "momentum_reduction": "shared"},
}


def created(case):
    """Return the reduced model with random weights, on the timed device and in the timed dtype."""
    model = create_model(f"elip_{case.model}", **case.fields).to(DEVICE, case.dtype)
    warnings.simplefilter("ignore", SlowScorerWarning)
    return model


def forms_of(model):
    """Return the dense and the reduced models by name; they share all weights."""
    forms = {}
    for name, fields in {DENSE: {"schedule": None}, **SCORERS}.items():
        if name == SHARED and not isinstance(model, MomentumModel):
            continue
        forms[name] = shared_copy(model)
        forms[name].config = replace(model.config, **fields)
        forms[name].reduction = forms[name].config.reduction
    return forms


def inputs_of(model, B, dtype):
    """Return images (B, 3, H, W), texts (B, L) of full length and their mask."""
    size = model.config.image_size
    images = torch.randn(B, 3, size, size, device=DEVICE, dtype=dtype)
    ids = model.random_inputs(images)["input_ids"]
    return images, ids, torch.ones_like(ids)


def in_fp64(case):
    """Return the model in fp64 and eval mode, and two pairs."""
    model = created(replace(case, dtype=torch.float64)).eval()
    return model, inputs_of(model, 2, torch.float64)


def check_bound(errors):
    """Check that errors are at most `BOUND`; return the entry of the JSON."""
    worst = max(errors.values())
    assert worst <= BOUND, f"parity: expected errors of at most {BOUND}, got {errors}"
    return {"max_abs": worst, "bound": BOUND, "passed": True, "errors": errors}


@torch.no_grad()
def exact_is_official(case):
    """Check that both scorers keep the same tokens and have the same losses."""
    model, (images, ids, mask) = in_fp64(case)
    forms, kept, losses = forms_of(model), [], []
    for form in (forms["official"], forms["exact"]):
        _, infos = run_tower(form.tower, images, form.text_cls(ids, mask), form.reduction)
        kept.append([info.reduction.kept for info in infos])
        torch.manual_seed(0)  # both forms draw the same negatives and masks
        output = form(images, ids, mask)
        losses.append({n: v.item() for n, v in vars(output).items() if n.startswith("loss")})
    assert kept[0], "parity: expected a reduction, got none"
    assert all(map(torch.equal, *kept)), "parity: expected the same kept tokens, got others"
    official, exact = losses
    return check_bound({name: abs(exact[name] / official[name] - 1) for name in official})


def loss_of(model, images, ids, mask):
    """Compute the loss of all objectives with new random numbers."""
    return model(images, ids, mask).loss


def step(model, images, ids, mask):
    """Run forward and backward, without an optimiser."""
    loss_of(model, images, ids, mask).backward()
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_pretraining(record, rounds, scale, name):
    case = pretraining_case(name, scale)
    parity = exact_is_official(case)
    model = created(case)
    forms, inputs = forms_of(model), inputs_of(model, case.B, case.dtype)
    steps = {name: partial(step, form.train(), *inputs) for name, form in forms.items()}
    times = time_side_by_side(steps, device=DEVICE, rounds=rounds)
    ratios = ratios_to(DENSE, times)
    memory = {
        name: memory_of(
            steps[name], DEVICE, forward=partial(form, *inputs), parameters=form.parameters()
        )
        for name, form in forms.items()
    }
    losses = {name: partial(loss_of, form, *inputs) for name, form in forms.items()}
    flops = {name: sum(count_step(loss, backward=True)) for name, loss in losses.items()}
    record(
        steps["last"],
        op=case.model,
        family=name,
        direction="training",
        rounds=rounds,
        ratios={name: ratios[name] for name in forms if name != DENSE},
        milliseconds=milliseconds(times),
        step_flops={name: count / flops[DENSE] for name, count in flops.items()},
        memory=memory,
        shape={"B": case.B, "image": model.config.image_size},
        width=model.config.vision_width,
        dtype=DTYPE_NAMES[case.dtype],
        parity=parity,
    )
