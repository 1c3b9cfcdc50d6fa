"""The option `reach` of ToMe and its relatives: near patches merge first."""

import math

import pytest
import torch

import elip_models
from elip_models import ToMe
from elip_models.strategies.nearness import patch_places, with_nearness
from elip_models.towers import as_tower
from tests.helpers.models import TOWERS, dinov2, naflex, siglip_vision
from tests.helpers.tiers import slow_except
from tests.helpers.towers import assert_equal_gradients, gradients, images, plain_vit

MODELS = {
    "square": plain_vit,
    "wide": lambda: plain_vit(img_size=(48, 80)),
    "registers": lambda: plain_vit(img_size=(64, 48), reg_tokens=3),
    "no prefix": siglip_vision,
    "rotary": TOWERS["HF DINOv3"],
}
GRIDS = {"wide": (6, 10), "registers": (8, 6)}
REACH = 2.5


def similarity(a, b, place_a, place_b, grid):
    """The formula of `nearness.py` for two tokens."""
    w = math.pi / max(*grid, REACH)
    loss = sum(1 - math.cos(w * (s - t)) for s, t in zip(place_a, place_b, strict=True))
    return torch.cosine_similarity(a, b, dim=0) - loss / (1 - math.cos(w * REACH))


def place_of(patches, grid):
    """The mean row and column of patches."""
    rows, columns = zip(*(divmod(patch, grid[1]) for patch in patches), strict=True)
    return sum(rows) / len(rows), sum(columns) / len(columns)


def merged_by_hand(tower, image, merges, grid):
    """Run the tower on one image, with merges between attention and MLP; return tokens, groups."""
    p, tokens = tower.num_prefix_tokens, tower.embed(image)
    groups = [[] for _ in range(p)] + [[n] for n in range(tower.num_patches)]
    for i, r in enumerate(merges):
        sizes = torch.tensor([float(max(1, len(group))) for group in groups]).double()
        (tokens,) = tower.attend(i, tokens, sizes.log()[None, None, None])
        first = max(p - 1, 0)
        of_a, of_b = range(first, len(tokens), 2), range(first + 1, len(tokens), 2)
        partners = []
        for a in of_a:
            if a >= p:
                place = place_of(groups[a], grid)
                found = [
                    (similarity(tokens[a], tokens[b], place, place_of(groups[b], grid), grid), b)
                    for b in of_b
                ]
                partners.append((*max(found), a))
        into = {a: b for _, b, a in sorted(partners)[len(partners) - r :]}
        rows = [*range(first), *(a for a in of_a if a not in into), *of_b]
        rows = rows if r else range(len(tokens))  # without merges, tokens stay in order
        members = {row: [row] for row in rows}
        for a, b in into.items():
            members[b].append(a)
        parts = [members[row] for row in rows]
        tokens = torch.stack([(tokens[m] * sizes[m, None]).sum(0) / sizes[m].sum() for m in parts])
        groups = [[patch for n in m for patch in groups[n]] for m in parts]
        tokens = tower.mlp(i, tokens[None])
    return tower.finish(tokens)[0], groups


def distance_of_merged(infos, grid):
    """The mean distance of patches from the place of their token."""
    slots = None
    for info in infos:
        step = info.reduction.slots.long()
        slots = step if slots is None else step.gather(1, slots)
    p = slots.shape[1] - math.prod(grid)
    patches = torch.cartesian_prod(*map(torch.arange, grid)).double().expand(len(slots), -1, -1)
    rows = slots[:, p:, None].expand(-1, -1, 2)
    places = torch.zeros(len(slots), slots.shape[1], 2).double()
    places = places.scatter_reduce(1, rows, patches, "mean", include_self=False)
    return (places.gather(1, rows) - patches).norm(dim=2).mean()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "rotary"])
@torch.no_grad()
def test_partners_are_those_of_the_formula_in_every_block(name):
    model, grid = MODELS[name]().double().eval(), GRIDS.get(name, (6, 6))
    tower, strategy = as_tower(model), ToMe((6, 0, 5, 0, 4, 3), compare="tokens", reach=REACH)
    x = torch.randn(2, 3, *tower.image_size).double()
    found = elip_models.encode_image(model, x, strategy=strategy)
    for tokens, image in zip(found, x, strict=True):
        expected, groups = merged_by_hand(tower, image[None], strategy.r, grid)
        assert max(map(len, groups)) > 2
        torch.testing.assert_close(tokens, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_shorter_reach_merges_nearer_patches(name):
    model, grid = MODELS[name]().eval(), GRIDS.get(name, (6, 6))
    tower, distances = as_tower(model), []
    x = torch.randn(2, 3, *tower.image_size)
    for reach in (0.5, 3.0, None):
        strategy = ToMe(4, reach=reach)
        _, infos = elip_models.encode_image(model, x, strategy=strategy, return_info=True)
        distances.append(distance_of_merged(infos, grid))
    assert distances[0] < distances[1] < distances[2]


def test_bf16_tokens_have_the_places_of_fp32():
    """As fp32 keys they would be matched alike, since places are computed in fp32."""
    metric = torch.randn(2, 37, 8).bfloat16()
    places = patch_places((6, 6), 1, metric).expand(2, -1, -1)
    low = with_nearness(metric, places, (6, 6), REACH)
    assert low.dtype == torch.float32
    assert torch.equal(low, with_nearness(metric.float(), places, (6, 6), REACH))


def test_unknown_places_raise_an_error():
    other = torch.randn(1, 3, 64, 64)
    model = elip_models.reduce_(dinov2().eval(), "merge", reach=3)
    with pytest.raises(ValueError, match=r"reach: expected images of 48 x 48 pixels.*got 64 patch"):
        model(other)
    elip_models.reduce_(model, "merge")(other)
    with pytest.raises(TypeError, match="reach: images of one batch may have other grids"):
        elip_models.reduce_(naflex(), "merge", reach=3)
    with pytest.raises(ValueError, match="reach"):
        ToMe(reach=0)


@pytest.mark.parametrize("strategy", ["merge", "tome", "guided_tome", "resize_merge:size=40"])
def test_checkpoints_repeat_the_merges(strategy):
    model, x = plain_vit(), images()
    elip_models.reduce_(model, strategy, reach=2)
    found = []
    for checkpoint in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpoint)
        model(x).square().sum().backward()
        found.append(gradients(model))
    assert_equal_gradients(*found, atol=1e-6, rtol=1e-5)
    model.set_grad_checkpointing(False)


@pytest.mark.parametrize("strategy", slow_except([], ["merge", "resize_merge:size=40"]))
def test_a_model_with_reach_compiles_in_one_graph(strategy):
    torch._dynamo.reset()
    model, x = elip_models.reduce_(plain_vit().eval(), strategy, reach=2), images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
