"""A strategy of a user, outside the package, works everywhere that built-in ones do."""

import copy
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import pytest
import torch

import elip_models
from elip_models.strategies import flops
from elip_models.strategies.elip import Staged
from elip_models.strategies.schedule import PAPER, Schedule, Stage
from elip_models.strategies.strategy import StageInfo, Strategy, TokenCounts
from elip_models.strategies.summary import Summary
from elip_models.towers import as_tower
from elip_models.towers.merge import Merge
from examples.own_strategy import Longest
from tests.helpers.models import TOWERS, eva, output, siglip_vision
from tests.helpers.tiers import tiered
from tests.helpers.towers import (
    SCHEDULE,
    assert_equal_gradients,
    gradients,
    images,
    plain_vit,
    text,
)


@dataclass(frozen=True)
class Darkest(Staged):
    """Keep the patches with the smallest mean, by a schedule; it defines a score alone."""

    name: ClassVar[str] = "darkest"
    schedule: Schedule = PAPER
    merge: Merge = "one"

    def score(self, tower, stage, tokens, text):
        return -tokens.detach().mean(dim=2)


@dataclass(frozen=True)
class Lucky(Strategy):
    """Keep random patches in place of a block; a recomputation must not draw again."""

    name: ClassVar[str] = "lucky"
    replaces_block: ClassVar[bool] = True
    keep_ratio: float = 0.5

    def stages(self, size):
        keep = max(1, int(self.keep_ratio * size.num_patches))
        return (Stage(2, size.depth - 2, keep),) if keep < size.num_patches else ()

    def token_counts(self, size):
        keep = max(1, int(self.keep_ratio * size.num_patches))
        left = size.num_prefix_tokens + keep
        after = [size.num_tokens] * 2 + [left] * (size.depth - 2)
        before = [size.num_tokens] * 3 + [left] * (size.depth - 3)
        return tuple(map(TokenCounts, before, after))

    def step(self, tower, stage, tokens, context):
        replay = context.replay
        row = torch.rand(tokens.shape[:2]) if replay is None else replay.attention
        tokens = tower.attend(stage.first, tokens)
        tokens, reduction = tower.reduce(tokens, row, stage.keep, merge="none")
        return tower.mlp(stage.first, tokens), StageInfo(stage, reduction, row)

    def at_strength(self, size, strength):
        return replace(self, keep_ratio=1 - strength * (1 - 1.5 / size.num_patches))


OWN = {"longest": Longest(0.5, first=2), "darkest": Darkest(SCHEDULE), "lucky": Lucky()}
own = pytest.mark.parametrize("strategy", OWN.values(), ids=OWN)
EVERY = TOWERS | {"rotary": eva, "HF SigLIP": siglip_vision}


@pytest.mark.parametrize(
    ("library", "name"),
    tiered(product(EVERY, OWN), product(["timm", "open_clip", "HF CLIP"], OWN)),
)
def test_every_tower_is_reduced_by_it(library, name):
    model, strategy, x = EVERY[library]().eval(), OWN[name], images()
    dense = output(model, x)
    tokens, infos = elip_models.encode_image(model, x, strategy=strategy, return_info=True)
    size = as_tower(model).size
    assert tokens.shape[1] == strategy.token_counts(size)[-1].mlp < size.num_tokens
    assert [info.stage for info in infos] == list(strategy.stages(size))
    torch.manual_seed(1)
    reduced = output(elip_models.reduce_(model, strategy=strategy), x)
    torch.manual_seed(1)
    assert torch.equal(output(copy.deepcopy(model), x), reduced)
    assert reduced.shape == dense.shape and not torch.allclose(reduced, dense)
    assert torch.equal(output(elip_models.unreduce_(model), x), dense)


@own
def test_what_is_recomputed_chooses_the_same(strategy):
    model, x = elip_models.reduce_(plain_vit(), strategy=strategy), images()
    found = []
    for checkpointed in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointed)
        torch.manual_seed(2)
        model(x).square().sum().backward()
        found.append(gradients(model))
    assert_equal_gradients(*found)


@own
def test_keep_and_at_flops_work_as_for_built_in_strategies(strategy):
    model = plain_vit()
    size = as_tower(model).size
    fair = strategy.at_flops(model, 0.75)
    assert flops.training_ratio(fair, size) == pytest.approx(0.75, rel=0.01)
    elip_models.reduce_(model, strategy=strategy.at_keep(model, 0.8))
    summary = elip_models.reduction_summary(model)
    assert isinstance(summary, Summary) and summary.keep == pytest.approx(0.8, abs=0.02)
    assert strategy.name in str(summary) and strategy.name in repr(model)


@pytest.mark.slow
def test_it_compiles_in_one_graph():
    model, x = elip_models.reduce_(plain_vit().eval(), strategy=Lucky()), images()
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected)


def test_token_counts_that_are_not_what_the_step_leaves_are_an_error():
    class Wrong(Longest):
        def token_counts(self, size):
            return (TokenCounts(size.num_tokens, size.num_tokens),) * size.depth

    with pytest.raises(ValueError, match="expected 'longest' to leave 37 tokens at block 1, the"):
        elip_models.encode_image(plain_vit(), images(), text(), strategy=Wrong())
