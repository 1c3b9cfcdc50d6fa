"""METER's tower and pre-training step against the official ones, and their other properties."""

import pytest
import torch

from elip_models.pretraining.models.meter.config import METERConfig
from elip_models.pretraining.models.meter.model import METER, METERDraw
from elip_models.strategies.elip import ELIP
from elip_models.strategies.schedule import Stage
from tests.helpers.official import check_gradients, check_stages, load_official_, timm_name
from tests.helpers.towers import our_names

our_name = our_names("meter")
TINY = {
    "image_size": 32,
    "patch_size": 8,
    **{f"{part}_width": 32 for part in ("vision", "text", "cross")},
    **{f"{part}_heads": 4 for part in ("vision", "text", "cross")},
    **{f"{part}_depth": 2 for part in ("text", "cross")},
    "text_hidden": 64,
    "cross_hidden": 64,
    "dropout": 0.0,
    "vocab_size": 96,
    "max_positions": 16,
    "context_length": 10,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "mask_token_id": 3,
}


class Recorded(ELIP):
    """Stages of the recorded step, whose second stage scores by a layer of the third."""

    def stages(self, size):
        """Return three stages of 16 patches."""
        return Stage(1, 1, 32), Stage(2, 2, 25), Stage(3, 2, 16)


def loaded(case, **options):
    meta = case.meta["config"]
    bert, vit, cross = meta["text_bert"], meta["vit"], meta["cross"]
    config = METERConfig(
        image_size=meta["image"],
        patch_size=meta["patch"],
        vision_width=vit["width"],
        vision_depth=vit["blocks"],
        vision_heads=vit["heads"],
        vision_mlp_ratio=vit["mlp_ratio"],
        text_width=bert["hidden_size"],
        text_depth=bert["num_hidden_layers"],
        text_heads=bert["num_attention_heads"],
        text_hidden=bert["intermediate_size"],
        cross_width=cross["hidden"],
        cross_depth=cross["num_top_layer"],
        cross_heads=cross["heads"],
        cross_hidden=cross["intermediate"],
        dropout=0.0,
        vocab_size=bert["vocab_size"],
        max_positions=bert["max_position_embeddings"],
        context_length=10,
        **{f"{name}_token_id": meta["special_ids"][name] for name in ("pad", "cls", "sep", "mask")},
        schedule="1(100%) 1(90%) 1(70%) 2(45%)",
        **options,
    )
    model = METER(config)
    model.reduction = Recorded(config.schedule, scorer=config.scorer)
    missing = load_official_(model, case, our_name)
    assert set(missing) <= {"language_head.predictions.decoder.bias"}, missing
    return model


def drawn(case):
    ids = (case[name].long() for name in ("mlm_input_ids", "mlm_labels", "itm_labels"))
    return METERDraw(*ids, case["false_image"])


def batch(case):
    return case["image"], case["input_ids"].long(), case["attention_mask"]


@pytest.mark.parametrize("scorer", ["official", "exact"])
def test_the_official_step_is_reproduced(golden, scorer):
    case = golden("meter_mlm_itm")
    model = loaded(case, scorer=scorer)
    out = model(*batch(case), drawn=drawn(case))
    for name in ("loss_mlm", "loss_itm"):
        torch.testing.assert_close(getattr(out, name), case[name], atol=2e-6, rtol=0)
    for name in ("mlm_logits", "itm_logits"):
        torch.testing.assert_close(getattr(out, name), case[name], atol=1e-5, rtol=0)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == dict(model.named_parameters()).keys()
    expected = {our_name(n): g for n, g in case.under("grad/").items()}
    largest = max(grad.abs().max() for grad in expected.values())
    for name in [n for n in expected if n.endswith("self.key.bias")]:
        # softmax cancels what all keys share: zero in theory, rounding alone in either
        for grad in (expected.pop(name), grads.pop(name)):
            assert grad.abs().max() <= torch.finfo(grad.dtype).eps * largest, name
    check_gradients(grads, expected)


@pytest.mark.parametrize("scorer", ["official", "exact"])
@pytest.mark.parametrize("task", ["mlm", "itm"])
def test_each_pass_keeps_and_fuses_as_the_official_one(golden, task, scorer):
    case = golden("meter_mlm_itm")
    model = loaded(case, scorer=scorer)
    images, input_ids, mask = batch(case)
    if task == "mlm":
        input_ids = case["mlm_input_ids"].long()
    else:
        is_pair = (case["itm_labels"] == 1)[:, None, None, None]
        images = torch.where(is_pair, images, case["false_image"])
    text = model.encode_text(input_ids, mask)
    image, infos = model.encode_image(images, text[:, 0])
    fused_text, fused_image = model.fuse(text, mask, image)
    case = case.under(f"{task}/")
    assert len(infos) == 3
    for s, info in enumerate(infos):
        assert torch.equal(info.reduction.kept, case[f"stage{s}/keep_idx"][:, 1:].long())
        torch.testing.assert_close(
            info.attention[:, 1:], case[f"stage{s}/cls_attn"], atol=1e-6, rtol=0
        )
    pooled = {"cls_text": model.text_pooler(fused_text)}
    pooled |= {"cls_image": model.image_pooler(fused_image)}
    states = {"image_embeds": image, "text_feats": fused_text, "image_feats": fused_image}
    for name, got in (states | pooled).items():
        torch.testing.assert_close(got, case[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("scorer", ["official", "exact"])
def test_the_official_tower_is_reproduced(golden, scorer):
    case = golden("elip_meter")
    meta = case.meta["config"]
    sizes = {"image_size": meta["image"], "patch_size": meta["patch"]}
    sizes |= {"vision_width": meta["embed_dim"], "text_width": meta["embed_dim"]}
    sizes |= {"vision_heads": meta["heads"], "vision_depth": meta["depth"]}
    model = METER(METERConfig(**TINY | sizes, schedule="meter", scorer=scorer))
    assert not load_official_(model.visual, case, timm_name)
    image = case["image"].requires_grad_()
    tokens, infos = model.encode_image(image, case["text_cls"])
    assert [info.reduction.kept.shape[1] for info in infos] == [57, 44, 28]
    check_stages(case, infos)
    torch.testing.assert_close(tokens, case["out"], atol=1e-5, rtol=0)
    (tokens * case["upstream/out"]).sum().backward()
    grads = {n: p.grad for n, p in model.visual.named_parameters()}
    theirs = {n: grads[timm_name(n)] for n in case.under("sd/")}
    check_gradients(theirs | {"image": image.grad}, case.under("grad/"))


@pytest.mark.parametrize("B", [1, 2, 5])
def test_half_of_the_texts_keep_their_image_and_the_others_get_another(B):
    model = METER(METERConfig(**TINY))
    images = torch.arange(B).float()[:, None, None, None].expand(B, 3, 32, 32)
    ids = torch.tensor([1, *range(4, 11), 2, 0]).repeat(B, 1)
    for _ in range(20):
        sample = model.draw(images, ids)
        assert sample.itm_labels.sum() == max(1, B // 2)
        is_other = sample.itm_labels == 0
        assert (sample.false_images != images).flatten(1).all(1)[is_other].all()
        assert (sample.labels[:, [0, -2, -1]] == -100).all()
        assert torch.equal(sample.masked_ids[sample.labels == -100], ids[sample.labels == -100])
