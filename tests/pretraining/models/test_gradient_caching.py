"""Gradient caching: a batch in slices has the gradients of the whole batch, for less memory."""

import copy

import pytest
import torch

import elip_models
from elip_models.pretraining.training.trainer import train
from elip_models.profiling.measure import saved_bytes
from elip_models.validation import ConfigError
from tests.helpers.tiers import tiered
from tests.helpers.tiny_run import own_process, tiny_config
from tests.helpers.towers import assert_equal_gradients, gradients

SIZES = {
    "image_size": 32,
    "vision_width": 32,
    "vision_heads": 2,
    "vision_depth": 3,
    "text_width": 32,
    "text_heads": 2,
    "text_depth": 1,
    "embed_dim": 16,
    "vocab_size": 48,
    "context_length": 8,
    "eos_token_id": 41,
    "schedule": "1(100%) 1(75%) 1(50%)",
}
STRATEGIES = {
    "last": {"scorer": "last"},
    "exact": {"scorer": "exact"},
    "nearest": {"scorer": "last", "merge": "nearest"},
    "guided_tome": {"strategy": "guided_tome"},
    "evit": {"strategy": "evit"},
    "dense": {"schedule": None},
    "sigmoid": {"loss": "sigmoid"},
}


def tiny_clip(**options):
    torch.manual_seed(0)
    return elip_models.create_model("elip_clip_tiny", **(SIZES | options))


def batch_of(model, count=6):
    ids = torch.randint(1, 40, (count, 8))
    ids[:, -1] = model.config.eos_token_id
    return {"images": torch.randn(count, 3, 32, 32), "input_ids": ids}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", tiered(STRATEGIES, ["last", "guided_tome"], slow=["exact"]))
def test_gradients_are_those_of_the_whole_batch(name, checkpointed):
    model = tiny_clip(**STRATEGIES[name]).double()
    other, batch = copy.deepcopy(model), batch_of(model)
    batch["images"] = batch["images"].double()
    expected = model(**batch)
    expected.loss.backward()
    other.set_batch_slices(4)  # of two, two, one and one
    other.set_grad_checkpointing(checkpointed)
    output = other(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=0)
    assert_equal_gradients(gradients(other), gradients(model), rtol=1e-9, atol=1e-12)


def test_gradient_caching_saves_less_for_backward():
    model = tiny_clip()
    batch, saved = batch_of(model, 8), []
    for slices in (1, 4):
        model.set_batch_slices(slices)
        with saved_bytes(model.parameters()) as count:
            model(**batch)
        saved.append(count())
    assert saved[1] < saved[0] / 5


def test_models_with_other_losses_refuse_batch_slices(tmp_path):
    config = tiny_config(tmp_path, "optim.batch_slices=2", recipe="albef_tiny")
    message = "optim.batch_slices: expected 1, since the loss of albef depends on more"
    with own_process(), pytest.raises(ConfigError, match=message):
        train(config)
