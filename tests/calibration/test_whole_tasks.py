"""`calibrate` runs each task from the search to the images held back, and what it saves reduces."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import elip_models
from elip_models.calibration.answers import Answers
from elip_models.calibration.calibrate import calibrate
from elip_models.calibration.data import Question
from elip_models.calibration.retrieval import Retrieval
from elip_models.calibration.segmentation import SegmentationProbe
from tests.calibration.cases import Words, captions_found, masks_of, scenes
from tests.helpers.models import enlarged, hf_clip
from tests.helpers.towers import images, plain_vit
from tests.integrations.vllm.checkpoints import MODELS

N = 16


def retrieval(folder):
    model, pixels = enlarged(hf_clip()).eval(), 2 * images(N)
    captions = captions_found(model, pixels)
    return model, Retrieval(pixels, captions, model=model, tokenizer=Words())


def segmentation_probe(folder):
    model, masks = plain_vit().eval(), masks_of([(48, 48)] * N)
    return model, SegmentationProbe(scenes(masks), masks, model=model)


def answers(folder):
    config, processor = MODELS["qwen2_5_vl"]()
    kind = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    rng, rows = np.random.default_rng(0), []
    for i in range(N):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (84, 84, 3), dtype=np.uint8)).save(path)
        rows.append(Question((path,), "What is it?"))
    model = kind._from_config(config).eval()
    return model, Answers(rows, model=model, processor=processor, max_new_tokens=3)


CASES = {
    retrieval: ("merge",),
    segmentation_probe: ("merge", "resize"),
    answers: ("diverse", "merge"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_task_runs_to_the_images_held_back(case, tmp_path):
    torch.manual_seed(0)
    model, task = case(tmp_path)
    options = {
        "strategies": CASES[case],
        "folder": tmp_path / "run",
        "tolerance": 1.0,
        "time": False,
    }
    results = calibrate(model, task=task, **options)
    assert results.task == task.name and results.measures == task.measures
    assert results.chosen is not None and results.confirmed
    assert list(results.chosen.held_back) == list(task.measures)
    results.save(tmp_path / "report")
    reduced = elip_models.reduce_(model, str(tmp_path / "report" / "best.json"))
    assert elip_models.is_reduced(reduced)
    elip_models.unreduce_(model)
    seen = []
    assert calibrate(model, task=task, progress=seen.append, **options) == results
    assert not any(" images, " in line for line in seen)  # all outputs were stored


@pytest.mark.parametrize("option", [{"compile": True}, {"distill": 5}])
def test_options_of_models_of_images_alone_are_refused_at_once(option, tmp_path):
    model, task = answers(tmp_path)
    with pytest.raises(ValueError, match=rf"{next(iter(option))}: .* with the task 'answers'"):
        calibrate(model, task=task, **option)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_task_is_timed(case, tmp_path):
    torch.manual_seed(0)
    model, task = case(tmp_path)
    results = calibrate(model, task=task, strategies=CASES[case][:1], tolerance=1.0)
    labels = [""] if case is not answers else [" prefill", " decoding"]
    assert set(results.chosen.time) == {f"{size}{label}" for size in (1, 8) for label in labels}
