"""ALBEF's pre-training step against the official one, and its other properties."""

import pytest
import torch

from elip_models.pretraining.models.albef.model import ALBEF, ALBEFConfig, ALBEFDraw
from elip_models.pretraining.models.layers.momentum import FeatureQueue, similarities
from tests.helpers.official import check_gradients, load_official_, pretraining_fields
from tests.helpers.towers import assert_equal_gradients, our_names

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
        sample = model._draw(similar, ids)
        for negative in sample[:2]:
            assert (negative != torch.arange(4)).all()
        never = (ids == 0) | (ids == 1)
        assert (sample.labels[never] == -100).all()
        assert torch.equal(sample.masked_ids[sample.labels == -100], ids[sample.labels == -100])


@pytest.mark.slow
def test_a_step_without_given_draws_trains(golden):
    case = golden("albef_pretrain")
    model = loaded(case)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(30):
        out = model(case["image"], case["input_ids"].long(), case["attention_mask"])
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])


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


def test_similarities_are_exact_under_autocast():
    queue, batch = FeatureQueue(32, 64), torch.randn(2, 8, 32)
    pair = tuple(torch.nn.functional.normalize(batch, dim=-1))
    inputs = pair, queue.contrastive_keys(*pair), torch.tensor(0.07)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = similarities(*inputs)
    torch.testing.assert_close(under_autocast, similarities(*inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_width": 512}, "text_width: expected vision_width = 768"),
        ({"text_layers": 12}, "text_layers: expected an integer below text_depth = 12, got 12"),
        ({"alpha": 1.5}, "alpha: expected a number in"),
        ({"momentum_reduction": "same"}, "momentum_reduction: expected one of 'none', 'shared'"),
        ({"schedule": "3(100%)"}, "schedule: expected 12 layers"),
    ],
)
def test_a_bad_config_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ALBEFConfig(**options)


def gradients(model, case, **context):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, **context):
        out = model(
            case["image"], case["input_ids"].long(), case["attention_mask"], drawn=drawn(case)
        )
    out.loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_does_not_change_gradients(golden):
    case = golden("albef_pretrain")
    plain, checkpointed = loaded(case), loaded(case)
    checkpointed.set_grad_checkpointing()
    expected = gradients(plain, case, enabled=False)
    assert_equal_gradients(gradients(checkpointed, case, enabled=False), expected)


def test_bf16_trains_every_weight(golden):
    case = golden("albef_pretrain")
    grads = gradients(loaded(case), case, enabled=True)
    assert set(grads) == {our_name(n) for n in case.under("grad/")} - {"image"}
    assert all(grad.isfinite().all() for grad in grads.values())


def test_momentum_encoders_are_updated_in_training_only(golden):
    case = golden("albef_pretrain")
    model = loaded(case)
    inputs = case["image"], case["input_ids"].long(), case["attention_mask"]
    before = {n: p.clone() for n, p in model.encoders_m.named_parameters()}
    queue = model.queue.image.clone()
    model.eval()(*inputs, drawn=drawn(case))
    assert torch.equal(model.queue.image, queue)
    assert all(torch.equal(p, before[n]) for n, p in model.encoders_m.named_parameters())
    model.train()(*inputs, drawn=drawn(case))
    online = dict(model.encoders.named_parameters())
    for name, p in model.encoders_m.named_parameters():
        torch.testing.assert_close(p, 0.995 * before[name] + 0.005 * online[name])


def test_shared_momentum_reduction_keeps_what_the_online_tower_kept(golden):
    """Check equal tokens of both towers if their weights are equal."""
    case = golden("albef_pretrain")
    model = loaded(case, momentum_reduction="shared").eval()
    model.encoders_m.load_state_dict(model.encoders.state_dict())
    inputs = case["image"], case["input_ids"].long(), case["attention_mask"]
    text = model.encode_text(*inputs[1:])
    tokens, _ = model.encode_image(inputs[0], text[:, 0])
    scored = []
    for block in model.encoders_m.visual.blocks:
        block.register_forward_hook(lambda m, args, out: scored.append(out.shape[1]))
    (found, _), (shared, _) = model._encode_images(inputs[0], text[:, 0])
    assert torch.equal(shared, tokens) and torch.equal(found, tokens)
    assert scored == [37, 34, 25, 25, 16, 16]  # each block once: nothing is scored
    loss = model.train()(*inputs, drawn=drawn(case)).loss
    assert loss.isfinite()
    assert not torch.equal(loss, loaded(case)(*inputs, drawn=drawn(case)).loss)
