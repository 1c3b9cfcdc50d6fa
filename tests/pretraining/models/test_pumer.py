"""PuMer in METER's fusion: official numbers, padding and CLS, training."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from elip_models.pretraining.models.layers.pumer import FusionTokens, PuMer
from elip_models.pretraining.models.meter.config import METERConfig
from tests.helpers.cross_modal_cases import batch_of_four, draws, made, step
from tests.helpers.golden_weights import matrix, ruled
from tests.helpers.towers import assert_equal_gradients

OFFICIAL = json.loads((Path(__file__).parents[2] / "golden/pumer.json").read_text())
PUMER = "pumer"


def layer(width=12):
    config = BertConfig(
        hidden_size=width,
        num_attention_heads=3,
        intermediate_size=2 * width,
        is_decoder=True,
        add_cross_attention=True,
    )
    config._attn_implementation = "sdpa"
    made_of_rule = BertLayer(config).eval().double()
    with torch.no_grad():
        for name, parameter in made_of_rule.named_parameters():
            parameter.copy_(ruled(name, parameter.shape))
    return made_of_rule


def fused(L=10, N=17, **masks):
    text, image = (torch.randn(2, n, 12, dtype=torch.float64) for n in (L, N))
    return FusionTokens(text, torch.ones(2, L), image)._replace(**masks)


@pytest.mark.parametrize("case", OFFICIAL, ids=lambda case: f"N{case['patches']}")
def test_the_official_numbers_are_reproduced(case):
    seed, L, N = case["seed"], case["tokens"], case["patches"]
    text = torch.stack([matrix(L, 12, f"text {seed} {b}") for b in range(2)])
    image = torch.stack([matrix(N, 12, f"image {seed} {b}") for b in range(2)])
    pumer = PuMer(layers=(0,), **{n: case[n] for n in ("prune", "merge", "merge_text")})
    left = pumer.run(layer(), FusionTokens(text, torch.ones(2, L), image))
    for name in ("text", "image"):
        expected = torch.tensor(case[name], dtype=torch.float64)
        torch.testing.assert_close(getattr(left, name), expected, atol=2e-6, rtol=0)


def test_padding_merges_first_and_is_in_no_token():
    text_mask, image_mask = torch.ones(2, 10), torch.ones(2, 17, dtype=torch.bool)
    text_mask[0, 6:], image_mask[1, 9:] = 0, False
    entered = fused(text_mask=text_mask, image_mask=image_mask)
    pumer, outputs = PuMer(layers=(0,)), []
    for padding in (3.0, -50.0):
        text = entered.text.masked_fill(text_mask[..., None] == 0, padding)
        image = entered.image.masked_fill(~image_mask[..., None], padding)
        outputs.append(pumer.run(layer(), entered._replace(text=text, image=image)))
    one, other = outputs
    assert torch.equal(one.text_mask, other.text_mask)
    assert torch.equal(one.image_mask, other.image_mask)
    assert torch.equal(one.text[one.text_mask], other.text[one.text_mask])
    assert torch.equal(one.image[one.image_mask], other.image[one.image_mask])
    assert one.text_mask.sum(1).tolist() == [6, 8]  # two of the four of padding left
    assert one.image_mask.sum(1).tolist() == [11, 8]  # three were pruned, every second one merged
    assert torch.equal(one.image[:, 0], entered.image[:, 0])  # CLS stays first


def test_an_image_of_another_dtype_keeps_its_dtype():
    """Check the dtypes of FSDP2 with mixed precision, which casts the text alone."""
    entered = fused()
    entered = entered._replace(text=entered.text.bfloat16(), image=entered.image.float())
    left = PuMer(layers=(0,)).run(layer().bfloat16(), entered)
    assert (left.text.dtype, left.image.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(left.image[:, 0], entered.image[:, 0])


def test_recomputed_layers_drop_the_same_tokens():
    batch = batch_of_four()
    drawn = draws("meter", *batch, "local")
    model = made("meter", dropout=0.1, cross_reduction=PUMER)
    recomputing = copy.deepcopy(model)
    recomputing.set_grad_checkpointing()
    steps = []
    for one in (model, recomputing):
        torch.manual_seed(2)
        steps.append(step(one, batch, drawn))
    assert torch.equal(steps[0][0], steps[1][0])
    assert_equal_gradients(steps[1][1], steps[0][1])


def test_mlm_keeps_all_text_tokens_and_itm_does_not():
    model = made("meter", cross_reduction=PUMER).eval()
    images, ids, mask = batch_of_four()
    text, image = model.encode_and_fuse(images, ids, mask)
    kept, pruned = model.encode_and_fuse(images, ids, mask, keeps_text=True)
    assert text.tokens.shape[1] < kept.tokens.shape[1] == ids.shape[1]
    assert text.mask.shape == text.tokens.shape[:2]
    assert image.shape[1] == pruned.shape[1] < model.encode_image(images)[0].shape[1]
    out = model(images, ids, mask)
    assert out.mlm_logits.shape[1] == ids.shape[1]


def test_fusion_costs_less():
    def flops(reduction):
        model = made("meter", cross_reduction=reduction)
        text, mask = torch.randn(2, 20, 16).double(), torch.ones(2, 20)
        image = torch.randn(2, 120, 16).double()
        with FlopCounterMode(display=False) as counter:
            model.fuse(text, mask, image).image.sum().backward()
        return counter.get_total_flops()

    assert flops(PUMER) < 0.75 * flops(None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pumer:layers=0,2", r"^cross_reduction: expected layers of the 2 of fusion, 0 to 1, got"),
        ("pumer:prune=1.0", r"^cross_reduction: prune: expected a number in \[0, 1\), got 1.0"),
    ],
)
def test_a_spec_sets_existing_layers_and_a_bad_one_is_named(line, message):
    with pytest.raises(ValueError, match=message):
        METERConfig(cross_depth=2, cross_reduction=line)
    assert METERConfig(cross_depth=2, cross_reduction="pumer").pumer == PuMer(layers=(0, 1))
    assert METERConfig(cross_reduction="pumer:layers=3").pumer == PuMer(layers=(3,))
