"""The caption that guides the images of a training step, and its leak into ITC."""

import pytest
import torch
import torch.nn.functional as F

import elip_models
from elip_kernels.ops.fuse_text import fuse
from tests.helpers.cross_modal_cases import MODELS, batch_of_four, draws, made, step
from tests.helpers.models import enlarged
from tests.helpers.towers import SCHEDULE, assert_equal_gradients, clip_vit, images, text
from tests.pretraining.models.test_clip import batch, tiny

SEEN = {"fusion": 0.2, "guidance_norm": "match"}  # so that selection depends on the text
OTHERS = pytest.mark.parametrize("family", ["albef", "blip"])


def losses_of(model, **inputs):
    """Return the output of a step with seed 0."""
    torch.manual_seed(0)
    return model(**inputs)


def pairs(family="albef"):
    images, ids, mask = batch_of_four()
    inputs = {"images": images, "input_ids": ids, "attention_mask": mask}
    return inputs | {"drawn": draws(family, images, ids, mask, "local")}


@pytest.mark.parametrize("norm", ["none", "match"])
@pytest.mark.parametrize("fusion", [0.0, 0.8])
def test_a_text_of_zeros_is_no_text(fusion, norm):
    cls, t = text(4), text(4)
    t[1], t[3] = 0.0, 0.0
    match = norm == "match"
    fused = fuse(cls, t, fusion, match)
    assert torch.equal(fused[[1, 3]], cls[[1, 3]])
    assert torch.equal(fused[[0, 2]], fuse(cls[[0, 2]], t[[0, 2]], fusion, match))
    assert not torch.equal(fused[[0, 2]], cls[[0, 2]])


def test_another_caption_guides_clip_as_if_it_were_its_own():
    model, inputs = tiny(**SEEN, guide="other").train(), batch()
    guide_ids = inputs["input_ids"].roll(1, 0)
    out = model(**inputs, guide_ids=guide_ids, guide_mask=inputs["attention_mask"])
    guides = model.encode_text(guide_ids, inputs["attention_mask"])
    assert torch.equal(out.image_features, model.encode_image(inputs["images"], guides))
    own = model.encode_image(inputs["images"], out.text_features)
    assert not torch.allclose(out.image_features, own)


@OTHERS
def test_another_caption_guides_a_cross_modal_model(family):
    model, inputs = made(family, **SEEN, guide="other").eval(), pairs(family)
    guides = {"guide_ids": inputs["input_ids"].roll(1, 0)}
    guides["guide_mask"] = inputs["attention_mask"].roll(1, 0)
    out = model(**inputs, **guides)
    text_cls = model.encode_text(*guides.values())[:, 0]
    tokens, _ = model.encode_image(inputs["images"], text_cls)
    torch.testing.assert_close(out.image_features, model.encoders.image_features(tokens))
    with pytest.raises(ValueError, match=r"guide_ids: expected another caption of each image"):
        model(**inputs)


@pytest.mark.parametrize("family", ["clip", *MODELS])
def test_dropout_of_all_guidance_is_vision_alone(family):
    def run(**options):
        torch.manual_seed(1)
        if family == "clip":
            model = enlarged(tiny(**(SEEN | options)))
        else:
            model = made(family, **(SEEN | options))
        return losses_of(model.train(), **inputs).loss

    inputs = batch() if family == "clip" else pairs(family)
    assert torch.equal(run(guide_dropout=1.0), run(fusion=1.0))
    assert not torch.equal(run(guide_dropout=1.0), run())


def test_negatives_are_other_rows_and_the_most_alike_most_often():
    features = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), dim=1)
    model, guides = tiny(**SEEN, guide_negatives=1.0).train(), torch.arange(4.0)[:, None]
    drawn = [model.select_guidance(guides, features, torch.tensor(20.0))[:, 0] for _ in range(50)]
    drawn = torch.stack(drawn)
    assert (drawn != guides[:, 0]).all()
    assert (drawn == torch.tensor([1.0, 0.0, 3.0, 2.0])).float().mean() > 0.9
    many, scale = torch.arange(1.0, 2001.0)[:, None], torch.tensor(1.0)
    shared = tiny(**SEEN, guide_negatives=0.5).train()
    half = shared.select_guidance(many, F.normalize(torch.randn(2000, 4)), scale)
    assert 0.45 < (half != many).float().mean() < 0.55
    kept = tiny(**SEEN, guide_dropout=0.3).train().select_guidance(many)
    assert 0.25 < (kept == 0).float().mean() < 0.35
    assert torch.equal(kept[kept != 0], many[kept != 0])
    assert torch.equal(model.select_guidance(many[:1], features[:1], scale), many[:1])


@OTHERS
def test_after_itc_no_caption_reaches_the_image_features_and_the_others_are_guided(family):
    model, inputs = made(family, **SEEN, guide="after_itc").eval(), pairs(family)
    own = made(family, **SEEN).eval()
    own.load_state_dict(model.state_dict())
    out, guided = model(**inputs), own(**inputs)
    vision = made(family, **(SEEN | {"fusion": 1.0})).eval()
    vision.load_state_dict(model.state_dict())
    expected = vision(**inputs)
    assert torch.equal(out.image_features, expected.image_features)
    assert torch.equal(out.loss_itc, expected.loss_itc)
    assert torch.equal(out.loss_itm, guided.loss_itm)
    assert not torch.equal(out.loss_itc, guided.loss_itc)
    assert not torch.equal(out.loss_itm, expected.loss_itm)


@pytest.mark.parametrize(
    "options", [{"guide_negatives": 0.5, "guide_dropout": 0.3}, {"guide": "after_itc"}], ids=str
)
def test_checkpointing_does_not_change_gradients(options):
    steps, inputs = [], batch_of_four()
    drawn = draws("albef", *inputs, gather="local")
    for enable in (False, True):
        torch.manual_seed(3)
        model = made("albef", **SEEN, **options).train()
        model.set_grad_checkpointing(enable)
        steps.append(step(model, inputs, drawn)[1])
    assert_equal_gradients(*steps, rtol=1e-9, atol=1e-12)


def test_guidance_leaks_unseen_captions_into_features_of_noise():
    """Probe the captions from the features of one noise image.

    All images are the same, so the features depend on the guidance alone. Without it, the probe is
    at chance level.
    """
    model, captions, chance = clip_vit().eval(), text(320), 1 / 16
    same = images(1).expand(320, -1, -1, -1)

    def accuracy(**options):
        with torch.no_grad():
            tokens = elip_models.encode_image(model, same, captions, schedule=SCHEDULE, **options)
        features = tokens[:, 0].double()
        features = torch.cat([features - features.mean(0), torch.ones(320, 1)], dim=1)
        seen, targets = features[:256], captions[:256].double()
        ridge = seen.T @ seen + 1e-3 * torch.eye(seen.shape[1])
        read = F.normalize(features[256:] @ torch.linalg.solve(ridge, seen.T @ targets), dim=1)
        similar = (
            read.view(4, 16, -1) @ F.normalize(captions[256:].double(), dim=1).view(4, 16, -1).mT
        )
        return (similar.argmax(2) == torch.arange(16)).float().mean().item()

    assert accuracy(fusion=1.0) == chance
    assert accuracy(fusion=0.8) > 5 * chance
    assert accuracy(fusion=0.8, guidance_norm="match") > 5 * chance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide": "other", "fusion": 1.0}, "guide: expected 'own' where no text guides"),
        ({"guide_dropout": 0.5, "strategy": "tome"}, "guide_dropout: expected 0.0 where no text"),
        ({"guide": "after_itc", "momentum_reduction": "own"}, "guide: expected 'own' or 'other'"),
        ({"guide": "after_itc", "scorer": "momentum"}, "guide: expected 'own' or 'other'"),
    ],
)
def test_conflicting_settings_raise(options, message):
    with pytest.raises(ValueError, match=message):
        made("albef", **options)
