"""The measure `selection` of a study, on scenes with known answers."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from benchmarks.studies.named_patches import kept_patches, selection_scores
from elip_kernels import ReductionInfo
from elip_models.pretraining.data import EmojiScenes, train_tokenizer
from elip_models.pretraining.models.registry import create_model, family_of
from elip_models.strategies.elip import Staged
from elip_models.strategies.schedule import Schedule, Stage
from elip_models.strategies.strategy import StageInfo
from elip_models.towers.merge import Merge
from tests.helpers.models import enlarged

COUNT, KEEP, PATCHES = 24, 32, 64
HALF = Schedule.parse("1(100%) 2(50%)")
SMALL = {"vision_depth": 3, "schedule": str(HALF), "text_depth": 2}


@pytest.fixture(scope="module")
def source():
    return EmojiScenes(COUNT, seed=2, clutter=4, textures=True)


@pytest.fixture(scope="module")
def tokenizer(source):
    return train_tokenizer((text for i in range(COUNT) for text in source.captions(i)), 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    fields = family_of("elip_clip_tiny").fit_tokenizer(tokenizer, 32)
    return enlarged(create_model("elip_clip_tiny", **SMALL, **fields)).eval()


@dataclass(frozen=True)
class KnownScores(Staged):
    """A strategy that keeps tokens by fixed scores, one row for each image."""

    name: ClassVar[str] = "known_scores"
    rows: ClassVar[Tensor]

    schedule: Schedule = HALF
    merge: Merge = "one"

    def score(self, tower, stage, tokens, text):
        """Return the fixed scores, with 0 for CLS."""
        return torch.cat([torch.zeros(len(self.rows), 1), self.rows], dim=1)


def scores_of(model, source, tokenizer, strategy, monkeypatch):
    monkeypatch.setattr(model, "reduction", strategy)
    with torch.no_grad():
        return selection_scores(model, source, tokenizer)


@pytest.mark.parametrize("merge", ["one", "none"])
@pytest.mark.parametrize(("sign", "kept"), [(1, 1.0), (-1, 0.0)])
def test_scores_equal_to_the_mask_keep_all_named_patches_and_opposite_ones_none(
    model, source, tokenizer, monkeypatch, merge, sign, kept
):
    masks = (source.named_mask(i, i % 5).reshape(8, 8, 8, 8) for i in range(COUNT))
    named = torch.stack([torch.tensor(mask.mean((1, 3)).ravel() >= 0.25) for mask in masks])
    assert named.sum(1).min() > 0 and named.sum(1).max() <= KEEP
    strategy = type("Known", (KnownScores,), {"rows": sign * named.float()})(merge=merge)
    scores = scores_of(model, source, tokenizer, strategy, monkeypatch)
    assert scores["last.kept"] == kept and scores["last.kept_chance"] == KEEP / PATCHES
    assert scores["lost"] > 0


def test_kept_patches_are_traced_through_the_stages():
    """Trace eight patches through two stages.

    The second stage keeps the merged token of the first too, and its second slot is padding.
    """
    weights = torch.zeros(1, 9), torch.zeros(1, 6)
    first = ReductionInfo(torch.tensor([[1, 3, 4, 8]]), weights[0], None)
    mask = torch.tensor([[True, True, False, True, True]])
    second = ReductionInfo(torch.tensor([[2, 3, 5]]), weights[1], mask)
    infos = [StageInfo(Stage(i, 1, 0), info) for i, info in enumerate((first, second))]
    kept = [patches[0].nonzero().flatten().tolist() for patches in kept_patches(infos, 8)]
    assert kept == [[0, 2, 3, 7], [2]]
