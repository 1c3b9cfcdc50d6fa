"""`dedup` removes patches that repeat others before the image tower of Qwen-VL."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

import elip_models
from elip_models import budget, list_strategies, reduce_, reduction_summary, unreduce_
from elip_models.vlm.families import PATCH_ARGUMENTS, find_multimodal
from elip_models.vlm.strategies.dedup import Dedup
from tests.helpers.tiers import first_quick
from tests.vlm import oracle
from tests.vlm.configs import CASES
from tests.vlm.models import build, one_row

NAMES = ["qwen2_5_vl", *sorted(PATCH_ARGUMENTS - {"qwen2_5_vl"})]
families = pytest.mark.parametrize("name", first_quick(NAMES))
with_clips = pytest.mark.parametrize(
    "name", first_quick([*NAMES, *(f"{name}_video" for name in NAMES if f"{name}_video" in CASES)])
)
WHITE = 1.5
ONE_AXIS = ("exaone4_5", "hyperclovax_vision_v2")
"""The models with positions of text for image tokens."""


def made(name):
    """Return a model and inputs whose images have background and repeated units."""
    model, inputs = build(name)
    for key in ("pixel_values", "pixel_values_videos"):
        if key in inputs:
            units = inputs[key].view(-1, 4, inputs[key].shape[1])
            units[::3] = WHITE
            units[4::6] = units[5::6]
    return model, inputs


def select(colours, tolerance=0.0):
    """Return which units of one frame stay, from a colour of each."""
    rows, columns = len(colours), len(colours[0])
    units = torch.tensor(colours).flatten()[:, None, None, None].expand(-1, 4, 3, 8)
    stays = Dedup(tolerance).select(units, torch.tensor([[1, rows, columns]]))
    return stays.view(rows, columns).int().tolist()


def test_repeated_units_go_and_those_of_the_background_but_the_first_and_the_last():
    colours = [[9.0, 0.0, 7.0, 7.0], [0.0, 5.0, 5.0, 7.0], [0.0, 0.0, 5.0, 0.0]]
    assert select(colours) == [[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


def test_a_unit_is_compared_with_the_kept_one_so_that_a_gradient_stays():
    ramp = [[0.0] * 9, [1 + 0.25 * i for i in range(9)]]
    assert select(ramp, tolerance=0.5)[1] == [1, 0, 0, 1, 0, 0, 1, 0, 1]
    assert select(ramp, tolerance=0.2)[1] == [1] * 9


def test_units_of_one_frame_are_not_compared_with_those_of_another():
    units = torch.tensor([1.0, 2.0, 3.0, 3.0, 2.0, 4.0, 4.0, 3.0]).view(-1, 1, 1, 1)
    stays = Dedup(0.0).select(units.expand(-1, 4, 3, 8), torch.tensor([[2, 1, 3], [1, 2, 1]]))
    assert stays.int().tolist() == [1, 1, 1, 1, 1, 1, 1, 1]


def test_one_differing_pixel_of_one_channel_keeps_a_unit():
    units = torch.zeros(4, 4, 3, 8)
    units[1, 2, 1, 5] = 0.3
    grid = torch.tensor([[1, 2, 2]])
    assert Dedup(0.2).select(units, grid).int().tolist() == [1, 1, 0, 1]
    assert Dedup(0.4).select(units, grid).int().tolist() == [1, 0, 0, 1]


@contextmanager
def unattended(model, strategy):
    """Let no patch of the image tower attend to those that the strategy removes, inside.

    Yields a list, in which each call of the tower puts which units stay.
    """
    tower, calls = find_multimodal(model).tower, []
    config, state = tower.config, {}
    before = config._attn_implementation

    def begin(module, args, kwargs):
        pixels, grid = args[0], kwargs["grid_thw"]
        units = pixels.view(-1, 4, config.in_channels, pixels.shape[1] // config.in_channels)
        stays = strategy.select(units, grid // torch.tensor([1, 2, 2]))
        calls.append(stays)
        order = _window_order(grid, config) if hasattr(tower, "window_size") else slice(None)
        state.update(stays=stays[order].repeat_interleave(4), place=0)

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        place, length = state["place"], key.shape[2]
        state["place"] = (place + length) % len(state["stays"])
        mask = state["stays"][place : place + length] | torch.eye(length, dtype=torch.bool)
        settings = {"attn_mask": mask, "scale": scaling, "enable_gqa": True}
        output = scaled_dot_product_attention(query, key, value, **settings)
        return output.transpose(1, 2), None

    AttentionInterface.register("unattended", attend)
    tower.set_attn_implementation("unattended")
    handle = tower.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
        tower.set_attn_implementation(before)


def _window_order(grid, config):
    """Return the units of all images, window by window."""
    side = config.window_size // config.patch_size // 2
    order, first = [], 0
    for frames, rows, columns in (grid // torch.tensor([1, 2, 2])).tolist():
        for _ in range(frames):
            units = torch.arange(rows * columns).view(rows, columns) + first
            for strip in units.split(side):
                order += [window.flatten() for window in strip.split(side, 1)]
            first += rows * columns
    return torch.cat(order)


@torch.no_grad()
@with_clips
def test_features_of_kept_units_are_those_of_a_tower_that_hides_the_removed_ones(name):
    model, inputs = made(name)
    tower = find_multimodal(model).tower
    strategy = Dedup(0.0)
    videos = "video" if name.endswith("_video") else "image"
    pixels = inputs["pixel_values_videos" if videos == "video" else "pixel_values"]
    grid = inputs[f"{videos}_grid_thw"]
    with unattended(model, strategy) as calls:
        expected = tower(pixels, grid_thw=grid)
    dense = tower(pixels, grid_thw=grid).pooler_output
    reduce_(model, strategy)
    for output in (tower(pixels, grid_thw=grid), tower(pixels, grid)):
        stays = calls[0]
        pairs = [(output.pooler_output, expected.pooler_output)]
        if "deepstack_features" in expected:
            pairs += zip(output.deepstack_features, expected.deepstack_features, strict=True)
        for values, wanted in pairs:
            assert oracle.close(values[stays], wanted[stays])
            assert not values[~stays].any()
    assert 0.2 < stays.double().mean() < 0.8
    assert (dense - expected.pooler_output)[stays].abs().max() > 1e-3
    assert stays[(grid.prod(1) // 4).cumsum(0) - 1].all()


@torch.no_grad()
@with_clips
def test_logits_and_generated_tokens_are_those_of_the_hidden_patches(name):
    model, inputs = made(name)
    ids = inputs["input_ids"]
    strategy = reduction = Dedup(0.0)
    reduce_(model, reduction)
    logits, kept = oracle.forward(model, inputs)
    output, again = oracle.generate(model, inputs)
    unreduce_(model)
    assert torch.equal(kept, again)
    assert kept[ids < 100].all() and not kept.all()
    with unattended(model, strategy) as calls, oracle.hidden(model, kept):
        expected = model(**inputs).logits
        generated = oracle.stock_generate(model, inputs)
    assert sum(map(sum, calls[: len(calls) // 2])) == kept[ids >= 100][_real(model, ids)].sum()
    read = kept & inputs["attention_mask"].bool()
    assert oracle.close(logits[read], expected[read])
    assert torch.equal(output.sequences, generated.sequences)
    assert all(map(oracle.close, output.logits, generated.logits))


def _real(model, ids):
    """Return which tokens from 100 on are those of images and videos."""
    values = ids[ids >= 100]
    return torch.isin(values, torch.tensor(find_multimodal(model).placeholder_ids))


@torch.no_grad()
@families
def test_an_image_without_repetition_is_read_by_the_dense_model(name):
    model, inputs = build(name)
    logits = model(**inputs).logits
    reduce_(model, "dedup:tolerance=0")
    assert torch.equal(model(**inputs).logits, logits)
    assert reduction_summary(model).kept_tokens == reduction_summary(model).image_tokens
    lines = str(reduction_summary(model)).splitlines()
    assert lines[0].split() == ["image", "tower", f"{reduction_summary(model).strategy}"]
    assert lines[1].endswith("reads every remaining image token")
    assert "an image without repetition" in lines[-1]


@torch.no_grad()
@families
def test_a_padded_batch_gives_what_single_rows_give(name):
    model, inputs = made(name)
    reduce_(model, "dedup:tolerance=0")
    if name in ONE_AXIS:  # whose stock model counts the padding
        positions = inputs["attention_mask"].cumsum(1) - 1
        inputs["position_ids"] = positions.clamp(min=0)
    logits, kept = oracle.forward(model, inputs)
    for row, real in enumerate(inputs["attention_mask"].bool()):
        alone, kept_alone = oracle.forward(model, one_row(inputs, row))
        assert torch.equal(kept[row, real], kept_alone[0])
        assert oracle.close(logits[row, real & kept[row]], alone[0, kept_alone[0]])


@families
def test_removed_patches_have_no_gradient(name):
    model, inputs = made(name)
    labels = inputs["input_ids"].where(
        inputs["input_ids"].lt(100) & inputs["input_ids"].gt(0), -100
    )
    reduce_(model, "dedup:tolerance=0")
    stays = []
    tower = find_multimodal(model).tower
    handle = tower.register_forward_hook(lambda *call: stays.append(call[-1].pooler_output.any(1)))
    pixels = inputs["pixel_values"].requires_grad_()
    model(**inputs, labels=labels).loss.backward()
    handle.remove()
    patches = stays[0].repeat_interleave(4)
    assert pixels.grad[patches].abs().amax(1).gt(0).all() and not pixels.grad[~patches].any()


@torch.no_grad()
def test_dedup_and_fastv_act_together_and_a_budget_is_that_of_fastv():
    model, inputs = made("qwen2_5_vl")
    reduce_(reduce_(model, "dedup:tolerance=0"), "fastv:layer=1", keep=0.5)
    with elip_models.record_stages(model) as infos:
        model(**inputs)
        with budget(model, 2):
            model(**inputs)
    half, two = (info.kept_behind[0] & info.images for info in infos)
    assert (half.sum(1) < (infos[0].kept & infos[0].images).sum(1)).all()
    assert (two.sum(1) < half.sum(1)).all()


@pytest.mark.parametrize("name", first_quick(["llava", "glm4v", "lfm2_vl", "idefics3"]))
def test_towers_that_make_positions_themselves_are_refused(name):
    model = build(name)[0]
    reason = "its image tower needs every patch: it makes their positions in"
    with pytest.raises(TypeError, match=reason):
        reduce_(model, "dedup")
    assert {entry.name: entry.why_unsupported for entry in list_strategies(model)}["dedup"]


def test_settings_are_refused():
    model, _ = build("qwen2_5_vl")
    with pytest.raises(
        ValueError, match="keep: expected none with strategy='dedup', which takes to"
    ):
        reduce_(model, "dedup", keep=0.5)
    with pytest.raises(ValueError, match="tolerance: expected"):
        Dedup(-0.1)
    reduce_(model, "dedup")
    with (
        pytest.raises(ValueError, match=r"keep: expected none under 'dedup', .* got keep=6"),
        budget(model, 6),
    ):
        pass
