"""VisionZip in whole models: the attention of the image tower selects tokens."""

import copy

import pytest
import torch

from elip_models import is_reduced, record_stages, reduce_, unreduce_
from elip_models.vlm.attention_probe import is_watched
from elip_models.vlm.families import PATCH_TOKENS, find_multimodal
from elip_models.vlm.tower_attention import attention_of
from tests.helpers.tiers import slow_except
from tests.vlm import oracle
from tests.vlm.configs import IMAGE
from tests.vlm.models import build

SINGLE = ((4, "image", 3), (2, "image", 1, "image", 6))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_patches_that_the_class_token_attends_to_most_stay(attention):
    model, inputs = build("llava", attention, rows=SINGLE)
    model.set_attn_implementation("eager")
    layer = model.config.vision_feature_layer
    tower = find_multimodal(model).tower
    maps = tower(inputs["pixel_values"], output_attentions=True).attentions[layer]
    row = maps.mean(1)[:, 0, 1:]
    reduce_(model, "visionzip:contextual=0", keep=0.5)
    with record_stages(model) as infos:
        model(**inputs)
    images, kept = infos[0].images, infos[0].kept
    n, image = row.shape[1], 0
    for b in range(len(images)):
        edges = torch.nn.functional.pad(images[b].int(), (1, 1)).diff()
        for start in (edges == 1).nonzero()[:, 0].tolist():
            best = row[image].argsort(descending=True)[: n // 2].tolist()
            best = best if n - 1 in best else [*best[:-1], n - 1]
            assert kept[b, start : start + n].nonzero()[:, 0].tolist() == sorted(best)
            image += 1
    assert image == len(row)


@torch.no_grad()
def test_generate_reads_the_tower_too_and_unreduce_restores_it():
    model, inputs = build("llava", rows=SINGLE)
    stock = oracle.stock_generate(model, inputs)
    reduce_(model, "visionzip", keep=0.5)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)  # as generate counts them
    logits = model(**inputs, position_ids=positions).logits[:, -1].float()
    found = oracle.stock_generate(model, inputs)
    assert oracle.close(found.logits[0], logits)
    assert not oracle.close(found.logits[0], stock.logits[0])
    assert oracle.close(oracle.stock_generate(copy.deepcopy(model), inputs).logits[0], logits)
    beams = oracle.stock_generate(model, inputs, num_beams=2)
    assert beams.sequences.shape[0] == 2
    unreduce_(model)
    assert not is_reduced(model) and not is_watched(attention_of(find_multimodal(model)))
    assert all(map(torch.equal, oracle.stock_generate(model, inputs).logits, stock.logits))


@torch.no_grad()
@pytest.mark.parametrize("name", slow_except([], sorted(PATCH_TOKENS - {"llava"})))
def test_the_patches_of_other_families_are_their_image_tokens(name):
    model, inputs = build(name)
    reduce_(model, "visionzip:contextual=0", keep=0.5)
    oracle.assert_as_without_removed(model, inputs)


@torch.no_grad()
def test_images_that_are_no_run_of_patches_are_refused():
    model, inputs = build("llava", rows=((4, "image", "image", 3), (2, "image", 1)))
    reduce_(model, "visionzip", keep=0.5)
    with pytest.raises(ValueError, match="with text between them, for 'visionzip'"):
        model(**inputs)
    reduce_(model, "diverse", keep=0.5)  # takes the two images as one run
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    assert (inputs["input_ids"] == IMAGE).any()
