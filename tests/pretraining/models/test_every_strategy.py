"""ALBEF, BLIP and METER with every strategy: tokens, momentum towers, checkpoints, training.

The models are those of `cross_modal_cases`, in fp64; the patches of an image are 16.
"""

import pytest
import torch

from elip_models.engine.encode import run_tower
from elip_models.strategies import STRATEGIES
from tests.helpers.cross_modal_cases import (
    MODELS,
    batch_of_four,
    check_checkpointing,
    made,
)
from tests.helpers.tiers import tiered

OPTIONS = {
    "evit": {"keep_ratio": 0.7},
    "tome": {"r": 3},
    "guided_tome": {"r": 3, "protect": 0.5},
    "patch_dropout": {"keep_ratio": 0.5},
    "resize": {"size": 12},
}
OTHERS = [name for name in STRATEGIES if name != "elip"]
LEFT = {"evit": 10, "tome": 8, "patch_dropout": 9, "resize": 10}
LEFT |= {"elip": 10, "trips": 10, "random": 10, "guided_tome": 8}
MOMENTUM = ["albef", "blip"]
CASES = [(family, strategy) for family in MODELS for strategy in STRATEGIES]
QUICK = [
    *((family, "elip") for family in MODELS),
    ("albef", "tome"),
    ("blip", "guided_tome"),
    ("meter", "evit"),
    ("meter", "random"),
    ("blip", "resize"),
    ("albef", "patch_dropout"),
]


def reduced(family, strategy, **options):
    return made(family, strategy=strategy, strategy_options=OPTIONS.get(strategy), **options)


@pytest.mark.parametrize(("family", "strategy"), tiered(CASES, QUICK))
def test_checkpointing_changes_no_loss_and_no_gradient(family, strategy):
    check_checkpointing(reduced(family, strategy))


@pytest.mark.parametrize("strategy", tiered(OTHERS, ["tome", "trips"]))
@pytest.mark.parametrize("family", MOMENTUM)
def test_momentum_reduction_shared_keeps_the_same_tokens_and_own_scores_by_itself(family, strategy):
    """Compare with a momentum tower of equal weights, and of other weights."""
    model = reduced(family, strategy, momentum_reduction="shared", momentum=1.0)
    images, ids, mask = batch_of_four()
    seen = model.contrast(images, ids, mask)
    assert torch.equal(seen.image_m, seen.image) and not seen.image_m.requires_grad
    for weight in model.encoders_m.visual.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    seen = model.contrast(images, ids, mask)
    assert seen.image_m.shape == seen.image.shape
    assert not torch.equal(seen.image_m, seen.image)
    own = reduced(family, strategy, momentum_reduction="own", momentum=1.0).eval()
    own.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    seen = own.contrast(images, ids, mask)
    torch.manual_seed(0)
    text = own.encode_text(ids, mask)[:, 0]
    _, expected = (run_tower(t, images, text, own.reduction)[0] for t in (own.tower, own.tower_m))
    assert torch.equal(seen.image_m, expected)


@pytest.mark.parametrize("family", MODELS)
def test_patch_dropout_ends_at_its_step_and_alpha_goes_on(family):
    options = {"keep_ratio": 0.5, "until": 2}
    model = made(family, strategy="patch_dropout", strategy_options=options)
    left = []
    for now in range(4):
        model.begin_step(now, now / 4)
        left.append(model.encode_image(batch_of_four()[0])[0].shape[1])
    assert left == [9, 9, 17, 17]
    if family in MOMENTUM:
        assert model.alpha == pytest.approx(0.4 * min(1.0, 0.75 / model.config.alpha_warmup_epochs))
