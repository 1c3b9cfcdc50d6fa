"""Time of a pre-training step of CLIP, ALBEF, BLIP and METER: dense, and reduced with each scorer.

A step is forward and backward of all objectives, with momentum towers and without the optimiser.
Two parts that are slow in the official code are timed too: ITM of pairs and negatives in one pass
of the fusion layers instead of two, and drawing negatives at once instead of one by one.

Parity, in fp64, without dropout, on two pairs: `exact` keeps the tokens of `official` and has the
same loss with the same random numbers. ITM in one pass has the loss of two passes. Both ways to
draw negatives agree if each row has one certain negative.
"""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cases import DEVICE, DTYPE_NAMES, MAIN_DTYPE, pretraining_case
from elip_models.pretraining.models.albef.model import ALBEF
from elip_models.pretraining.models.layers.losses import hard_negatives
from elip_models.pretraining.models.momentum_model import MomentumModel, Negatives
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
from elip_models.reduction.encode import run_tower
from elip_models.reduction.user_warnings import SlowScorerWarning

BOUND = 1e-6  # relative error: towers run in fp64, but losses are fp32
SHARED, MOMENTUM = "last, shared", "momentum"
SCORERS = {
    "official": {"scorer": "official"},
    "exact": {"scorer": "exact"},
    "last": {"scorer": "last"},
    SHARED: {"scorer": "last", "momentum_reduction": "shared"},
    MOMENTUM: {"scorer": "momentum"},
}
ONE_PASS, TWO_PASSES = "ITM in one pass", "two passes"
AT_ONCE, ONE_BY_ONE = "drawing negatives at once", "one by one"


def created(case):
    """Return the reduced model with random weights, on the timed device and in the timed dtype."""
    model = create_model(f"elip_{case.model}", **case.fields).to(DEVICE, case.dtype)
    warnings.simplefilter("ignore", SlowScorerWarning)
    return model


def forms_of(model):
    """Return the dense and the reduced models by name; they share all weights."""
    forms = {}
    for name, fields in {DENSE: {"schedule": None}, **SCORERS}.items():
        if name in (SHARED, MOMENTUM) and not isinstance(model, MomentumModel):
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


class Matching:
    """ITM of a model from the inputs of its `fuse`: hidden states or ids of texts, and tokens."""

    def __init__(self, model, inputs):
        images, ids, self.mask = inputs
        others = torch.arange(len(images), device=images.device).roll(-1)
        self.model, self.negatives = model, Negatives(others, others)
        with torch.no_grad():
            seen = model.contrast(*inputs)
        self.image = seen.image[0].clone().requires_grad_()
        self.text = seen.text.clone().requires_grad_() if isinstance(model, ALBEF) else ids

    def at_once(self):
        """Compute ITM in one pass, as the model does."""
        return self.model.matching_loss(self.text, self.mask, (self.image, None), self.negatives)

    def in_two(self):
        """Compute ITM in two passes: first the pairs, then both kinds of negatives."""
        text, image, mask, negatives = self.text, self.image, self.mask, self.negatives
        pairs = self.model.fuse(text, mask, image)
        others = self.model.fuse(
            torch.cat([text, text[negatives.texts]]),
            torch.cat([mask, mask[negatives.texts]]),
            torch.cat([image[negatives.images], image]),
        )
        logits = self.model.itm_head(torch.cat([pairs[:, 0], others[:, 0]])).float()
        labels = torch.zeros(len(logits), dtype=torch.long, device=DEVICE)
        labels[: len(pairs)] = 1
        return F.cross_entropy(logits, labels)


@pytest.mark.parametrize("name", ["albef", "blip"])
def test_matching(record, rounds, scale, name):
    case = pretraining_case(name, scale)
    exact = Matching(*in_fp64(case))
    parity = check_bound({"loss": abs(exact.at_once().item() / exact.in_two().item() - 1)})
    model = created(case).train()
    matching = Matching(model, inputs_of(model, case.B, case.dtype))

    def run(loss):
        loss().backward()
        model.zero_grad(set_to_none=True)
        matching.text.grad = matching.image.grad = None

    steps = {ONE_PASS: partial(run, matching.at_once), TWO_PASSES: partial(run, matching.in_two)}
    shape = {"B": case.B, "image": model.config.image_size}
    store(record, steps, case.model, rounds, shape, parity)


def one_by_one(similar, tokens):
    """Draw negatives one by one: similarities (B, B), tokens (B, N, D) -> (B, N, D)."""
    weights = similar.float().softmax(1)
    weights.fill_diagonal_(0)
    return torch.stack([tokens[torch.multinomial(row, 1).item()] for row in weights])


def at_once(similar, tokens):
    """Draw all negatives at once."""
    return tokens[hard_negatives(similar)]


def test_negatives(record, rounds, scale):
    B, N, D = (4, 8, 16) if scale == "smallest" else (36, 80, 768)
    tokens = torch.randn(B, N, D, device=DEVICE, dtype=MAIN_DTYPE)
    similar = torch.randn(B, B, device=DEVICE)
    certain = 200 * torch.eye(B, device=DEVICE).roll(1, 0)
    found = at_once(certain, tokens), one_by_one(certain, tokens)
    parity = check_bound({"tokens": (found[0] - found[1]).abs().max().item()})
    steps = {
        AT_ONCE: partial(at_once, similar, tokens),
        ONE_BY_ONE: partial(one_by_one, similar, tokens),
    }
    store(record, steps, f"batch {B}", rounds, {"B": B, "N": N, "D": D}, parity)


def store(record, steps, name, rounds, shape, parity):
    """Time the first of two steps against the second, and record the ratio."""
    ours, theirs = steps
    times = time_side_by_side(steps, device=DEVICE, rounds=rounds)
    record(
        steps[ours],
        op=name,
        does=ours,
        instead_of=theirs,
        rounds=rounds,
        ratios={theirs: ratios_to(theirs, times)[ours]},
        milliseconds=milliseconds(times),
        shape=shape,
        dtype=DTYPE_NAMES[MAIN_DTYPE],
        parity=parity,
    )
