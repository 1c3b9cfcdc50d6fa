"""guided_tome: tokens that the text attends to merge last, by the row of its definition."""

import pytest
import torch

import elip_kernels
import elip_models
from elip_models import GuidedToMe, ToMe
from elip_models.towers import as_tower
from elip_models.towers.attention_rows import with_cls
from tests.helpers.towers import clip_vit, images, plain_vit, text


def run(model, x, t=None, **options):
    """Return the tokens, and a `StageInfo` per step."""
    strategy = GuidedToMe(**{"r": 4} | options)
    return elip_models.encode_image(model, x, t, strategy=strategy, return_info=True)


def entered(tower, x, infos):
    """Return the tokens that enter each block of a run."""
    found, tokens, sizes = [], tower.embed(x), None
    for i, info in enumerate(infos):
        found.append(tokens)
        bias = None if sizes is None else sizes.log()[:, None, None]
        tokens = tower.attend(i, tokens, bias)
        source, old = info.reduction.source_map().to(tokens.dtype), sizes
        weight = source if old is None else source * old[:, None]
        tokens = tower.mlp(i, weight @ tokens / weight.sum(2, keepdim=True))
        sizes = info.sizes
    return found, tokens


def merged_away(info):
    """Return (B, N/2) bool over the tokens of set A."""
    N = info.reduction.slots.shape[1]
    return info.reduction.slots[:, ::2] >= info.reduction.num_rows - N // 2


@pytest.mark.parametrize("make", [plain_vit, clip_vit])
@torch.no_grad()
def test_the_most_attended_tokens_are_not_merged_away(make):
    model, x, t = make().eval(), images(4), text(4)
    tower = as_tower(model)
    tokens, infos = run(model, x, t, r=5, protect=0.4, fusion=0.3)
    before, after = entered(tower, x, infos)
    torch.testing.assert_close(tower.finish(after), tokens, atol=1e-5, rtol=1e-5)
    disturbed = 0
    for i, (info, found) in enumerate(zip(infos, before, strict=True)):
        query = 0.3 * found[:, 0] + 0.7 * t
        row = tower.attention_map(i, with_cls(found, query))[:, :, 0].mean(1)[:, 1:]
        bar = row.sort(1, descending=True).values[:, int(0.4 * row.shape[1]) - 1, None]
        is_protected = torch.cat([row[:, :1] < 0, row >= bar], dim=1)[:, ::2]
        free = (~is_protected).sum(1) - 1  # CLS aside
        assert ((merged_away(info) & is_protected).sum(1) == (5 - free).clamp(min=0)).all()
        metric = tower.qkv(i, found)[1].mean(1)
        _, _, plain = elip_kernels.bipartite_merge(found, metric, 5, return_info=True)
        disturbed += int((plain.slots != info.reduction.slots).sum())
    assert disturbed > 0


def test_without_protection_it_is_tome():
    model, x, t = plain_vit().eval(), images(), text()
    plain = elip_models.encode_image(model, x, strategy=ToMe(4))
    assert torch.equal(run(model, x, t, protect=0.0)[0], plain)
    assert not torch.equal(run(model, x, t)[0], plain)
    assert not torch.equal(run(model, x, t, protect=0.0, weight=1.0)[0], plain)


def test_the_text_decides_to_the_degree_of_fusion():
    model, x = plain_vit().eval(), images()
    one, other = text(), text()

    def slots(t, **options):
        return torch.cat([i.reduction.slots for i in run(model, x, t, **options)[1]], dim=1)

    assert not torch.equal(slots(one, fusion=0.0), slots(other, fusion=0.0))
    assert torch.equal(slots(one, fusion=1.0), slots(other, fusion=1.0))
    assert torch.equal(slots(one, fusion=1.0), slots(None))
    far = {"fusion": 0.5, "guidance_norm": "match"}
    assert torch.equal(slots(1e3 * one, **far), slots(one, **far))
