"""Weight decay and learning rate scales of parameters match the official rules."""

import pytest
import torch

from elip_models.pretraining.checkpoints.names import KINDS
from elip_models.pretraining.checkpoints.renaming import rename_tensors, reversed_names
from elip_models.pretraining.models.registry import create_model
from elip_models.pretraining.training.optim import parameter_groups
from elip_models.pretraining.training.recipe import load_recipe
from tests.helpers.tiers import first_quick

OF_METER = (
    "bias",
    *(
        f"{norm}.{part}"
        for norm in ("LayerNorm", "norm", "norm1", "norm2")
        for part in ("bias", "weight")
    ),
)
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
        scales = {5 if any(part in each for part in faster) else 1 for each in theirs}
        assert scales == {scale_of[parameter]}, ours
