"""Retrieval has the recalls that a plain computation with the model's own library gives."""

import pytest
import torch

import elip_models
from elip_models.calibration.retrieval import Retrieval
from elip_models.calibration.task import Part
from tests.calibration.cases import Words, captions_found, own_features
from tests.helpers.models import enlarged, hf_clip, open_clip_pair
from tests.helpers.towers import images

N = 12


def plain_recalls(image, text, owners, k):
    similar = text @ image.T
    by_text = (similar.topk(k, dim=1).indices == owners[:, None]).any(1)
    best = similar.T.topk(k, dim=1).indices
    by_image = (owners[best] == torch.arange(len(image))[:, None]).any(1)
    return by_text.double().mean().item(), by_image.double().mean().item()


@pytest.fixture(params=["open_clip", "transformers"])
def case(request):
    torch.manual_seed(0)
    model = enlarged(open_clip_pair() if request.param == "open_clip" else hf_clip()).eval()
    pixels = 2 * images(N)
    captions = captions_found(model, pixels)
    return model, pixels, captions


def task_of(model, pixels, captions):
    return Retrieval(pixels, captions, model=model, tokenizer=Words(), batch_size=5)


def test_recalls_are_those_of_the_models_own_features(case):
    model, pixels, captions = case
    task, part = task_of(*case), (1, 2, 4, 5, 7, 8, 9, 11)
    reduced = elip_models.reduce_(elip_models.unreduce_(model), "tome", keep=1.0)
    batches = []
    outputs = task.outputs(reduced, part, batches.append)
    elip_models.unreduce_(model)
    assert batches == [5, 3]
    texts = [text for i in part for text in captions[i]]
    image, text = own_features(model, pixels[list(part)], texts)
    torch.testing.assert_close(outputs["features"], image)
    owners = torch.arange(len(part)).repeat_interleave(2)
    measured = task.measured(Part(part, outputs, outputs))
    for k in (1, 5):
        ways = "text to image", "image to text"
        for way, wanted in zip(ways, plain_recalls(image, text, owners, k), strict=True):
            measure = measured[f"{way} R@{k}"]
            assert measure.statistic(measure.rows.sum(0)[None])[0] == pytest.approx(wanted)
            assert len(measure.rows) == len(part)


def test_the_candidates_are_the_images_of_the_part(case):
    task = task_of(*case)
    outputs = task.outputs(case[0], range(N), lambda count: None)

    def recall(images):
        rows = {name: value[list(images)] for name, value in outputs.items()}
        measure = task.measured(Part(images, rows, {}))[task.measures[1]]
        return measure.statistic(measure.rows.sum(0)[None])[0]

    assert recall(range(5)) == 1 > recall(range(N))


def test_captions_that_find_no_image_are_refused(case):
    model, pixels, captions = case
    task = task_of(model, pixels, [captions[0]] * N)
    outputs = task.outputs(model, range(N), lambda count: None)
    with pytest.raises(ValueError, match="captions: expected ones by which the model finds"):
        task.measured(Part(range(N), outputs, outputs))


def test_an_image_without_a_caption_is_refused(case):
    model, pixels, captions = case
    with pytest.raises(ValueError, match=r"at least one for each image.*images\[3\]"):
        task_of(model, pixels, [*captions[:3], (), *captions[4:]])
    with pytest.raises(TypeError, match="image-text model"):
        task_of(model.visual if hasattr(model, "visual") else model.vision_model, pixels, captions)
