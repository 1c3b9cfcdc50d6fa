"""Weakly supervised grounding: maps against plain autograd, metrics against worked examples."""

import json
import pickle
import re
from copy import copy
from pathlib import Path

import pytest
import torch
from PIL import Image

from elip_kernels import unmerge
from elip_models.analysis.visualize import source_maps
from elip_models.intervals import score_interval
from elip_models.pretraining.data import open_examples, train_tokenizer
from elip_models.pretraining.data.samples import Target
from elip_models.pretraining.data.scene_sampling import Box
from elip_models.pretraining.models.albef.model import ALBEF
from elip_models.pretraining.tasks import grounding
from elip_models.pretraining.tasks.grounding import (
    Grounding,
    Heat,
    best_box,
    cross_attention,
    gradcam,
    ious,
    pointing,
    upsample,
)
from elip_models.pretraining.tasks.task import Loading
from elip_models.reduction.strategy import mask_after
from tests.helpers.cross_modal_cases import SIZES, batch_of_four, made
from tests.helpers.tiers import first_quick
from tests.helpers.tiny_run import elip

FAMILIES = ("albef", "blip", "meter")
WAYS = {
    "dense": {"schedule": None},
    "elip": {},
    "tome": {"strategy": "tome", "strategy_options": {"r": 3}, "schedule": None},
    "padded": {"strategy": "adaptive:keep_mass=0.4", "schedule": None},
}


def model_of(family, way="dense"):
    return made(family, without_text="vision", **WAYS[way]).eval()


def by_eager_attention(model, tokens, mask, ids, real):
    """Grad-CAM (B, N) of the image tokens by transformers' own explicit attention."""
    attention, maps = cross_attention(model), []
    attention.config = copy(attention.config)
    attention.config._attn_implementation = "eager"
    attention.register_forward_hook(lambda module, inputs, output: maps.append(output[1]))
    additive = torch.zeros(tokens.shape[:2], dtype=tokens.dtype)
    if mask is not None:  # the eager function adds its mask
        additive = additive.masked_fill(~mask, -torch.inf)
        attention.register_forward_pre_hook(
            lambda module, inputs, options: (
                inputs,
                options | {"attention_mask": additive[:, None, None]},
            ),
            with_kwargs=True,
        )
    scores = model.matching_logits(tokens, mask, ids, real)
    maps[0].retain_grad()
    scores.sum().backward()
    attended, gradient = maps[0].detach(), maps[0].grad
    heat = torch.zeros(tokens.shape[:2], dtype=tokens.dtype)
    for image, count in enumerate(real.sum(1).tolist()):
        weights = gradient[image].clamp(min=0) * attended[image]
        heat[image] = weights[:, :count].mean((0, 1))
    return heat


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", first_quick(FAMILIES))
def test_the_map_is_that_of_plain_autograd_on_all_patches(family, way):
    model, (images, ids, real) = model_of(family, way), batch_of_four()
    heat = gradcam(model, images, ids, real)
    with torch.no_grad():
        tokens, infos = model.encode_image(images)
    assert (tokens.shape[1] < 17) == (way != "dense")
    assert all(weight.grad is None for weight in model.parameters())
    expected = by_eager_attention(model, tokens, mask_after(infos), ids, real)
    if way == "dense":
        expected = expected[:, 1:]
    else:
        expected = unmerge(expected[..., None], source_maps(infos, 16)[-1])[..., 0]
    torch.testing.assert_close(heat.patches.flatten(1), expected)
    assert heat.patches.shape == (4, 4, 4) and heat.patches.max() > 0


@pytest.mark.filterwarnings("ignore::elip_models.reduction.user_warnings.UnguidedWarning")
def test_the_expression_guides_the_reduction_only_if_asked():
    images, ids, real = batch_of_four()
    model = made("albef").eval()  # dense without text
    assert gradcam(model, images, ids, real).num_tokens.tolist() == [17] * 4
    assert (gradcam(model, images, ids, real, guided=True).num_tokens < 17).all()


def test_a_layer_is_counted_among_those_with_cross_attention():
    model = made("albef", text_depth=8, text_layers=2)
    layers = model.encoders.text.layers
    assert cross_attention(model) is layers[4].crossattention.self  # 3 of 6, as block 8 of ALBEF
    assert cross_attention(model, 6) is layers[7].crossattention.self
    with pytest.raises(ValueError, match=r"layer: expected 1 to 6, .* of ALBEF .*, got 7"):
        cross_attention(model, 7)
    with pytest.raises(TypeError, match=r"model: expected ALBEF, BLIP or METER .*, got Linear"):
        cross_attention(torch.nn.Linear(1, 1))


PIXELS = torch.tensor([[0.0, 0, 0, 0], [0, 4, 2, 0], [0, 0, 1, 0], [0, 0, 0, 0]])


EXACT, WIDE, WHOLE = Box(1, 1, 1, 1), Box(1, 1, 2, 1), Box(0, 0, 4, 4)
PARTLY = Box(-6, 1, 8, 2)  # 4 / sqrt(16), where [0, 2) of rows 1 and 2 are inside


@pytest.mark.parametrize(
    ("boxes", "best"),
    [
        ([WHOLE, WIDE, EXACT], WIDE),  # 7 / 4, 6 / sqrt(2), 4
        ([Box(2.9, 1.9, 1.2, 1.2), WHOLE], Box(2.9, 1.9, 1.2, 1.2)),
        ([PARTLY, Box(2, 2, 1, 1.1)], PARTLY),
        ([Box(9, 9, 2, 2)], None),
        ([Box(0, 3, 4, 1)], None),  # nothing above 0
    ],
)
def test_the_best_box_has_the_largest_sum_over_the_root_of_its_area(boxes, best):
    assert best_box(PIXELS, boxes) == best


def test_iou_of_boxes():
    boxes = Box(2, 0, 4, 2), Box(0, 0, 4, 2), Box(4, 3, 1, 1)
    assert ious(boxes, Box(0, 0, 4, 2)) == pytest.approx([4 / 12, 1, 0])


@pytest.mark.parametrize(
    ("size", "resize", "box", "score"),
    [
        ((8, 8), "squash", Box(2, 2, 2, 2), 1.0),  # the centre of patch (1, 1) is (3, 3)
        ((8, 8), "squash", Box(3.1, 3, 4, 4), 0.0),
        ((16, 8), "squash", Box(6, 3, 1, 1), 1.0),
        ((16, 8), "crop", Box(7, 3, 1, 1), 1.0),  # the model reads 4 to 12
        ((8, 16), "crop", Box(3, 7, 1, 1), 1.0),
    ],
)
def test_pointing_at_the_centre_of_the_best_patch(size, resize, box, score):
    assert pointing(PIXELS, Target(box, None, "", size), resize)[0] == score
    assert pointing(torch.zeros(4, 4), Target(box, None, "", size), resize)[0] == 0
    half = torch.eye(4)  # of four patches that tie, two have their centre in the upper half
    assert pointing(half, Target(Box(0, 0, 8, 4), None, "", (8, 8)), "squash")[0] == 0.5


def test_the_heat_is_upsampled_to_the_part_of_the_image_that_the_model_reads():
    heat = torch.rand(4, 4)
    assert torch.equal(upsample(heat, (4, 4), "squash"), heat)
    assert upsample(heat, (9, 5), "squash").shape == (5, 9)
    wide = upsample(heat, (7, 4), "crop")
    assert wide.shape == (4, 7) and torch.equal(wide[:, 1:5], heat)
    assert (wide[:, [0, 5, 6]] == 0).all()
    assert torch.equal(upsample(heat, (4, 6), "crop")[1:5], heat)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the dog on the left", "two foxes"] * 9, 300)


@pytest.fixture
def albef(tokenizer):
    sizes = SIZES | ALBEF.fit_tokenizer(tokenizer, 8)
    model = ALBEF(ALBEF.config_class(**sizes, text_layers=1, embed_dim=8, queue_size=6))
    return model.eval()


def write_list(folder, *entries, images=2):
    for number in range(images):
        Image.new("RGB", (8, 8), (40 * number, 90, 0)).save(folder / f"{number}.png")
    (folder / "list.json").write_text(json.dumps(entries))
    return str(folder / "list.json")


def entry(image=0, **options):
    return {"image": f"{image}.png", "text": "the dog", "box": [2, 2, 2, 2]} | options


LEFT, RIGHT = [1, 1, 4, 4], [5, 5, 3, 3]
"""Proposals on the only patch with heat and elsewhere; LEFT has an IoU of 1/4 with the box."""


def peaked(model, images, input_ids, attention_mask, **options):
    heat = torch.zeros(len(images), 4, 4)
    heat[:, 1, 1] = 1.0
    return Heat(heat, torch.full((len(images),), 17))


def test_scores_of_splits_with_intervals_over_images(albef, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(grounding, "gradcam", peaked)
    right, wrong, none = ({"proposals": boxes} for boxes in ([[2, 2, 2, 2], RIGHT], [LEFT], []))
    entries = [
        *(entry(0, split="val", **right), entry(0, split="val", **right)),
        entry(1, split="val", box=[5, 5, 2, 2], **right),  # the right proposal is not chosen
        *(entry(1, split="testA", **wrong), entry(0, split="testA", **none)),
    ]
    source = open_examples("grounding", write_list(tmp_path, *entries), image_size=16)
    scores = Grounding().evaluate(albef, tokenizer, source, Loading(batch_size=2))
    intervals = scores.scores
    assert intervals["val_accuracy"] == score_interval([1, 1, 0], [0, 0, 1])
    assert intervals["val_pointing"] == score_interval([1, 1, 0], [0, 0, 1])
    assert intervals["testA_accuracy"].mean == 0 and intervals["testA_pointing"].mean == 1
    chance, without = scores.baselines.values()
    assert chance == pytest.approx(
        {"val_accuracy": 1 / 3, "testA_accuracy": 0}
        | {"val_pointing": 1 / 16, "testA_pointing": 1 / 16}
    )
    assert without["val_accuracy"] == 0 and without["val_pointing"] == 0
    assert [prediction.score for prediction in scores.predictions] == [1, 1, 0, 0, 0]
    assert [prediction.output for prediction in scores.predictions[2:]] == [
        "[2.0, 2.0, 2.0, 2.0]",
        "[1.0, 1.0, 4.0, 4.0]",
        "",
    ]
    assert scores.notes["layer"] == "1 of 1 with cross attention"


def test_the_list_of_refcoco_is_made_as_the_document_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refcoco+").mkdir()
    write_list(tmp_path)
    reference = {"ref_id": 5, "ann_id": 7, "image_id": 3, "split": "testA", "sentences": []}
    (tmp_path / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps([reference], protocol=2))
    expression = {"image": "1.png", "text": "red dog", "ref_id": 5}
    for name, content in {
        "refcoco+/instances.json": {"annotations": [{"id": 7, "bbox": [1, 2, 3, 4.5]}]},
        "refcoco+/dets.json": {"3": [[1, 2, 3, 4, 0.9], [0, 0, 8, 8, 0.5]]},
        "refcoco+_val.json": [],
        "refcoco+_test.json": [expression],
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    (block,) = (block for block in blocks if "refs" in block)
    exec(block, {})
    source = open_examples("grounding", "refcoco.json,split=testA", image_size=16)
    proposals = Box(1, 2, 3, 4), Box(0, 0, 8, 8)
    assert source.target(0) == Target(Box(1, 2, 3, 4.5), proposals, "testA", (8, 8))
    assert source[0].text == "red dog"
    (tmp_path / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps(Path("a")))
    with pytest.raises(pickle.UnpicklingError, match="expected lists, dicts, texts and numbers"):
        exec(block, {})


def test_the_command_scores_a_saved_model(albef, tokenizer, tmp_path, capsys):
    albef.save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    command = ["eval", "grounding", "--model", tmp_path / "model"]
    data, output = "emoji_grounding:seed=1,size=6", tmp_path / "scores.json"
    assert elip(*command, "--data", data, "--guided", "--output", output) == 0
    written = json.loads(output.read_text())
    assert written["scores"].keys() == {"accuracy", "pointing"} and written["num_examples"] == 6
    assert written["notes"]["guidance"] == "the expression"
    capsys.readouterr()
    assert elip(*command, "--data", data, "--layer", 9) == 2
    assert "--layer: expected 1 to 1" in capsys.readouterr().err
