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
