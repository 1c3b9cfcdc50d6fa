"""Clips: `evs` and `diverse` select from all frames of a video, also behind `generate`."""

import pytest
import torch
from torch.nn import functional as F

from elip_models import record_stages, reduce_, reduction_summary, unreduce_
from elip_models.vlm.families import find_multimodal
from elip_models.vlm.packing import find_runs
from tests.helpers.tiers import slow_except
from tests.vlm import oracle
from tests.vlm.configs import CASES, QWEN, VIDEO
from tests.vlm.models import build

CLIPS = [name for name in CASES if name.endswith("_video") and name != "llava_next_video"]
FRAMES = dict.fromkeys(QWEN, 3)
"""The frames of the clip by model type; the others have four."""


@pytest.fixture(
    scope="module",
    params=slow_except(["qwen3_vl_video", "llava_onevision_video"], CLIPS),
)
def case(request):
    return build(request.param)


@pytest.fixture(autouse=True)
def _restored(request):
    yield
    if "case" in request.fixturenames:
        unreduce_(request.getfixturevalue("case")[0])


def changes_by_loops(clip, frames):
    """Return the tokens of a clip (n, D) from the most important one, in the order of EVS."""
    size, scores = len(clip) // frames, []
    for i in range(len(clip)):
        if i < size:
            scores.append((0, i))  # the first frame
        elif i < size * frames:
            scores.append((1 - float(1 - F.cosine_similarity(clip[i], clip[i - size], dim=0)), i))
        else:
            scores.append((9, i))  # behind the last frame
    return [i for _, i in sorted(scores)]


@torch.no_grad()
def test_evs_keeps_what_changed_in_forward_and_generate(case):
    model, inputs = case
    read = []
    language_model = find_multimodal(model).language_model
    handle = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    videos = inputs["input_ids"] == VIDEO
    places, frames = videos[0].nonzero()[:, 0], FRAMES.get(model.config.model_type, 4)
    count = round(0.5 * len(places))
    order = changes_by_loops(read[0][0, places].float(), frames)
    runs = find_runs(videos[:1])
    ends = (runs[1] + runs[2] - 1).tolist()
    always = [i for i, place in enumerate(places.tolist()) if place in ends]
    expected = {*always, *[i for i in order if i not in always][: count - len(always)]}
    reduce_(model, "evs", keep=0.5)
    _, kept = oracle.forward(model, inputs)
    assert {i for i, place in enumerate(places.tolist()) if kept[0, place]} == expected
    assert kept[~videos].all()  # text and images
    assert torch.equal(oracle.generate(model, inputs)[1], kept)


@torch.no_grad()
def test_logits_behind_evs_are_those_without_removed_columns(case):
    model, inputs = case
    reduce_(model, "evs", keep=0.4)
    oracle.assert_as_without_removed(model, inputs)


@torch.no_grad()
def test_diverse_selects_from_all_frames_that_text_separates():
    model, inputs = build("qwen3_vl_video")
    videos = inputs["input_ids"] == VIDEO
    _, starts, lengths = find_runs(videos)
    reduce_(model, "diverse", keep=13)  # of the three frames together
    with record_stages(model) as infos:
        model(**inputs)
    kept = infos[0].kept
    assert (kept & videos).sum() == 13
    assert kept[0, starts + lengths - 1].all()
    reduce_(model, "stride", keep=5)  # of each frame
    assert (oracle.forward(model, inputs)[1] & videos).sum() == 15


def test_the_summary_of_evs_is_of_a_clip():
    model, _ = build("llava_onevision_video")
    summary = reduction_summary(reduce_(model, "evs", keep=0.25))
    assert (summary.kept_tokens, summary.image_tokens) == (144, 576)
    assert "144 of 576 in an example clip" in str(summary)
