"""ALBEF's pre-training step against the official one, and its other properties."""

import pytest
import torch

from elip_models.pretraining.models.albef.model import ALBEF, ALBEFConfig, ALBEFDraw
from elip_models.pretraining.models.layers.momentum import FeatureQueue
from tests.helpers.official import check_gradients, load_official_, pretraining_fields
from tests.helpers.towers import our_names

our_name = our_names("albef")


def loaded(case, **options):
    meta = case.meta["config"]
    fields = pretraining_fields(meta) | {"text_layers": meta["fusion_layer"], "mask_token_id": 3}
    model = ALBEF(ALBEFConfig(**fields, **options))
    missing = load_official_(model, case, our_name)
    tied = ("predictions.decoder.weight", "predictions.decoder.bias", "position_ids")
    assert all(name.endswith(tied) or "token_type_ids" in name for name in missing), missing
    return model


def drawn(case):
    names = ("neg_image_idx", "neg_text_idx", "mlm_input_ids", "mlm_labels")
    return ALBEFDraw(*(case[name].long() for name in names))


@pytest.mark.parametrize("scorer", ["official", "exact"])
def test_the_official_step_is_reproduced(golden, scorer):
    case = golden("albef_pretrain")
    model = loaded(case, scorer=scorer)
    out = model(case["image"], case["input_ids"].long(), case["attention_mask"], drawn=drawn(case))
    for name, loss in (("ita", out.loss_itc), ("itm", out.loss_itm), ("mlm", out.loss_mlm)):
        torch.testing.assert_close(loss, case[f"loss_{name}"], atol=2e-6, rtol=0, msg=name)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = {our_name(n): g for n, g in case.under("grad/").items()}
    check_gradients(grads, expected)
    assert not any("_m." in name for name in grads)
    for name in ("image_queue", "text_queue", "queue_ptr"):
        got = model.state_dict()[our_name(name)]
        torch.testing.assert_close(
            got, case[f"after/{name}"].view(got.shape).to(got.dtype), atol=1e-6, rtol=0
        )


def test_it_draws_negatives_that_are_no_pairs_and_masks_neither_cls_nor_padding(golden):
    case = golden("albef_pretrain")
    model, ids = loaded(case), case["input_ids"].long()
    similar = tuple(torch.randn(4, 4) for _ in range(2))
    for _ in range(20):
        sample = model.draw(similar, ids)
        for negative in sample[:2]:
            assert (negative != torch.arange(4)).all()
        never = (ids == 0) | (ids == 1)
        assert (sample.labels[never] == -100).all()
        assert torch.equal(sample.masked_ids[sample.labels == -100], ids[sample.labels == -100])


def test_the_queue_wraps_around():
    queue = FeatureQueue(3, 5)
    before, batch = queue.image.clone(), torch.randn(4, 3)
    queue.enqueue_(batch, batch)
    queue.enqueue_(2 * batch, batch)
    assert queue.pointer.item() == 3
    expected = torch.stack([2 * batch[1], 2 * batch[2], 2 * batch[3], batch[3], 2 * batch[0]], 1)
    assert torch.equal(queue.image, expected)
    assert not torch.equal(before, queue.image)
    with pytest.raises(ValueError, match="queue_size: expected at least the batch, 6, got 5"):
        queue.enqueue_(torch.randn(6, 3), torch.randn(6, 3))
