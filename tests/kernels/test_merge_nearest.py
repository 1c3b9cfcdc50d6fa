"""merge_nearest as users call it, and merge='nearest' of the strategies that select."""

from dataclasses import dataclass

import pytest
import torch
import torch._dynamo.testing

import elip_models
from elip_kernels import merge_nearest, select_tokens
from elip_models import ELIP, EViT, RandomPruning
from elip_models.strategies.elip import Staged
from elip_models.strategies.schedule import Schedule
from elip_models.towers import as_tower
from elip_models.towers.merge import Merge
from tests.helpers.models import TOWERS, eva
from tests.helpers.towers import SCHEDULE, images, plain_vit, text

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(B=2, N=13, D=6, C=8, K=4, p=1, dtype=torch.float32):
    """Return tokens, kept, metric, size; sizes are 1 to 5."""
    kept = torch.rand(B, N - p).topk(K).indices + p
    size = torch.randint(1, 6, (B, N)).float()
    return torch.randn(B, N, D).to(dtype), kept, torch.randn(B, N, C).to(dtype), size


def definition(tokens, kept, metric, size, p, real=None):
    """Compute rows, sizes and slots of one image with Python lists; None is a row of padding."""
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    N, kept = len(tokens), kept.tolist()
    real = set(range(N)) if real is None else set(real.nonzero().flatten().tolist())
    targets = [k for k, n in enumerate(kept) if n in real]
    slots = {n: n for n in range(p)} | {kept[k]: p + k for k in targets}
    for n in (real | set(kept)) - slots.keys():
        _, best = max((float(unit[n] @ unit[kept[k]]), -k) for k in targets)
        slots[n] = p - best
    rows, sizes = [], []
    for row in range(p + len(kept)):
        held = [n for n in real if slots[n] == row]
        sizes.append(sum((float(size[n]) for n in held), 0.0))
        total = sum((tokens[n].double() * size[n] for n in held), torch.zeros_like(tokens[0]))
        rows.append(total / max(sizes[-1], 1e-9))
    return torch.stack(rows), torch.tensor(sizes), slots


@pytest.mark.parametrize("p", [0, 1, 3])
@pytest.mark.parametrize(("N", "K"), [(4, 1), (13, 4), (13, 9), (50, 20)])
def test_is_the_definition(N, K, p):
    tokens, kept, metric, size = inputs(N=N, K=K, p=p)
    options = {"num_prefix_tokens": p, "return_info": True}
    merged, sizes, info = merge_nearest(tokens, kept, metric, size=size, **options)
    assert merged.shape[1] == info.num_rows == p + K
    for b in range(2):
        rows, totals, slots = definition(tokens[b], kept[b], metric[b], size[b], p)
        torch.testing.assert_close(merged[b].double(), rows, atol=1e-6, rtol=0)
        assert torch.equal(sizes[b], totals)
        assert info.slots[b].tolist() == [slots[n] for n in range(N)]
    assert torch.equal(info.kept, kept) and not info.merged and info.mask is None
    source = info.source_map()
    expected = info.weights[:, None] * source
    torch.testing.assert_close(expected @ tokens, merged)
    torch.testing.assert_close(expected.sum(2), torch.ones(2, p + K))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_padding_is_neither_kept_nor_merged(bad):
    tokens, _, metric, size = inputs(B=3, N=13, D=6)
    mask = torch.rand(3, 13) < 0.6
    mask[:, 0] = mask[:, 4] = True
    mask[1, 1:] = torch.arange(12) < 3  # fewer real tokens than kept
    tokens[~mask] = metric[~mask] = bad
    kept = select_tokens(torch.rand(3, 13), 5, mask=mask)
    leaf = tokens.requires_grad_()
    merged, sizes, info = merge_nearest(leaf, kept, metric, size=size, mask=mask, return_info=True)
    for b in range(3):
        rows, totals, _ = definition(tokens[b], kept[b], metric[b], size[b], 1, mask[b])
        torch.testing.assert_close(merged[b].double(), rows, atol=1e-6, rtol=0)
        assert torch.equal(sizes[b], totals)
    assert torch.equal(info.mask, sizes > 0)
    assert info.mask.sum(1)[1] == 4
    merged.sum().backward()
    assert torch.equal(leaf.grad.abs().sum(2) > 0, mask)
    ones = merge_nearest(leaf, kept, metric, mask=mask)[1]
    assert torch.equal(ones.sum(1), mask.sum(1).float())


def test_ties_go_to_the_lower_row_and_no_prefix_token_is_joined():
    metric = torch.ones(1, 9, 4)
    kept = torch.tensor([[6, 3, 8]])
    info = merge_nearest(torch.randn(1, 9, 2), kept, metric, return_info=True)[2]
    assert info.slots.tolist() == [[0, 1, 1, 2, 1, 1, 1, 1, 3]]
    metric[:, 1] = 1 + 1e-3 * torch.arange(4)
    metric[:, 8] = metric[:, 1]
    info = merge_nearest(torch.randn(1, 9, 2), kept, metric, return_info=True)[2]
    assert info.slots.tolist() == [[0, 3, 1, 2, 1, 1, 1, 1, 3]]


@pytest.mark.parametrize("bad", [NAN, 0.0, 1e30, INF])
def test_a_metric_without_direction_ranks_last(bad):
    tokens, kept, metric, _ = inputs(N=9, K=3)
    kept[:] = torch.tensor([2, 5, 7])
    metric[:, 2] = metric[:, 4] = bad
    info = merge_nearest(tokens, kept, metric, return_info=True)[2]
    assert (info.slots[:, 4] == 1).all()  # the first kept token, which has no direction either
    assert ((info.slots == 1).sum(1) == 2).all()  # no other token joins it
    metric[:] = bad
    assert (merge_nearest(tokens, kept, metric)[1] == torch.tensor([1, 6, 1, 1])).all()


@pytest.mark.parametrize("with_size", [True, False])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients_in_fp64(check, with_size):
    tokens, kept, metric, size = inputs(N=8, D=2, dtype=torch.float64)
    size, mask = size.double() if with_size else None, torch.rand(2, 8) < 0.8
    kept = select_tokens(torch.rand(2, 8), 4, mask=mask)
    for real in (None, mask):
        assert check(
            lambda t, real=real: merge_nearest(t, kept, metric, size=size, mask=real)[0].square(),
            (tokens.requires_grad_(),),
        )


MODELS = {name: TOWERS[name] for name in ("timm", "timm q/k norm", "open_clip", "HF CLIP")}
MODELS |= {"rotary": eva, "rotary q/k norm": lambda: eva(qk_norm=True)}


STRATEGIES = {
    "elip": ELIP(SCHEDULE, merge="nearest"),
    "exact": ELIP(SCHEDULE, scorer="exact", merge="nearest"),
    "random": RandomPruning(SCHEDULE, merge="nearest", proportional=True),
    "evit": EViT(0.7, layers=(1, 3), merge="nearest"),
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_every_patch_is_part_of_one_token_and_counts_once(strategy):
    model, x, t = plain_vit().eval(), images(), text()
    tower, source = as_tower(model), None
    tokens, infos = elip_models.encode_image(model, x, t, strategy=strategy, return_info=True)
    dropping = (
        ELIP(SCHEDULE, merge="none") if strategy.name != "evit" else EViT(0.7, (1, 3), True, "none")
    )
    assert strategy.token_counts(tower.size) == dropping.token_counts(tower.size)
    assert tokens.shape[1] == strategy.token_counts(tower.size)[-1].mlp
    for info in infos:
        source = info.reduction.source_map(source)
    assert (source.sum(1) == 1).all()
    assert torch.equal(infos[-1].sizes, source.sum(2).float())
    assert torch.equal(source[:, 0], torch.arange(37).expand(2, -1) == 0)  # CLS is not merged
    assert infos[-1].sizes.max() > 2


@dataclass(frozen=True)
class UpperHalf(Staged):
    """Keep the first patches."""

    name = "upper half"
    schedule: Schedule = SCHEDULE
    merge: Merge = "nearest"
    proportional: bool = False

    def score(self, tower, stage, tokens, text):
        return torch.arange(tokens.shape[1], 0, -1.0, dtype=tokens.dtype).expand(len(tokens), -1)


@pytest.mark.parametrize("proportional", [True, False])
def test_attention_in_proportion_loses_nothing_of_patches_that_are_the_same(proportional):
    """The lower half of the image repeats the upper half, without position embeddings."""
    model, x = plain_vit().double().eval(), images().double()
    torch.nn.init.zeros_(model.pos_embed)
    x[:, :, x.shape[2] // 2 :] = x[:, :, : x.shape[2] // 2]
    dense = model(x)
    elip_models.reduce_(model, strategy=UpperHalf("2(100%) 4(50%)", proportional=proportional))
    with elip_models.record_stages(model) as infos:
        error = (model(x) - dense).abs().max()
    assert infos[0].sizes[0].tolist() == [1] + 18 * [2]
    assert error < 1e-10 if proportional else error > 1e-3
