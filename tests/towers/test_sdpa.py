"""BLIP's vision layers on fused attention: the same numbers, parameters and keys."""

import copy
import pickle

import pytest
import torch
import transformers

import elip_models
from tests.helpers.models import HF, enlarged
from tests.helpers.towers import SCHEDULE, WIDTH, gradients, images, text


def blip(**options):
    config = transformers.BlipVisionConfig(**(HF | options))
    return enlarged(transformers.BlipVisionModel(config))


def step(model, x, weights):
    model.zero_grad()
    out = model(x).last_hidden_state
    (out * weights).sum().backward()
    return out.detach(), gradients(model)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_and_gradients_are_those_of_the_eager_form(mode):
    model, x, weights = getattr(blip(), mode)(), images(), torch.randn(2, 37, WIDTH)
    expected, eager = step(model, x, weights)
    keys = list(model.state_dict())
    _, exact = step(copy.deepcopy(model).double(), x.double(), weights.double())
    assert elip_models.use_sdpa_(model) is model
    got, fused = step(model, x, weights)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for name, grad in exact.items():
        ours, theirs = ((g[name] - grad).abs().max() for g in (fused, eager))
        assert ours <= 2 * theirs + 1e-6 * grad.abs().max(), name
    assert list(model.state_dict()) == keys
    elip_models.use_sdpa_(model, enabled=False)
    assert torch.equal(model(x).last_hidden_state, expected)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_reduced_model_and_its_copies_take_it_too(how):
    model, x, t = blip().eval(), images(), text()
    elip_models.reduce_(model, schedule=SCHEDULE)
    with elip_models.guidance(model, t):
        expected = model(x).last_hidden_state
    other = how(elip_models.use_sdpa_(model))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # the copy reads its own
    with elip_models.guidance(other, t):
        got = other(x).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert got.shape == (2, 12, WIDTH)


@pytest.mark.slow
def test_compiles_whole():
    torch._dynamo.reset()
    model, x = elip_models.use_sdpa_(blip()).eval(), images()
    expected = model(x).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
