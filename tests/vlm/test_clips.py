"""Clips: `evs` and `diverse` select from all frames of a video, also behind `generate`."""

import pytest
import torch
from torch.nn import functional as F

from elip_models import is_reduced, record_stages, reduce_, reduction_summary, unreduce_
from elip_models.vlm.clips import TokenGroup, VideoLayout
from elip_models.vlm.families import find_multimodal
from elip_models.vlm.packing import find_runs
from tests.helpers.tiers import slow_except
from tests.vlm import oracle
from tests.vlm.configs import CASES, VIDEO
from tests.vlm.models import build

CLIPS = [name for name in CASES if name.endswith("_video") and name != "llava_next_video"]
FRAMES = {"qwen2_vl": 3, "qwen2_5_vl": 3, "qwen3_vl": 3}
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
    logits, kept = oracle.forward(model, inputs)
    unreduce_(model)
    with oracle.hidden(model, kept):
        expected = model(**inputs).logits
    read = kept & inputs["attention_mask"].bool()
    assert not read.all() and oracle.close(logits[read], expected[read])


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


def test_clips_whose_frames_are_apart_are_told_by_their_lengths():
    layout = VideoLayout(VIDEO, None, True, 4)
    videos = torch.zeros(2, 24, dtype=torch.bool)
    for row, start, length in ((0, 1, 2), (0, 4, 2), (0, 7, 2), (0, 10, 3), (0, 14, 3), (1, 9, 2)):
        videos[row, start : start + length] = True
    groups = {len(group.positions[0]): group for group in layout.clips(videos, [4, 2, 6, 2], None)}
    assert groups[4].positions.tolist() == [[1, 2, 4, 5]]
    assert groups[4].frame == 2 and groups[4].always == (1, 3)
    assert groups[6].positions.tolist() == [[10, 11, 12, 14, 15, 16]]
    assert groups[2].rows.tolist() == [[0], [1]]
    with pytest.raises(ValueError, match="pixel_values_videos: expected the clips"):
        list(layout.clips(videos, [4, 2], None))
    assert TokenGroup(groups[2].rows, groups[2].positions).frame is None


@torch.no_grad()
def test_frames_are_not_guessed_from_positions_of_a_text():
    model, inputs = build("qwen2_vl_video")
    reduce_(model, "evs")
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    for _ in range(2):  # without positions, and then with those of the call before
        with pytest.raises(ValueError, match="position_ids: expected the places of a video's tok"):
            model(**inputs, inputs_embeds=embeds)
        model.model.rope_deltas = torch.zeros(2, 1, dtype=torch.long)
    places = torch.tensor([[0, 0, 0, 0, 0], [3, 3, 4, 4, 3], [3, 4, 3, 4, 3]])[:, None]
    layout, videos = VideoLayout(VIDEO, None, False, 4), torch.ones(1, 5, dtype=torch.bool)
    assert [group.frame for group in layout.clips(videos, [], places)] == [4]
    assert [group.frame for group in layout.clips(videos[:, :4], [], places[..., :4])] == [4]


def test_evs_is_refused_for_models_without_video_tokens():
    model, _ = build("llava")
    with pytest.raises(TypeError, match="for 'evs', got llava: it has no tokens of videos"):
        reduce_(model, "evs")
    assert not is_reduced(model)


def test_the_summary_of_evs_is_of_a_clip():
    model, _ = build("llava_onevision_video")
    summary = reduction_summary(reduce_(model, "evs", keep=0.25))
    assert (summary.kept_tokens, summary.image_tokens) == (144, 576)
    assert "144 of 576 in a clip" in str(summary)
