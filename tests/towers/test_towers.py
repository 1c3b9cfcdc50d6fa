"""The parts of a tower's block compute what the block computes, in three libraries."""

import pytest
import torch

import elip_kernels
from elip_models.towers import Query, as_tower
from tests.helpers.models import TOWERS
from tests.helpers.towers import WIDTH, images


@pytest.fixture(params=TOWERS.values(), ids=TOWERS)
def model(request):
    return request.param().eval()


@torch.no_grad()
def test_parts_add_up_to_the_block(model):
    tower = as_tower(model)
    tokens = tower.embed(images())
    assert tokens.shape == (2, tower.size.num_tokens, WIDTH)
    for i in range(tower.depth):
        whole = tower.block(i, tokens)
        assert tower.is_plain(i)
        close = {"atol": 2e-5, "rtol": 2e-5}
        torch.testing.assert_close(tower.mlp(i, tower.attend(i, tokens)), whole, **close)
        alone = tower.cls_block(i, tokens, tokens[:, 0])
        torch.testing.assert_close(alone, whole[:, 0], **close)
        row = tower.attention_map(i, tokens)[:, :, 0].mean(1)
        query = Query(tokens[:, 0])
        got = tower.cls_attention(i, tokens, query.cls)
        torch.testing.assert_close(got, row, atol=1e-5, rtol=0)
        out, info, scored = tower.score_reduce(i, tokens, tokens, query, keep=10, merge="one")
        torch.testing.assert_close(scored, got, atol=1e-6, rtol=0)
        expected, kept = elip_kernels.reduce(
            tokens, scored, 10, num_prefix_tokens=tower.num_prefix_tokens, return_info=True
        )
        assert torch.equal(info.kept, kept.kept)
        torch.testing.assert_close(out, expected)
        tokens = whole
