"""Surviving patches of each stage, their scores through merged tokens, and the pictures."""

import re
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

import elip_models
from elip_models.analysis.merging import merged_image, tokens_of_patches
from elip_models.analysis.visualize import (
    GREY,
    attention_maps,
    surviving_patches,
)
from elip_models.pretraining.data import EmojiScenes
from elip_models.pretraining.models.registry import create_model
from elip_models.pretraining.training import report
from elip_models.pretraining.training.report import draw_kept_tokens
from tests.helpers.tiers import first_quick
from tests.helpers.towers import SCHEDULE, images, plain_vit, text

NUM_PATCHES = 36


def reduce_images(merge="one", **options):
    """Return the infos of a reduced tiny tower, and its number of prefix tokens."""
    model = plain_vit(**options)
    _, infos = elip_models.encode_image(
        model, images(), text(), schedule=SCHEDULE, scorer="last", merge=merge, return_info=True
    )
    return infos, model.num_prefix_tokens


def held_by_tokens(infos, b, p, merge):
    """Return by brute force the set of patches of each token, before and after each stage."""
    held = [set() for _ in range(p)] + [{n} for n in range(NUM_PATCHES)]
    steps = [held]
    for info in infos:
        kept = info.reduction.kept[b].tolist()
        others = (held[n] for n in range(p, len(held)) if n not in kept)
        rest = [set().union(*others)] if merge == "one" else []
        held = [*held[:p], *(held[n] for n in kept), *rest]
        steps.append(held)
    return steps


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("merge", ["one", "none"])
def test_survivors_are_patches_that_are_separate_tokens(registers, merge):
    infos, p = reduce_images(merge, reg_tokens=registers)
    survivors = surviving_patches(infos, NUM_PATCHES)
    assert survivors[0].sum(1).tolist() == [28, 28]
    for b in range(2):
        for held, alive in zip(held_by_tokens(infos, b, p, merge)[1:], survivors, strict=True):
            alone = sorted(n for patches in held if len(patches) == 1 for n in patches)
            assert alive[b].nonzero()[:, 0].tolist() == alone


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("merge", ["one", "none"])
def test_a_patch_shows_the_score_of_its_token(registers, merge):
    infos, p = reduce_images(merge, reg_tokens=registers)
    heats = attention_maps(infos, NUM_PATCHES)
    for b in range(2):
        steps = held_by_tokens(infos, b, p, merge)
        for info, held, heat in zip(infos, steps[:-1], heats, strict=True):
            expected = torch.full((NUM_PATCHES,), float("nan"))
            for score, patches in zip(info.attention[b], held, strict=True):
                expected[sorted(patches)] = score
            torch.testing.assert_close(heat[b], expected, atol=0, rtol=0, equal_nan=True)


def rows_of(path):
    """Count the rows of a picture: long runs of lines that begin with an image."""
    ink = pil_to_tensor(Image.open(path).convert("L"))[0, :, 10:110] < 250
    lines = "".join(str(int(line)) for line in ink.float().mean(1) > 0.6)
    return len(re.findall("1{150,}", lines))


@pytest.mark.parametrize("merge", ["one", "none"])
def test_a_merged_patch_shows_its_token(merge):
    infos, p = reduce_images(merge)
    found = tokens_of_patches(infos, NUM_PATCHES)
    for b in range(2):
        for held, tokens in zip(held_by_tokens(infos, b, p, merge)[1:], found, strict=True):
            expected = torch.full((NUM_PATCHES,), -1)
            for token, patches in enumerate(held):
                expected[sorted(patches)] = token
            assert torch.equal(tokens[b], expected)


def test_patches_of_a_token_have_their_mean_colour_and_dropped_ones_are_grey():
    image, side = torch.rand(3, 4, 6), 128
    drawn = merged_image(image, torch.tensor([[0, 0, 1], [2, -1, 2]]))
    assert drawn.shape == (3, 2 * side, 3 * side)

    def patch(row, column):  # without the lines on its left and above
        rows, columns = (slice(side * k + 1, side * (k + 1)) for k in (row, column))
        return drawn[:, rows, columns]

    mean = image[:, :2, :4].mean((1, 2))[:, None, None]
    torch.testing.assert_close(patch(0, 0), mean.expand(3, side - 1, side - 1))
    torch.testing.assert_close(patch(0, 0), patch(0, 1))
    torch.testing.assert_close(patch(1, 0), patch(1, 2))
    assert patch(1, 1).unique().tolist() == [pytest.approx(GREY)]
    alone = image[:, :2, 4:].repeat_interleave(side // 2, 1).repeat_interleave(side // 2, 2)
    assert torch.equal(patch(0, 2), alone[:, 1:, 1:])


def tiny_clip(**options):
    name = "elip_clip_tiny" if "schedule" in options else "clip_tiny"
    options |= {"image_size": 32, "vision_depth": 3, "vocab_size": 600}
    return create_model(name, **options).eval()


@pytest.mark.parametrize(
    "options", first_quick([{"strategy": "merge"}, {}, {"schedule": "1(100%) 2(50%)"}])
)
def test_a_training_run_ends_with_the_picture(options, tokenizer, tmp_path, monkeypatch):
    merging = Mock(wraps=report.draw_merging)
    monkeypatch.setattr(report, "draw_merging", merging)
    model, source = tiny_clip(**options), EmojiScenes(5, image_size=32)
    assert rows_of(draw_kept_tokens(model, tokenizer, source, tmp_path / "kept.png")) == 5
    assert merging.called == ("strategy" in options)
