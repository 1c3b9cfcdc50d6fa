"""BLIP's pre-training step against the official one, and its other properties."""

import pytest
import torch

from elip_models.pretraining.models.blip.model import BLIP, BLIPConfig
from elip_models.pretraining.models.momentum_model import Negatives
from tests.helpers.official import check_gradients, load_official_, pretraining_fields
from tests.helpers.towers import gradients, our_names

our_name = our_names("blip")


def loaded(case, **options):
    meta = case.meta["config"]
    ids = {
        "decoder_token_id": meta["special_ids"]["bos_dec"],
        "encoder_token_id": meta["special_ids"]["enc"],
    }
    model = BLIP(BLIPConfig(**pretraining_fields(meta), **ids, **options))
    missing = load_official_(model, case, our_name)
    assert set(missing) == {our_name(alias) for alias in case.meta["aliases"]}
    return model


def inputs(case):
    return case["image"], case["input_ids"].long(), case["attention_mask"]


def drawn(case):
    return Negatives(case["neg_image_idx"].long(), case["neg_text_idx"].long())


@pytest.mark.parametrize("scorer", ["official", "exact"])
def test_the_official_step_is_reproduced(golden, scorer):
    case = golden("blip_pretrain")
    model = loaded(case, scorer=scorer)
    out = model(*inputs(case), drawn=drawn(case))
    for name, loss in (("ita", out.loss_itc), ("itm", out.loss_itm), ("lm", out.loss_lm)):
        torch.testing.assert_close(loss, case[f"loss_{name}"], atol=2e-6, rtol=0, msg=name)
    out.loss.backward()
    expected = {our_name(n): g for n, g in case.under("grad/").items()}
    got = gradients(model)
    check_gradients(got, expected)
    assert got.keys() == expected.keys()
    states = model.state_dict()
    for name, after in case.under("after/").items():
        state = states[our_name(name)]
        after = after.view(state.shape).to(state.dtype)
        torch.testing.assert_close(state, after, atol=1e-6, rtol=0, msg=name)


def test_the_decoder_owns_its_self_attention_and_shares_the_rest(golden):
    case = golden("blip_pretrain")
    model = loaded(case)
    state = model.state_dict()
    for alias, stored in case.meta["aliases"].items():
        assert state[our_name(alias)].data_ptr() == state[our_name(stored)].data_ptr(), alias
    own = [n for n, _ in model.named_parameters() if n.startswith("decoder.")]
    assert own and all(".attention." in name for name in own)


def test_the_decoder_attends_to_no_later_token(golden):
    case = golden("blip_pretrain")
    model = loaded(case).eval()
    _, ids, mask = inputs(case)
    mask = torch.ones_like(mask)
    changed = ids.clone()
    changed[:, 6:] = 7
    with torch.no_grad():
        logits = model.predict(ids, mask, case["image_embeds"])
        other = model.predict(changed, mask, case["image_embeds"])
    torch.testing.assert_close(logits[:, :6], other[:, :6], atol=1e-6, rtol=0)
    assert not torch.allclose(logits[:, 6:], other[:, 6:], atol=1e-3)


@pytest.mark.slow
def test_checkpointing_leaves_the_gradients(golden):
    case = golden("blip_pretrain")
    got = []
    for enable in (False, True):
        model = loaded(case)
        model.set_grad_checkpointing(enable)
        model(*inputs(case), drawn=drawn(case)).loss.backward()
        got.append(gradients(model))
    check_gradients(got[1], got[0])


def test_it_draws_negatives_that_are_no_pairs(golden):
    model = loaded(golden("blip_pretrain"))
    similar = tuple(100 * torch.randn(4, 4) for _ in range(2))
    for _ in range(20):
        for negative in model.draw_negatives(similar):
            assert (negative != torch.arange(4)).all()


@pytest.mark.slow
def test_a_step_without_given_draws_trains(golden):
    case = golden("blip_pretrain")
    model = loaded(case)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(20):
        out = model(*inputs(case))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])


def test_text_of_one_token_has_no_language_loss(golden):
    case = golden("blip_pretrain")
    image, ids, mask = inputs(case)
    out = loaded(case)(image, ids[:, :1], mask[:, :1], drawn=drawn(case))
    assert out.loss_lm == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_width": 512}, "text_width: expected vision_width = 768"),
        ({"vocab_size": 30522}, "decoder_token_id: expected an integer below vocab_size = 30522"),
        ({"alpha": 1.5}, "alpha: expected a number in"),
        ({"label_smoothing": -0.1}, "label_smoothing: expected a number in"),
        ({"schedule": "3(100%)"}, "schedule: expected 12 layers"),
    ],
)
def test_a_bad_config_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        BLIPConfig(**options)


def test_shared_momentum_reduction_keeps_the_same_tokens(golden):
    case = golden("blip_pretrain")
    model = loaded(case, momentum_reduction="shared")
    seen = []
    for block in model.encoders_m.visual.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    out = model(case["image"], case["input_ids"].long(), case["attention_mask"])
    assert out.loss.isfinite()
    assert seen == [37, 34, 25, 25, 16, 16]  # each block once: nothing is scored
