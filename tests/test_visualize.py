"""Which patches survive each stage, and the picture of it."""

import pytest
import torch

import elip_models
from elip_models.visualize import draw_survivors, surviving_patches
from tests.towers import SCHEDULE, images, plain_vit, text

NUM_PATCHES = 36


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("merge", [True, False])
def test_survivors_are_the_patches_that_every_stage_kept(registers, merge):
    model, prefix = plain_vit(reg_tokens=registers), 1 + registers
    _, infos = elip_models.encode_image(
        model, images(), text(), schedule=SCHEDULE, scorer="last", merge=merge, return_info=True
    )
    survivors = surviving_patches(infos, NUM_PATCHES)
    for b in range(2):
        held = [None] * prefix + list(range(NUM_PATCHES))  # the patch that each token is
        for info, alive in zip(infos, survivors, strict=True):
            held = held[:prefix] + [held[n] for n in info.reduction.kept[b]] + [None] * merge
            expected = sorted(patch for patch in held if patch is not None)
            assert alive[b].nonzero()[:, 0].tolist() == expected


def test_a_dense_forward_has_no_survivors_to_show():
    assert surviving_patches([], NUM_PATCHES) == []


def test_the_picture_has_a_row_an_image(tmp_path):
    from PIL import Image

    alive = [torch.rand(3, 16) > 0.5 for _ in range(2)]
    path = draw_survivors(
        torch.rand(3, 3, 32, 32), ["a", "b", "c"], alive, tmp_path / "a.png", titles=["1", "2"]
    )
    width, height = Image.open(path).size
    assert width > height > 3 * 100
