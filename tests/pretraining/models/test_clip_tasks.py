"""CLIP as a classifier: head, trained weights, reduction by the image alone."""

import pytest
import torch

import elip_models
from elip_models.pretraining.models.clip.tasks import CLIPClassification, CLIPClassificationConfig
from tests.pretraining.models.test_clip import tiny

SCHEDULE = "2(100%) 2(90%) 6(65%) 2(40%)"
CLASSES = 5


def classifier(**overrides):
    sizes = vars(tiny("clip_tiny").config) | {"num_classes": CLASSES}
    return CLIPClassification(CLIPClassificationConfig(**sizes | overrides))


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


def test_it_is_dense_without_vision_only_guidance():
    dense, x = classifier().eval(), batch()["images"]
    with pytest.warns(UserWarning, match="nothing is reduced"):
        elip_models.user_warnings.warn_again()
        unguided = classifier(schedule=SCHEDULE).eval()
        unguided.load_state_dict(dense.state_dict())
        assert torch.equal(unguided.logits(x), dense.logits(x))
    model = classifier(schedule=SCHEDULE, scorer="last", without_text="vision").eval()
    model.load_state_dict(dense.state_dict())
    tokens = elip_models.encode_image(
        model.visual, x, schedule=SCHEDULE, scorer="last", without_text="vision"
    )
    torch.testing.assert_close(model.logits(x), model.head(tokens[:, 0]))
    assert not torch.allclose(model.logits(x), dense.logits(x))
