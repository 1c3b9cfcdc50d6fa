"""Segmentation has the mIoU that a plain computation with the model's own library gives."""

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

import elip_models
from elip_models.calibration.segmentation import (
    Segmentation,
    SegmentationProbe,
    mean_iou,
    patch_classes,
    whole_image_transform,
)
from elip_models.calibration.task import Part
from tests.calibration.cases import IGNORED, masks_of, scenes
from tests.helpers.models import HF, dinov2, enlarged, open_clip_pair, open_clip_vit
from tests.helpers.towers import images, plain_vit

N, CLASSES = 10, 3
HEADS = HF | {"num_labels": 5, "use_auxiliary_head": False}


def beit():
    sizes = {"out_indices": [1, 2, 4, 6], "pool_scales": [1, 2]}
    config = transformers.BeitConfig(**HEADS, **sizes)
    return transformers.BeitForSemanticSegmentation(config)


def dpt():
    sizes = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    config = transformers.DPTConfig(**HEADS, **sizes, backbone_out_indices=[0, 1, 3, 5])
    return transformers.DPTForSemanticSegmentation(config)


def upernet():
    backbone = transformers.Dinov2Config(**HF, out_indices=[1, 2, 4, 6], reshape_hidden_states=True)
    sizes = {"hidden_size": 16, "pool_scales": [1, 2]}
    options = {"num_labels": 5, "use_auxiliary_head": False}
    config = transformers.UperNetConfig(backbone_config=backbone, **sizes, **options)
    return transformers.UperNetForSemanticSegmentation(config)


def iou(right, union):
    return (right[union > 0] / union[union > 0]).mean().item()


def plain_miou(predicted, masks, classes):
    """Return the mIoU of predictions of the sizes of the masks."""
    right, union = torch.zeros(classes), torch.zeros(classes)
    for guess, mask in zip(predicted, masks, strict=True):
        for c in range(classes):
            here, there = (guess == c) & (mask != IGNORED), mask == c
            right[c] += (here & there).sum()
            union[c] += (here | there).sum()
    return iou(right, union)


def score(task, part, outputs, name="mIoU"):
    measure = task.measured(Part(part, outputs, {}))[name]
    assert len(measure.rows) == len(part)
    return measure.statistic(measure.rows.sum(0)[None])[0]


@pytest.mark.parametrize("make", [beit, dpt, upernet])
def test_the_own_head_has_the_miou_of_its_library(make):
    torch.manual_seed(0)
    model, pixels = enlarged(make()).eval(), images(N)
    masks = masks_of([(40, 50), (48, 48)] * 5)
    task, part = Segmentation(pixels, masks, batch_size=4), (0, 3, 4, 5, 8)
    elip_models.reduce_(model, "merge", keep=1.0)
    outputs = task.outputs(model, part, lambda count: None)
    elip_models.unreduce_(model)
    with torch.no_grad():
        logits = model(pixel_values=pixels[list(part)]).logits
    guesses = [
        F.interpolate(one[None], mask.shape, mode="bilinear")[0].argmax(0)
        for one, mask in zip(logits, [masks[i] for i in part], strict=True)
    ]
    wanted = plain_miou(guesses, [masks[i] for i in part], 5)
    assert score(task, part, outputs) == pytest.approx(wanted, abs=1e-6)
    right = sum(
        ((g == masks[i]) & (masks[i] != IGNORED)).sum() for g, i in zip(guesses, part, strict=True)
    )
    labelled = sum((masks[i] != IGNORED).sum() for i in part)
    assert score(task, part, outputs, "pixel accuracy") == pytest.approx((right / labelled).item())
    task.steps(model, part)[""]()


def test_a_function_of_the_user_gives_the_logits():
    masks = masks_of([(48, 48)] * N)
    task = Segmentation(scenes(masks), masks, logits=lambda model, x: brightness(x[:, :1]))
    outputs = task.outputs(nn.Linear(1, 1), range(N), lambda count: None)
    assert score(task, range(N), outputs) == 1
    assert task.answers(range(2), {k: v[:2] for k, v in outputs.items()}) == ["mIoU 1.00"] * 2
    task = Segmentation(scenes(masks), masks, logits=lambda model, x: x[0])
    with pytest.raises(TypeError, match=r"returns logits \(8, C, h, w\), got \(3, 48, 48\)"):
        task.outputs(nn.Linear(1, 1), range(N), lambda count: None)


def brightness(channel):
    """Return the logits of the nearest class."""
    return -(channel - torch.arange(CLASSES)[None, :, None, None] + 1).abs()


@pytest.mark.parametrize("make", [plain_vit, open_clip_vit, dinov2, open_clip_pair])
def test_the_probe_reads_the_restored_features_of_patches(make):
    torch.manual_seed(0)
    model, masks = enlarged(make()).eval(), masks_of([(48, 48)] * N)
    task = SegmentationProbe(scenes(masks), masks, model=model, batch_size=4)
    task.fit(model, range(6))
    dense = task.outputs(model, range(6, N), lambda count: None)
    wanted = plain_probe_miou(task, model, masks, range(6), range(6, N))
    assert score(task, range(6, N), dense) == pytest.approx(wanted, abs=0.002) and wanted > 0.5
    elip_models.reduce_(model, "merge", keep=1.0)
    assert_equal(task.outputs(model, range(6, N), lambda count: None), dense)
    elip_models.reduce_(model, "merge", keep=0.6)
    assert task.forward(model, images(2)).shape == (2, 36, 32)
    reduced = task.outputs(model, range(6, N), lambda count: None)
    assert not torch.equal(reduced["predicted"], dense["predicted"])


@torch.no_grad()
def plain_probe_miou(task, model, masks, fitted_on, part):
    """Return the mIoU of a linear probe of the library's own features."""
    visual = model.visual if hasattr(model, "visual") else model
    if isinstance(visual, transformers.PreTrainedModel):
        features = visual(task.images).last_hidden_state[:, 1:].double()
    elif hasattr(visual, "transformer"):
        tokens = visual.ln_post(visual.transformer(visual._embeds(task.images)))
        features = tokens[:, 1:].double()
    else:
        features = visual.forward_features(task.images)[:, 1:].double()
    classes = torch.stack([patch_classes(mask, (6, 6), CLASSES).flatten() for mask in masks])
    fitted = features[list(fitted_on)].flatten(0, 1), classes[list(fitted_on)].flatten()
    probe = LogisticRegression(C=0.01, max_iter=1000, tol=1e-8)
    mean, deviation = fitted[0].mean(0), fitted[0].std(0)
    probe.fit(((fitted[0] - mean) / deviation).numpy(), fitted[1].numpy())
    guesses = []
    for i in part:
        logits = probe.decision_function(((features[i] - mean) / deviation).numpy())
        grid = torch.from_numpy(logits).T.reshape(1, CLASSES, 6, 6)
        guesses.append(F.interpolate(grid, masks[i].shape, mode="bilinear")[0].argmax(0))
    return plain_miou(guesses, [masks[i] for i in part], CLASSES)


def assert_equal(outputs, others):
    for name, value in outputs.items():
        assert torch.equal(value, others[name])


def test_the_probe_never_reads_the_masks_of_the_images_that_it_measures():
    torch.manual_seed(0)
    model, masks = plain_vit().eval(), masks_of([(48, 48)] * N)
    pixels = scenes(masks)

    def outputs(masks, image):
        task = SegmentationProbe(pixels, masks, model=model)
        task.fit(model, range(8))
        return task.outputs(model, [image], lambda count: None)["predicted"]

    for image in (0, 9):
        others = [mask.clone() for mask in masks]
        others[image] = torch.where(others[image] == IGNORED, IGNORED, 2 - others[image])
        assert torch.equal(outputs(masks, image), outputs(others, image))
    assert not torch.equal(outputs(masks, 9), outputs([*others[:1], *reversed(masks[:9])], 9))


def test_a_patch_has_the_class_of_most_of_its_pixels():
    mask = torch.full((4, 6), IGNORED)
    mask[:2, :3] = torch.tensor([[1, 1, 0], [2, 1, 2]])
    mask[2:, 3:] = torch.tensor([[2, 2, 2], [2, 0, 0]])
    assert patch_classes(mask, (2, 2), 3).tolist() == [[1, -1], [-1, 2]]


def test_classes_without_a_union_are_left_out():
    totals = torch.tensor([[3.0, 0, 0, 6, 0, 4], [0, 0, 0, 2, 2, 0]]).double().numpy()
    assert mean_iou(totals).tolist() == [0.25, 0]


def test_images_are_resized_as_a_whole():
    model = timm.create_model("test_vit").eval()
    image = Image.new("RGB", (300, 160), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 150, 160))
    pixels = whole_image_transform(model)(image)
    side = pixels.shape[-1]
    assert pixels.shape == (3, side, side) and side == model.patch_embed.img_size[0]
    assert (pixels[0, :, : side // 2 - 4] == pixels.min()).all()
    own = whole_image_transform(model, lambda image: torch.zeros(3, 64, 80))
    assert own(image).shape == (3, 64, 80)


def test_strategies_without_a_grid_are_refused():
    masks = masks_of([(48, 48)] * N)
    model = plain_vit()
    task = SegmentationProbe(scenes(masks), masks, model=model)
    candidates = task.candidates(model)
    assert candidates.falling("merge") and candidates.control(0.5) is None
    with pytest.raises(TypeError, match="keeps the grid of patches"):
        candidates.falling("resize")
    with pytest.raises(ValueError, match="class_token_only"):
        task.candidates(model, class_token_only=True)


def test_what_cannot_be_measured_is_refused_by_name():
    masks, pixels = masks_of([(48, 48)] * N), images(N)
    with pytest.raises(ValueError, match="masks: expected 10, one an image, got 9"):
        Segmentation(pixels, masks[1:])
    empty = [*masks[:3], torch.full((48, 48), IGNORED), *masks[4:]]
    with pytest.raises(ValueError, match=r"no pixel with a class in masks\[3\]"):
        Segmentation(pixels, empty)
    with pytest.raises(TypeError, match=r"int64 tensors \(h, w\)"):
        Segmentation(pixels, torch.zeros(N, 48, 48))
    unknown = Segmentation(pixels, [mask.where(mask == IGNORED, mask + 2) for mask in masks])
    with pytest.raises(ValueError, match=r"classes below 3, those of the model's head, .* got 4"):
        unknown.kept(torch.zeros(1, 3, 6, 6), [0])
    with pytest.raises(
        TypeError, match=r"of transformers that returns logits .* got a Dinov2Model"
    ):
        Segmentation(pixels, masks).outputs(dinov2(), range(N), lambda count: None)
    with pytest.raises(TypeError, match=r"of transformers that returns logits .* got a VisionTran"):
        Segmentation(pixels, masks).outputs(plain_vit(), range(N), lambda count: None)
    with pytest.raises(TypeError, match="reduced, got SegformerForSemanticSegmentation"):
        model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig())
        Segmentation(pixels, masks).candidates(model)
    with pytest.raises(ValueError, match="at least two classes"):
        SegmentationProbe(pixels, [torch.zeros_like(mask) for mask in masks], model=plain_vit())


def test_a_head_that_guesses_is_refused():
    def guess(model, pixels):
        return F.pad(torch.ones(len(pixels), 1, 6, 6), (0, 0, 0, 0, 0, 4))

    masks = masks_of([(48, 48)] * N)
    task = Segmentation(images(N), masks, logits=guess)
    outputs = task.outputs(nn.Linear(1, 1), range(N), lambda count: None)
    with pytest.raises(
        ValueError, match="masks: expected classes that the dense model tells apart"
    ):
        task.measured(Part(range(N), outputs, outputs))
