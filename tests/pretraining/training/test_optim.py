"""Learning rates, weight decay, and steps that are not finite."""

import pytest
import torch

from elip_models.pretraining.checkpoints.names import KINDS
from elip_models.pretraining.checkpoints.renaming import rename_tensors, reversed_names
from elip_models.pretraining.models.registry import create_model
from elip_models.pretraining.training.optim import (
    learning_rate,
    parameter_groups,
    skip_nonfinite_step_,
    step_,
)
from elip_models.pretraining.training.recipe import load_recipe
from elip_models.pretraining.training.run_config import OptimConfig
from tests.helpers.tiers import first_quick

RATES = [  # decay, warm-up, step of 100, multiple of the peak
    ("cosine", 10, 0, 0.1),
    ("cosine", 10, 9, 1.0),
    ("cosine", 10, 55, 0.55),
    ("cosine", 0, 0, 1.0),
    ("cosine", 5000, 9, 0.5),  # capped at a fifth of the run
    ("linear", 10, 55, 0.55),
    ("linear", 10, 100, 0.1),
    ("step", 10, 24, 1.0),
    ("step", 10, 25, 0.5),
    ("step", 10, 100, 0.1),
]


@pytest.mark.parametrize(("decay", "warmup_steps", "step", "expected"), RATES)
def test_learning_rate(decay, warmup_steps, step, expected):
    settings = {"lr": 2.0, "min_lr": 0.2, "decay": decay, "decay_rate": 0.5}
    optim = OptimConfig(batch_size=1, warmup_steps=warmup_steps, **settings)
    rate = learning_rate(step, optim, total_steps=100, steps_per_epoch=25)
    assert rate == pytest.approx(2 * expected)


@pytest.mark.parametrize("accumulation", [3, 7])
def test_step_decay_begins_with_the_epoch(accumulation):
    """Take epochs of 10 batches, which need not be a whole number of steps."""
    optim = OptimConfig(batch_size=1, lr=1.0, warmup_steps=0, decay="step", decay_rate=0.5)
    for step in range(100):
        epoch = step * accumulation // 10
        rate = learning_rate(step, optim, total_steps=1000, steps_per_epoch=10 / accumulation)
        assert rate == 0.5**epoch


def test_learning_rates_of_named_and_of_frozen_parameters():
    model = create_model("meter_tiny", vocab_size=300)
    model.visual.requires_grad_(False)
    groups = parameter_groups(model, 0.1, {"itm_head.bias": 2, "itm_head.*": 5})
    scale_of = {p: group["lr_scale"] for group in groups for p in group["params"]}
    assert scale_of.keys() == {p for p in model.parameters() if p.requires_grad}
    assert scale_of.pop(model.itm_head.bias) == 2 and scale_of.pop(model.itm_head.weight) == 5
    assert set(scale_of.values()) == {1.0}
    with pytest.raises(ValueError, match=r"lr_scale: expected patterns.*'itn_head"):
        parameter_groups(model, 0.1, {"itn_head.*": 5})


NORMS = ("LayerNorm", "norm", "norm1", "norm2")
OF_METER = ("bias", *(f"{norm}.weight" for norm in NORMS))
OFFICIAL = {  # name and tensor of the official model -> whether it decays
    "albef_4m": ("albef", lambda name, tensor: tensor.ndim != 1 and not name.endswith(".bias")),
    "blip_4m": ("blip", lambda name, tensor: True),
    "meter_4m": ("meter", lambda name, tensor: not any(part in name for part in OF_METER)),
    "clip_vit_s16_cc3m": (
        "open_clip",
        lambda name, tensor: (
            tensor.ndim >= 2
            and not any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        ),
    ),
}
LEARN_FASTER = {"meter_4m": ("cross_modal", "mlm_score", "itm_score")}


@pytest.mark.parametrize("name", first_quick(OFFICIAL))
def test_a_recipe_decays_and_scales_what_the_original_does(name):
    recipe = load_recipe(name, ["data.train=a.json"])
    kind, decays = OFFICIAL[name]
    with torch.device("meta"):
        model = create_model(recipe.model.name, **recipe.model.overrides)
    optim = recipe.optim
    groups = parameter_groups(model, 0.1, optim.lr_scale, no_decay=optim.no_decay)
    decay_of = {p: group["weight_decay"] > 0 for group in groups for p in group["params"]}
    scale_of = {p: group["lr_scale"] for group in groups for p in group["params"]}
    faster = LEARN_FASTER.get(name, ())
    table = reversed_names(KINDS[kind].names)
    for ours, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        theirs = rename_tensors(
            {ours: parameter.squeeze() if kind == "open_clip" else parameter}, table
        )
        assert {decays(*item) for item in theirs.items()} == {decay_of[parameter]}, ours
        scales = {5 if any(part in name for part in faster) else 1 for name in theirs}
        assert scales == {scale_of[parameter]}, ours


def trained(fused):
    """Return a layer and its optimiser after a step, with gradients for the next one."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=fused)
    layer(torch.randn(2, 4)).square().sum().backward()
    optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_only_a_nonfinite_step_is_skipped(fused, norm):
    (layer, optimizer), (other, expected) = trained(fused), trained(fused)
    if norm == 1:
        expected.step()
    else:
        layer.weight.grad.fill_(norm)
    if fused:  # skips the step itself, so that the host does not wait for the norm of a GPU
        skip_nonfinite_step_(optimizer, torch.tensor(norm))
        optimizer.step()
    else:
        step_(optimizer, torch.tensor(norm))
    states = [optimizer.state_dict()["state"], layer.state_dict()]
    exact = [expected.state_dict()["state"], other.state_dict()]
    torch.testing.assert_close(states, exact, rtol=0, atol=0)
