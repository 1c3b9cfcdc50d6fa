"""Calls that return the tokens of several blocks, on a reduced model."""

import pytest
import timm
import torch

import elip_models
from elip_models import ToMe, reduce_
from elip_models.strategies.token_assignment import Slots
from elip_models.towers import as_tower
from tests.helpers.models import PAIRS, ROTARY, TOWERS, WITHOUT_CLS, output
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.tiers import slow_except, tiered
from tests.helpers.towers import (
    SCHEDULE,
    WIDTH,
    images,
    plain_vit,
    text,
)

STRATEGIES = {
    "elip": {"schedule": SCHEDULE},
    "dropping": {"schedule": SCHEDULE, "merge": "none"},
    "evit": {"strategy": "evit"},
    "tome": {"strategy": "tome:r=3"},
    "nearest": {"schedule": SCHEDULE, "merge": "nearest"},
}
EXACT = {"atol": 1e-11, "rtol": 1e-11}
TIMM = [name for name in TOWERS if name.startswith("timm")]
HF_TOWERS = TOWERS | WITHOUT_CLS
HF = [name for name in HF_TOWERS if name.startswith("HF")]


def layers(model, x, **options):
    """Return the final tokens of a timm model, and those after each block, (B, N0, D)."""
    out, found = model.forward_intermediates(
        x, output_fmt="NLC", return_prefix_tokens=True, **options
    )
    return out, [torch.cat([prefix, patches], dim=1) for patches, prefix in found]


def own_streams(model, x):
    """Return the patches after each block of a reduced timm model, (B, N0, D), by hand.

    In a plain forward, every patch adds up the changes of the tokens that it is part of: in
    attention, before `evit` and `tome` merge, and in the MLP or the whole block after the step.
    """
    tower, seen = as_tower(model), {}
    for i, block in enumerate(model.blocks):  # a scorer may read a norm before the block runs
        for name in ("norm1", "norm2"):
            norm, key = getattr(block, name), (i, name)
            norm.register_forward_pre_hook(lambda _, args, key=key: seen.update({key: args[0]}))
        block.register_forward_hook(lambda _, __, out, i=i: seen.update({(i, "out"): out}))
    with elip_models.record_stages(model) as infos:
        model(x)
    steps = {info.stage.first: info.reduction for info in infos}
    stream, slots, grids = seen[0, "norm1"], Slots(torch.arange(37).expand(2, -1), 37, False), []
    for i in range(len(model.blocks)):
        entered, before_mlp, left = (seen[i, name] for name in ("norm1", "norm2", "out"))
        in_block = i in steps and entered.shape != before_mlp.shape
        if i in steps and not in_block:
            slots = slots.after(steps[i])
        middle = tower.attend(i, entered) if in_block else left
        stream = stream + slots.unmerged(middle - entered)
        if in_block:
            slots = slots.after(steps[i])
            stream = stream + slots.unmerged(left - before_mlp)
        grids.append(stream)
    return grids


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_patch_of_a_grid_changes_as_its_token_does(strategy):
    settings = STRATEGIES[strategy]
    settings |= {"proportional": False} if strategy == "tome" else {}
    model, x = reduce_(plain_vit().double().eval(), **settings), images().double()
    _, grids = layers(model, x)
    assert [grid.shape for grid in grids] == 6 * [(2, 37, WIDTH)]
    assert len(grids[-1][0].unique(dim=0)) == 37
    torch.testing.assert_close(grids, own_streams(model, x), **EXACT)


def test_patches_that_do_not_merge_are_exact_and_merged_ones_differ_as_before_the_merge():
    """The last block merges between its attention, which is dense, and its MLP."""
    model, x = plain_vit().double().eval(), images().double()
    _, dense = layers(model, x)
    reduce_(model, ToMe((0, 0, 0, 0, 0, 9)))
    with elip_models.record_stages(model) as infos:
        _, grids = layers(model, x)
    slots, sizes = infos[-1].reduction.slots.long(), infos[-1].sizes
    is_alone = sizes.gather(1, slots) == 1
    assert is_alone.sum(1).lt(28).all() and is_alone[:, 0].all()
    for grid, expected in zip(grids[:5], dense[:5], strict=True):
        assert torch.equal(grid, expected)
    torch.testing.assert_close(grids[5][is_alone], dense[5][is_alone], **EXACT)
    attended = as_tower(model).attend(5, dense[4])
    for grid, before, rows in zip(grids[5], attended, slots, strict=True):
        for row in rows.unique():
            one, *others = (rows == row).nonzero()[:, 0]
            for other in others:
                gap = before[other] - before[one]
                torch.testing.assert_close(grid[other] - grid[one], gap, **EXACT)


@pytest.mark.parametrize("name", [*TIMM, *tiered(list(ROTARY), ["EVA-02 tiny"])])
def test_the_input_of_the_head_stays_the_same(name):
    make = TOWERS.get(name) or ROTARY[name]
    model, x = reduce_(make().double().eval(), schedule=SCHEDULE), images().double()
    final, grids = layers(model, x, norm=True)
    assert torch.equal(final, grids[-1])
    torch.testing.assert_close(model.forward_head(final), model(x), **EXACT)


HF_CASES = [(library, strategy) for library in HF for strategy in STRATEGIES]
for name in ("HF DeiT", "HF DINOv2 registers"):
    HF_CASES.remove((name, "tome"))  # which protects one prefix token
for name in WITHOUT_CLS:
    HF_CASES.remove((name, "evit"))  # which needs a CLS token
    HF_CASES.remove((name, "dropping"))  # which would change what its probe reads


HF_QUICK = [case for case in HF_CASES if case[0] == "HF CLIP" or case[1] == "nearest"]


@UNGUIDED
@pytest.mark.parametrize(
    ("library", "strategy"),
    tiered(HF_CASES, HF_QUICK),
)
def test_hidden_states_of_transformers_are_whole_grids(library, strategy):
    model, x = HF_TOWERS[library]().double().eval(), images().double()
    dense = model(x, output_hidden_states=True).hidden_states
    reduce_(model, **STRATEGIES[strategy])
    with elip_models.guidance(model, text().double()):
        got, plain = model(x, output_hidden_states=True), output(model, x)
    assert [h.shape for h in got.hidden_states] == [h.shape for h in dense]
    assert torch.equal(got.hidden_states[0], dense[0])
    assert not torch.equal(got.hidden_states[-1], dense[-1])
    key = next(n for n in ("image_embeds", "logits", "pooler_output") if n in got)
    torch.testing.assert_close(got[key], plain, **EXACT)
    elip_models.unreduce_(model)
    again = model(x, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(again, dense, strict=True))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_get_intermediate_layers_and_features_only_give_grids():
    model, x = reduce_(plain_vit().eval(), schedule=SCHEDULE), images()
    _, grids = layers(model, x)
    tokens = model.get_intermediate_layers(x, n=2)
    assert all(torch.equal(a, b[:, 1:]) for a, b in zip(tokens, grids[-2:], strict=True))
    kept = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=48, depth=6)
    reduce_(kept.eval(), keep=0.6)
    assert [tuple(grid.shape) for grid in kept(x)] == 3 * [(2, 192, 3, 3)]
    assert elip_models.is_reduced(kept)
    assert not elip_models.is_reduced(elip_models.unreduce_(kept))


@UNGUIDED
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_open_clip_gives_grids_alone_and_whole(strategy):
    model, x = reduce_(PAIRS["open_clip pair"]().eval(), **STRATEGIES[strategy]), images()
    out = model.forward_intermediates(x, image_output_extra_tokens=True)
    assert {tuple(grid.shape) for grid in out["image_intermediates"]} == {(2, WIDTH, 6, 6)}
    torch.testing.assert_close(out["image_features"], model.encode_image(x, normalize=True))
    alone = model.visual.forward_intermediates(x)["image_intermediates"]
    assert all(map(torch.equal, alone, out["image_intermediates"]))


@pytest.mark.parametrize("strategy", slow_except([], ["elip", "tome"]))
def test_a_call_for_grids_compiles_in_one_graph(strategy):
    torch._dynamo.reset()
    settings = dict(STRATEGIES[strategy])
    settings |= {"schedule": "1(100%) 1(50%)"} if "schedule" in settings else {}
    model, x = reduce_(plain_vit(depth=2).eval(), **settings), images()

    def run(x):
        return model.forward_intermediates(x, output_fmt="NLC")

    final, grids = torch.compile(run, fullgraph=True, backend="eager")(x)
    expected, others = run(x)
    torch.testing.assert_close([final, *grids], [expected, *others])
    assert torch.compile(model, fullgraph=True, backend="eager")(x).shape == (2, 5)


@UNGUIDED
def test_calls_that_would_return_wrong_grids_raise_an_error():
    siglip, x = WITHOUT_CLS["HF SigLIP vision"]().eval(), images()
    reduce_(siglip, schedule=SCHEDULE, merge="none")
    assert siglip(x, output_hidden_states=True).hidden_states  # unguided, it is dense
    with (
        elip_models.guidance(siglip, text()),
        pytest.raises(ValueError, match="that pools the kept ones"),
    ):
        siglip(x, output_hidden_states=True)
    pooled = reduce_(plain_vit(global_pool="avg").eval(), schedule=SCHEDULE, merge="none")
    with pytest.raises(ValueError, match="that pools the kept ones"):
        pooled.forward_intermediates(x)
    smaller = reduce_(plain_vit(), strategy="resize:size=32")
    with pytest.raises(ValueError, match=r"forward_intermediates.*unreduce_"):
        smaller.forward_intermediates(x)
    smaller = reduce_(TOWERS["HF CLIP"]().eval(), strategy="resize:size=32")
    with pytest.raises(ValueError, match=r"output_hidden_states.*unreduce_"):
        smaller(x, output_hidden_states=True)
