"""The options of ToMe and its relatives: what is compared, norms, and the class token alone."""

import pytest
import torch

import elip_kernels
import elip_models
from elip_models import ToMe
from elip_models.towers import as_tower
from tests.helpers.models import TOWERS, hf_blip
from tests.helpers.towers import WIDTH, images, plain_vit


@pytest.mark.parametrize("compare", ["mean_key", "keys", "tokens"])
def test_tome_compares_mean_keys_or_keys_or_tokens(compare):
    model, x, strategy = plain_vit().eval(), images(), ToMe(4, compare=compare)
    _, infos = elip_models.encode_image(model, x, strategy=strategy, return_info=True)
    tokens = as_tower(model).embed(x)
    keys = as_tower(model).qkv(0, tokens)[1]
    compared = {
        "mean_key": keys.mean(1),
        "keys": torch.cat(keys.unbind(1), dim=2),
        "tokens": as_tower(model).attend(0, tokens),
    }
    expected = elip_kernels.bipartite_merge(tokens, compared[compare], 4, return_info=True)[2]
    assert torch.equal(infos[0].reduction.slots, expected.slots)


def test_a_merged_token_keeps_the_largest_norm():
    strategy = ToMe(4, keep_norm=True)
    tokens = torch.randn(2, 37, WIDTH, requires_grad=True)
    merged, _, match = elip_kernels.bipartite_merge(tokens, tokens, 9, return_info=True)
    scaled = strategy.scaled(merged, tokens, match)
    for image in range(2):
        for row in range(match.num_rows):
            members = tokens[image, match.slots[image] == row]
            if len(members) == 1:
                assert torch.equal(scaled[image, row], members[0])
            torch.testing.assert_close(scaled[image, row].norm(), members.norm(dim=1).max())
    scaled.square().sum().backward()
    assert tokens.grad.isfinite().all() and tokens.grad.abs().amin(2).max() > 0
    zeros = torch.zeros(1, 5, 8)
    merged, _, match = elip_kernels.bipartite_merge(zeros, zeros, 2, return_info=True)
    assert torch.equal(strategy.scaled(merged, zeros, match), merged)


@pytest.mark.parametrize("library", ["timm", "open_clip", "HF CLIP", "HF BLIP"])
def test_the_class_token_alone_is_exact_in_the_last_block(library):
    model, x = TOWERS[library]().eval(), images()
    expected = elip_models.encode_image(model, x, strategy=ToMe(0))[:, 0]
    found = elip_models.encode_image(model, x, strategy=ToMe(0, class_token_only=True))
    assert found.shape[1] == 1
    torch.testing.assert_close(found[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_the_class_token_alone_needs_a_model_that_reads_no_other():
    with pytest.raises(TypeError, match="class_token_only: the model uses the patches"):
        elip_models.reduce_(plain_vit(global_pool="avg"), strategy=ToMe(class_token_only=True))
    with pytest.raises(TypeError, match="the text encoder of a BlipForImageTextRetrieval reads"):
        elip_models.reduce_(hf_blip(), strategy=ToMe(class_token_only=True))
    with pytest.raises(ValueError, match="leave out class_token_only"):
        elip_models.create_model("albef_tiny", strategy="tome:class_token_only=true")


def test_half_a_merge_is_rounded_up_at_any_image_size():
    """7/216 of 6 blocks with 18 patches are 3.5 merges; in floating point, a little less."""
    counts = ToMe(7 / 216).token_counts(as_tower(plain_vit()).size._replace(num_patches=18))
    assert counts[0].attention - counts[-1].mlp == 4
