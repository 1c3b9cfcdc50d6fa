"""CLIP as a classifier: head, trained weights, initial weights, reduction by the image alone."""

from functools import partial
from itertools import product

import pytest
import torch

import elip_models
from elip_models.pretraining.models.clip.model import CLIP
from elip_models.pretraining.models.clip.tasks import CLIPClassification, CLIPClassificationConfig
from elip_models.pretraining.models.registry import create_model
from elip_models.strategies import STRATEGIES
from elip_models.strategies.spec import option_types
from tests.helpers.own_warnings import SLOW_SCORER
from tests.helpers.tiers import tiered
from tests.pretraining.models.test_clip import batch as clip_batch
from tests.pretraining.models.test_clip import tiny

SCHEDULE = "2(100%) 2(90%) 6(65%) 2(40%)"
CLASSES = 5
OPTIONS = {  # what a strategy asks for in a tower of 16 patches
    "tome": {"r": 1},
    "guided_tome": {"r": 1},
    "resize": {"size": 16},
}


def classifier(**overrides):
    sizes = vars(tiny("clip_tiny").config) | {"num_classes": CLASSES}
    return CLIPClassification(CLIPClassificationConfig(**sizes | overrides))


def reduced(strategy, make=classifier, **overrides):
    schedule = SCHEDULE if "schedule" in option_types(strategy) else None
    options = {"strategy_options": OPTIONS.get(strategy), "without_text": "vision"}
    return make(strategy=strategy, schedule=schedule, **options, **overrides)


def batch(B=4):
    return {"images": torch.randn(B, 3, 32, 32), "labels": torch.arange(B) % CLASSES}


def test_the_head_gets_cls():
    model, inputs = classifier(label_smoothing=0.1), batch()
    out = model(**inputs)
    features = model.visual.forward_features(inputs["images"])[:, 0]
    logits = features @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(out.logits, logits)
    torch.testing.assert_close(model.logits(inputs["images"]), logits)
    log_p = logits.log_softmax(1)
    expected = -(0.9 * log_p[range(4), inputs["labels"]] + 0.1 * log_p.mean(1)).mean()
    torch.testing.assert_close(out.loss, expected)


def test_a_probe_trains_its_head_alone_and_saves_nothing_for_the_tower():
    probe, inputs = classifier(tuning="probe", drop_path=0.5), batch()
    assert probe.train().head.training
    assert not any(module.training for module in probe.visual.modules())
    torch.testing.assert_close(probe(**inputs).logits, probe.eval()(**inputs).logits)
    probe.train()(**inputs).loss.backward()
    trained = {name for name, p in probe.named_parameters() if p.grad is not None}
    assert trained == {"head.weight", "head.bias"}
    assert not probe.features(inputs["images"]).requires_grad


def test_a_classifier_has_the_pretrained_tower():
    clip, model = tiny("clip_tiny").eval(), classifier().eval()
    begun = model.from_pretraining(clip.state_dict(), model.config)
    missing, unexpected = model.load_state_dict(begun, strict=False)
    assert (set(missing), unexpected) == ({"head.weight", "head.bias"}, [])
    x = batch()["images"]
    assert torch.equal(model.features(x), clip.visual.forward_features(x)[:, 0])


def test_it_is_dense_without_vision_only_guidance():
    dense, x = classifier().eval(), batch()["images"]
    with pytest.warns(UserWarning, match="nothing is reduced"):
        elip_models.user_warnings.warn_again()
        unguided = classifier(schedule=SCHEDULE).eval()
        unguided.load_state_dict(dense.state_dict())
        assert torch.equal(unguided.logits(x), dense.logits(x))
    model = reduced("elip", scorer="last").eval()
    model.load_state_dict(dense.state_dict())
    tokens = elip_models.encode_image(
        model.visual, x, schedule=SCHEDULE, scorer="last", without_text="vision"
    )
    torch.testing.assert_close(model.logits(x), model.head(tokens[:, 0]))
    assert not torch.allclose(model.logits(x), dense.logits(x))


MAKERS = {
    "clip": partial(tiny, "clip_tiny"),
    "full": classifier,
    "probe": partial(classifier, tuning="probe"),
}
EVERY = list(product(STRATEGIES, MAKERS))
QUICK = [("evit", "clip"), ("tome", "clip"), ("elip", "full"), ("tome", "probe")]


@SLOW_SCORER
@pytest.mark.parametrize(("strategy", "name"), tiered(EVERY, QUICK))
def test_every_strategy_trains_saves_and_loads(strategy, name, tmp_path):
    model = reduced(strategy, MAKERS[name])
    inputs = clip_batch() if name == "clip" else batch()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for step in range(6):
        model.begin_step(step)
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    other, losses = type(model).from_pretrained(model.save_pretrained(tmp_path)).eval(), []
    for one in (other, model.eval()):
        torch.manual_seed(1)
        losses.append(one(**inputs).loss)
    assert torch.equal(*losses)


def test_captions_of_one_image_are_positives():
    torch.manual_seed(0)
    model = create_model("clip_tiny", task="retrieval", image_size=32, vision_depth=2).eval()
    images, ids = torch.randn(4, 3, 32, 32), torch.randint(3, 900, (4, 32))
    inputs = {"images": images, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    apart = model(**inputs, image_ids=torch.arange(4))
    plain = CLIP.forward(model, **inputs)
    torch.testing.assert_close(apart.loss, plain.loss)
    one = model(**inputs, image_ids=torch.zeros(4, dtype=torch.long))
    similar = model.logit_scale.exp() * plain.image_features @ plain.text_features.T
    uniform = -(similar.log_softmax(1).mean() + similar.log_softmax(0).mean()) / 2
    torch.testing.assert_close(one.loss, uniform)
    with pytest.raises(ValueError, match="loss: expected 'itc', got 'sigmoid'"):
        create_model("clip_tiny", task="retrieval", loss="sigmoid")
