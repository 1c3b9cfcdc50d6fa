"""Any other wrapper around a layer that a scorer reads is called, or raises at every forward."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import elip_models
from elip_models.towers import as_tower
from tests.helpers.models import open_clip_vit
from tests.helpers.tiers import slow_except, tiered
from tests.helpers.towers import WIDTH, images, plain_vit, text
from tests.towers.test_wrapped_weights import MODELS, assert_equal_outputs, elip, perturbed


class Quantised(nn.Module):
    """A layer with weights in eighths that no attribute contains."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("codes", (linear.weight * 8).round())
        self.register_buffer("shift", linear.bias.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.codes / 8, self.shift)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Halves(nn.Module):
    def forward(self, weight):
        return weight / 2


def quantise(attn):
    attn.qkv = Quantised(attn.qkv)


def subclass(attn):
    linear = Doubled(attn.qkv.in_features, attn.qkv.out_features).double()
    linear.load_state_dict(attn.qkv.state_dict())
    attn.qkv = linear


def replace_forward(attn):
    forward = attn.qkv.forward
    attn.qkv.forward = lambda x: 3 * forward(x)


WRAPPERS = {
    "quantised": quantise,
    "a subclass": subclass,
    "another forward": replace_forward,
    "a hook": lambda attn: attn.qkv.register_forward_hook(lambda m, x, y: -y),
    "a pre-hook": lambda attn: attn.qkv.register_forward_pre_hook(lambda m, x: (x[0].flip(-1),)),
    "parametrized": lambda attn: parametrize.register_parametrization(attn.qkv, "weight", Halves()),
    "weight norm": lambda attn: perturbed(parametrizations.weight_norm(attn.qkv)),
    "weight norm by a hook": lambda attn: perturbed(nn.utils.weight_norm(attn.qkv)),
}


def as_it_acts(qkv):
    """Return a plain layer with the effect of the wrapped one, found by calling it."""
    with torch.no_grad():
        bias = qkv(torch.zeros(1, WIDTH).double())[0]
        weight = qkv(torch.eye(WIDTH).double()) - bias
    linear = nn.Linear(WIDTH, len(bias)).double()
    linear.load_state_dict({"weight": weight.T, "bias": bias})
    return linear


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("order", slow_except(["wrap first"], ["reduce first", "wrap first"]))
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("scorer", tiered(["cls", "last"], ["last"]))
def test_any_other_wrapper_is_called(wrapper, scorer, order):
    model, plain, how = plain_vit().double(), plain_vit().double(), elip(scorer)
    plain.load_state_dict(model.state_dict())
    steps = [lambda: elip_models.reduce_(model, **how)]
    steps.append(lambda: [WRAPPERS[wrapper](block.attn) for block in model.blocks])
    for step in steps if order == "reduce first" else steps[::-1]:
        step()
    for block, other in zip(model.blocks, plain.blocks, strict=True):
        other.attn.qkv = as_it_acts(block.attn.qkv)
    elip_models.reduce_(plain, **how)
    assert_equal_outputs(model, plain, images().double(), text().double())


@pytest.mark.parametrize("make", [plain_vit, open_clip_vit, MODELS["HF ViT"][0], MODELS["Eva"][0]])
def test_a_wrapped_attention_is_refused_at_every_forward(make):
    model = elip_models.reduce_(make().eval(), **elip("last"))
    block = as_tower(model).blocks[-1]  # the layer whose row the last stage reads
    name = next(name for name, _ in block.named_children() if "att" in name)
    setattr(block, name, nn.Sequential(getattr(block, name)))
    with pytest.raises(TypeError, match="Sequential"):
        model(images())
