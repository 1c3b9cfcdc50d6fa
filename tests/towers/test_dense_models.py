"""Models whose heads read every patch: those of the table in docs/dense.md."""

import inspect
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import transformers

import elip_models
from elip_models.towers import as_tower
from elip_models.towers.tower_parts import part
from tests.helpers.models import enlarged
from tests.helpers.scripts import load_script
from tests.helpers.tiers import slow_except

dense = load_script(Path(__file__).parents[2] / "docs" / "dense.py")
ROWS = dict(
    line.strip("| ").split(" | ", 1)
    for line in dense.PAGE.read_text().splitlines()
    if line.startswith("|") and (" | yes | " in line or " | no | " in line)
)
WORKS = [name for name in dense.MODELS if ROWS[name].startswith("yes")]
UNBIASED = [name for name in WORKS if "BEiT" not in name and "Beit" not in name]
HEADS = [name for name in WORKS if "timm" not in name]
QUICK = (
    "`DPTForDepthEstimation`",
    "`UperNetForSemanticSegmentation`, DINOv3",
    "`VitPoseForPoseEstimation`",
    "`CLIPSegForImageSegmentation`",
    "timm ViT, `features_only=True`",
)
EXACT = {"atol": 1e-10, "rtol": 1e-10}
works = pytest.mark.parametrize("name", slow_except(QUICK, WORKS))


def model_of(name):
    """A model of the table in fp64, whose blocks change the tokens."""
    return enlarged(dense.made(name)).double().eval()


def outputs(model, x):
    """The floating-point tensors that a model returns, those inside of others as well."""
    if not isinstance(model, transformers.PreTrainedModel):
        dense_call = getattr(model, "forward_intermediates", model)
        return list(tensors_in(dense_call(x)))
    text = {"input_ids": torch.full((2, 6), 7), "attention_mask": torch.ones(2, 6).long()}
    takes_text = "input_ids" in inspect.signature(model.forward).parameters
    return list(tensors_in(tuple(model(pixel_values=x, **(text if takes_text else {})).values())))


def tensors_in(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        yield value
    for inner in value if isinstance(value, list | tuple) else ():
        yield from tensors_in(inner)


def images_of(model):
    tower = as_tower(model)
    config = getattr(model, "config", None)
    backbone = getattr(config, "backbone_config", None)
    return torch.randn(2, getattr(backbone, "num_channels", 3), *tower.image_size).double()


def outputs_and_gradients(model, x):
    """What a model returns, and the gradients of its parameters."""
    found = outputs(model, x)
    model.zero_grad()
    sum(each.square().mean() for each in found).backward()
    gradients = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    return [each.detach() for each in found], gradients


def in_pairs(model):
    """Make the patches of each pair equal, at one position, so that merging them is exact."""
    tower = as_tower(model)
    p, n = tower.num_prefix_tokens, tower.num_patches
    even = torch.arange(0, n, 2).repeat_interleave(2)
    places = torch.cat([torch.arange(p), even + p])
    tower.blocks[0].register_forward_pre_hook(lambda module, args: (args[0][:, places], *args[1:]))
    if tower.is_rotary:
        rope, table = tower.trunk.rope_embeddings, tower.trunk.rope_embeddings.forward
        rope.forward = lambda *args: tuple(t[even] for t in table(*args))
    if tower.adds_bias:
        for block in tower.blocks:
            table = part(block, tower.names.bias)
            table.forward = partial(bias_at, table.forward, places)


def bias_at(table, places, *args, **kwargs):
    return table(*args, **kwargs)[:, :, places][..., places]


@works
def test_merging_equal_patches_changes_no_output_and_no_gradient(name):
    model = model_of(name)
    x = images_of(model)
    in_pairs(model)
    tower = as_tower(model)
    expected, gradients = outputs_and_gradients(model, x)
    r = (0, 0, tower.num_patches // 2, 0, 0, 0)  # between the blocks that heads read
    elip_models.reduce_(model, elip_models.ToMe(r, compare="tokens"))
    with elip_models.record_stages(model) as infos:
        found, others = outputs_and_gradients(model, x)
    assert infos[-1].sizes.unique().tolist() == [1.0, 2.0][not tower.num_prefix_tokens :]
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(others, gradients, **EXACT)


class MergedByHand:
    """Hooks on the blocks of a dense model, which merge tokens and let patches change as theirs do.

    groups: for each image, the patches of each token, of which the first gives the position.
    grid, tokens: what entered the block that runs, in rows of patches and of tokens.
    """

    def __init__(self, tower, infos):
        self.prefix, self.blocks, self.groups = tower.num_prefix_tokens, tower.blocks, None
        self.steps = {info.stage.first: info.reduction for info in infos}

    def register(self):
        for i, block in enumerate(self.blocks):
            block.register_forward_pre_hook(partial(self.enter, i), with_kwargs=True)
            block.register_forward_hook(self.leave, prepend=True)  # before those of transformers

    def enter(self, i, block, args, kwargs):
        self.grid, *others = args
        if i == 0:
            self.groups = [[[n] for n in range(self.grid.shape[1])] for _ in self.grid]
            self.tokens = self.grid
        if i in self.steps:
            self.tokens = torch.stack([self.merged(i, b) for b in range(len(self.grid))])
        if "position_embeddings" in kwargs:
            patches = [[g[0] - self.prefix for g in each[self.prefix :]] for each in self.groups]
            tables = kwargs["position_embeddings"]
            tables = tuple(torch.stack([t[rows] for rows in patches])[:, None] for t in tables)
            kwargs = kwargs | {"position_embeddings": tables}
        return (self.tokens, *others), kwargs

    def merged(self, i, b):
        """Return the tokens that enter block i of image b: means over patches."""
        groups, step = self.groups[b], self.steps[i]
        kept = [*range(self.prefix), *step.kept[b].tolist()]
        slots = step.slots[b].tolist()
        members = [[n] for n in sorted(kept, key=slots.__getitem__)]
        for n in set(range(len(slots))) - set(kept):
            members[slots[n]].append(n)
        self.groups[b] = [[patch for n in parts for patch in groups[n]] for parts in members]
        patches = [[n for n in parts for _ in groups[n]] for parts in members]
        return torch.stack([self.tokens[b][each].mean(0) for each in patches])

    def leave(self, block, args, out):
        left = out[0] if isinstance(out, tuple) else out
        change, rows = left - self.tokens, []
        for groups, image in zip(self.groups, change, strict=True):
            token_of = {patch: t for t, group in enumerate(groups) for patch in group}
            rows.append(image[[token_of[patch] for patch in range(len(token_of))]])
        self.tokens, grid = left, self.grid + torch.stack(rows)
        return (grid, *out[1:]) if isinstance(out, tuple) else grid


def check_by_hand(model, x):
    """Check a reduced model by a dense one whose tokens are merged by hand."""
    schedule = "1(100%) 2(70%) 2(40%) 1(25%)"
    elip_models.reduce_(model, "elip", schedule=schedule, scorer="received", merge="nearest")
    with elip_models.record_stages(model) as infos:
        found, gradients = outputs_and_gradients(model, x)
    elip_models.unreduce_(model)
    MergedByHand(as_tower(model), infos).register()
    expected, others = outputs_and_gradients(model, x)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(gradients, others, **EXACT)


@pytest.mark.parametrize("name", slow_except(QUICK, UNBIASED))
def test_heads_read_what_a_dense_model_gives_whose_tokens_are_merged_by_hand(name):
    model = model_of(name)
    check_by_hand(model, images_of(model))


ANY_SIZE = (
    "`DepthAnythingForDepthEstimation`, DINOv2",
    "`UperNetForSemanticSegmentation`, DINOv2",
    "`UperNetForSemanticSegmentation`, DINOv3",
)


@pytest.mark.parametrize("name", slow_except(ANY_SIZE[:1], ANY_SIZE))
def test_wide_images_of_another_size_have_whole_grids(name):
    check_by_hand(model_of(name), torch.randn(2, 3, 40, 72).double())


@pytest.mark.parametrize("name", list(dense.MODELS)[::7])
def test_the_table_is_what_the_code_answers(name):
    assert dense.answer(name) == ROWS[name]


def test_the_table_has_every_model():
    assert list(ROWS) == list(dense.MODELS)


@pytest.mark.parametrize("name", slow_except(HEADS[::6], HEADS))
def test_a_model_whose_head_reads_a_grid_refuses_to_drop_patches(name):
    with pytest.raises(TypeError, match=ROWS[name].removeprefix("yes | ")):
        elip_models.reduce_(dense.made(name), "patch_dropout")


def test_the_counts_on_the_page_are_those_of_the_settings():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch14_dinov2", img_size=(336, 448))
    settings = ({"keep": 0.55}, {"keep": 0.55, "decrease": 0.5})
    for options, left in zip(settings, (76, 182), strict=True):
        summary = elip_models.reduction_summary(elip_models.reduce_(model, "merge", **options))
        assert summary.tokens[-1].mlp == left
        assert summary.keep == pytest.approx(0.55, abs=0.01)
        assert str(left) in dense.PAGE.read_text()
