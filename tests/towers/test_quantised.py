"""Quantised linear layers, before or after `reduce_`.

Scorers and strategies compute what a call of the layers computes.
"""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import elip_models
from elip_models.towers.hf_image_text import through_transpose
from tests.helpers.models import ROTARY, TOWERS, hf_clip, ids, output, output_of_guided_pair
from tests.helpers.strategies import WITHOUT_TEXT as STRATEGIES
from tests.helpers.tiers import tiered
from tests.helpers.towers import SCHEDULE, images, plain_vit


def by(config):
    def quantised(model):
        model = copy.deepcopy(model)
        quantize_(model, config())
        return model

    return quantised


def dynamic(model):
    """PyTorch's own quantisation, which replaces nn.Linear modules."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


WEIGHTS = {"int8 weights": by(Int8WeightOnlyConfig), "fp8 weights": by(Float8WeightOnlyConfig)}
QUANTISED = WEIGHTS | {
    "int8 weights and activations": by(Int8DynamicActivationInt8WeightConfig),
    "quantize_dynamic": dynamic,
}


@torch.no_grad()
def drawn(model, x):
    """Return the output, with the same random numbers in all calls."""
    torch.manual_seed(1)
    return output(model, x)


EVERY = list(product(STRATEGIES, QUANTISED))
every_case = pytest.mark.parametrize(
    ("strategy", "how"),
    tiered(
        EVERY,
        quick=[("elip last", "int8 weights")],
    ),
)


@every_case
def test_a_model_is_quantised_before_or_after_it_is_reduced(strategy, how):
    model, x, strategy = plain_vit().eval(), images(), STRATEGIES[strategy]
    before = elip_models.reduce_(QUANTISED[how](model), strategy=strategy)
    after = QUANTISED[how](elip_models.reduce_(model, strategy=strategy))
    assert torch.equal(drawn(after, x), drawn(before, x))


@torch.no_grad()
def as_it_acts(model):
    """Return a copy with plain layers, whose weights come from calls of the quantised ones."""
    model = copy.deepcopy(model)
    for owner in list(model.modules()):
        for name, layer in owner.named_children():
            if type(layer) is nn.Linear and type(layer.weight.data) is not torch.Tensor:
                plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
                plain.weight.copy_(layer.weight.dequantize())
                if layer.bias is not None:
                    plain.bias.copy_(layer.bias)
                setattr(owner, name, plain)
    return model


TOWERS_READ = ("timm", "timm q/k norm", "open_clip", "HF CLIP", "HF BLIP", "EVA-02 base")
EVERY_TOWER = TOWERS | ROTARY
ROWS = {name: STRATEGIES[name] for name in ("elip last", "elip cls", "evit", "tome")}


@pytest.mark.parametrize("how", WEIGHTS)
@pytest.mark.parametrize("tower", tiered(TOWERS_READ, quick=["timm"]))
def test_rows_are_those_of_the_weights_as_they_act(tower, how):
    model, x = WEIGHTS[how](EVERY_TOWER[tower]().eval()), images()
    plain = as_it_acts(model)
    for strategy in ROWS.values():
        found, expected = (
            drawn(elip_models.reduce_(each, strategy=strategy), x) for each in (model, plain)
        )
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:torch.(ao.quantization|quantize_per_tensor)")  # deprecated
@pytest.mark.parametrize("how", QUANTISED)
@torch.no_grad()
def test_a_quantised_projection_carries_text_back_to_the_image_tower(how):
    """Its error is that of eight bits: 1 in 127 of the largest value, or 1 in 16 for fp8."""
    model, tokens = hf_clip().eval(), ids()
    layer = nn.Sequential(model.visual_projection)
    features = torch.nn.functional.normalize(torch.randn(4, 16))
    expected = features @ layer[0].weight
    found = through_transpose(features, QUANTISED[how](layer)[0])
    assert (found - expected).abs().max() <= expected.abs().max() / 8
    whole = elip_models.reduce_(QUANTISED[how](model), schedule=SCHEDULE)
    assert output_of_guided_pair(whole, images(), tokens).isfinite().all()
