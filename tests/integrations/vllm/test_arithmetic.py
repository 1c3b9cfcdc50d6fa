"""Settings, counts and positions of the vLLM plugin, in plain torch."""

import pytest
import torch
import transformers as hf

import elip_models
from elip_models.integrations.vllm.patches import normalised, remaining_metadata, units_of_items
from elip_models.integrations.vllm.positions import (
    decode_offsets,
    encode_offsets,
    grid_offsets,
    prompt_positions,
    whole_starts,
)
from elip_models.integrations.vllm.settings import SUPPORTED, serving_strategy
from elip_models.integrations.vllm.tokens import context_of, select_features, shorten_placeholders
from elip_models.validation import ConfigError
from elip_models.vlm.strategies import LANGUAGE_STRATEGIES, Dedup, Diverse, Pool, Stride
from tests.vlm.models import build

IMAGE = 9
OF_FEATURES = [name for name in SUPPORTED if name != Dedup.name]


def test_settings_are_the_arguments_of_reduce():
    assert serving_strategy({"keep": 0.25}) == Diverse(keep=0.25)
    assert serving_strategy({"strategy": "pool", "keep": 64}) == Pool(keep=64)
    assert serving_strategy({"strategy": "diverse:keep=0.5"}) == Diverse(keep=0.5)
    assert serving_strategy({"strategy": "dedup", "tolerance": 0.4}) == Dedup(tolerance=0.4)


def test_settings_of_a_saved_model_are_read():
    model, _ = build("llava")
    elip_models.reduce_(model, "stride", keep=0.3)
    assert serving_strategy(model.config.elip) == Stride(keep=0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("diverse", "elip: settings: expected a dict"),
        ({"keep": 2.0}, r"elip: keep: expected a float in \(0, 1\]"),
        ({"kep": 0.5}, "elip: kep: .* did you mean 'keep'"),
        ({"strategy": "tome"}, "elip: "),
        ({"strategy": "dedup", "keep": 0.5}, "elip: keep: "),
        ({"strategy": "cdpruner"}, "got 'cdpruner': it reads the question"),
        ({"keep": None}, "elip: keep: expected a value, got None"),
        (
            {"keep": 2},
            "elip: keep: expected a float .* an int of at least 8 .* got 2; pass 0.25",
        ),
        (
            {"strategy": "diverse:relevance=true"},
            "elip: relevance: expected False for 'diverse' in vLLM, got True: it reads",
        ),
        ({"strategy": "visionzip"}, "got 'visionzip': it reads the attention"),
        ({"strategy": "evs"}, "got 'evs': vLLM has it for videos as --video-pruning-rate"),
        ({"strategy": "fastv"}, "got 'fastv': it acts inside the language model"),
    ],
)
def test_settings_that_cannot_act_in_vllm_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        serving_strategy(settings)


def test_two_saved_strategies_are_refused():
    model, _ = build("llava")
    elip_models.reduce_(model, "stride", keep=0.5)
    elip_models.reduce_(model, "fastv", layer=1)
    with pytest.raises(ConfigError, match="got stride and fastv; pass one"):
        serving_strategy(model.config.elip)


def test_placeholders_are_removed_and_other_ids_stay():
    ids = [1, *[IMAGE] * 6, 2, IMAGE, IMAGE, 3]
    flags = [token == IMAGE for token in ids]
    assert shorten_placeholders(ids, flags, 4) == [1, *[IMAGE] * 4, 2, 3]
    assert shorten_placeholders(ids, flags, 8) == ids


@pytest.mark.parametrize("name", OF_FEATURES)
def test_features_are_those_of_reduce_in_image_order(name):
    strategy = LANGUAGE_STRATEGIES[name](keep=0.25)
    columns = torch.arange(64.0)[:, None]  # of a second level, which goes with its row
    features = torch.cat((torch.randn(64, 8), columns), 1)
    kept = select_features(features, 8, strategy)
    context = context_of(features, strategy)
    positions, values = strategy.reduce(features[None, :, :8], 16, context)
    positions, order = positions[0].sort()
    assert kept[:, 8].tolist() == positions.tolist()
    assert torch.equal(kept[:, :8], features[positions, :8] if values is None else values[0, order])


@pytest.mark.parametrize("name", OF_FEATURES)
def test_ranks_whose_generators_differ_select_the_same_features(name):
    strategy, images = serving_strategy({"strategy": name, "keep": 0.25}), torch.randn(2, 64, 8)
    ranks = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        ranks.append([select_features(image, 8, strategy) for image in images])
    assert all(map(torch.equal, *ranks))


def test_random_tokens_of_another_image_are_others():
    strategy = serving_strategy({"strategy": "random_tokens", "keep": 0.25})
    places = torch.arange(64.0)[:, None]
    one, two = (
        select_features(torch.cat((torch.randn(64, 8), places), 1), 8, strategy)[:, 8]
        for _ in range(2)
    )
    assert not torch.equal(one, two)


def test_image_text_of_a_prompt_keeps_the_positions_of_the_whole_prompt():
    config = hf.Qwen2_5_VLConfig(
        text_config=dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=1),
        vision_config=dict(depth=1, hidden_size=32, num_heads=4, tokens_per_second=3),
        image_token_id=IMAGE,
        vision_start_token_id=8,
    )
    with torch.device("meta"):
        model = hf.Qwen2_5_VLModel(config)
    grids = [(1, 4, 8), (1, 6, 4)]
    lengths = [8, 6]
    ids = torch.tensor([[1, 8, *[IMAGE] * 8, 2, 8, *[IMAGE] * 6, 3, 3]])
    whole, _ = model.get_rope_index(
        ids, mm_token_type_ids=(ids == IMAGE).int(), image_grid_thw=torch.tensor(grids)
    )
    kept = [[0, 5, 7], [2, 5]]
    starts = whole_starts([2, 7], [3, 2], lengths)
    assert starts == [2, 12]
    positions = prompt_positions(whole[:, 0], starts, [3, 2], lengths)
    for start, places, (frames, rows, columns) in zip((2, 7), kept, grids, strict=True):
        offsets = grid_offsets(frames, rows // 2, columns // 2)[:, places]
        positions[:, start : start + len(places)] += offsets
    stays = [start + place for start, places in zip(starts, kept, strict=True) for place in places]
    is_kept = (ids[0] != IMAGE).scatter(0, torch.tensor(stays), True)
    assert torch.equal(positions, whole[:, 0, is_kept])


def test_times_of_a_clip_are_rounded_down():
    offsets = grid_offsets(3, 1, 2, time_step=1.5)
    assert offsets.tolist() == [[0, 0, 1, 1, 3, 3], [0] * 6, [0, 1] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_offsets_are_exact_in_every_dtype(dtype):
    offsets = torch.tensor([[0, 127, 128], [129, 1000, 16383], [5, 255, 8191]])
    assert torch.equal(decode_offsets(encode_offsets(offsets, dtype)), offsets)


def test_pixels_are_normalised_as_by_transformers():
    processor = hf.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    image = torch.randint(0, 256, (3, 84, 140), dtype=torch.uint8)
    raw = processor(image, do_rescale=False, do_normalize=False)["pixel_values"]
    patches = normalised(raw, processor.image_mean, processor.image_std, processor.rescale_factor)
    torch.testing.assert_close(patches, processor(image)["pixel_values"], rtol=0, atol=1e-6)


def test_units_belong_to_images_and_clips():
    stays = torch.arange(14) % 3 == 0
    items = units_of_items(stays, torch.tensor([[1, 4, 4], [2, 2, 10]]), 4)
    assert [len(item) for item in items] == [4, 10] and torch.equal(torch.cat(items), stays)


def segments(ends, length):
    """Return the number of the segment of each patch."""
    return torch.searchsorted(ends[1:], torch.arange(length, dtype=ends.dtype), right=True)


def test_remaining_patches_keep_their_rows_and_segments():
    stays = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    rows = torch.arange(24)[:, None]
    ends = torch.tensor([0, 8, 24], dtype=torch.int32)
    metadata = {"rotary_pos_emb_cos": rows, "pos_embeds": rows, "cu_seqlens": ends}
    kept = stays.repeat_interleave(4)
    new = remaining_metadata(metadata, stays, 4)
    assert torch.equal(new["rotary_pos_emb_cos"], rows[kept])
    assert torch.equal(new["pos_embeds"], rows[kept])
    assert torch.equal(segments(new["cu_seqlens"], 16), segments(ends, 24)[kept])
    assert new["cu_seqlens"].dtype == torch.int32 and new["max_seqlen"] == 12


def test_remaining_units_keep_their_windows_and_their_order():
    order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
    stays = torch.tensor([1, 0, 0, 0, 1, 1, 1, 1], dtype=torch.bool)
    windows = torch.tensor([0, 16, 24, 32], dtype=torch.int32)
    metadata = {
        "rotary_pos_emb_cos": order.repeat_interleave(4)[:, None],
        "window_index": order,
        "reverse_indices": order.argsort(),
        "cu_seqlens": torch.tensor([0, 32], dtype=torch.int32),
        "cu_window_seqlens": windows,
    }
    new = remaining_metadata(metadata, stays, 4)
    of_window = stays.nonzero()[:, 0][new["window_index"]]
    assert of_window.tolist() == [0, 4, 5, 6, 7]
    assert new["window_index"][new["reverse_indices"]].tolist() == [*range(5)]
    assert torch.equal(new["rotary_pos_emb_cos"][::4, 0], of_window)
    assert new["cu_window_seqlens"].tolist() == [0, 12, 20]
    assert new["cu_seqlens"].tolist() == [0, 20]
    assert (new["max_seqlen_full"], new["max_seqlen_window"]) == (20, 12)


def test_pool_counts_square_images_alone():
    with pytest.raises(ValueError, match="square number of tokens for 'pool', got 15"):
        Pool(keep=0.5).count(15)
