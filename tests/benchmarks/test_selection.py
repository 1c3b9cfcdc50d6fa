"""`python -m benchmarks.selection`: what a reduction keeps, on scenes with known answers."""

import json
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.selection import deletion_insertion
from benchmarks.selection.deletion_insertion import POINTS, removal_areas
from benchmarks.selection.scores import (
    OF_A_STAGE,
    OF_THE_WHOLE,
    kept_patches,
    purity,
    selection_scores,
)
from elip_kernels import ReductionInfo
from elip_models.analysis.agreement import scorer_agreement
from elip_models.pretraining.data import (
    DataError,
    EmojiScenes,
    JsonSource,
    image_transform,
    train_tokenizer,
)
from elip_models.pretraining.models.registry import create_model, family_of
from elip_models.reduction.encode import run_tower
from elip_models.reduction.schedule import Schedule, Stage
from elip_models.reduction.strategies import PatchDropout
from elip_models.reduction.strategies.elip import ELIP, Staged
from elip_models.reduction.strategy import StageInfo
from elip_models.towers.merge import Merge
from tests.helpers.models import enlarged
from tests.helpers.programs import exit_status

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
    return enlarged(create_model("elip_clip_tiny", **SMALL, **fields))


def small(name, tokenizer):
    torch.manual_seed(0)
    fields = family_of(name).fit_tokenizer(tokenizer, 32)
    return create_model(name, vision_depth=3, schedule=str(HALF), **fields)


def named_patches(source) -> Tensor:
    """Return (COUNT, 64) bool: patches of which a quarter or more shows what the caption names."""
    masks = (source.named_mask(i, i % 5).reshape(8, 8, 8, 8) for i in range(COUNT))
    return torch.stack([torch.tensor(m.mean((1, 3)).ravel() >= 0.25) for m in masks])


def own_captions(source):
    return [source.captions(i)[i % 5] for i in range(COUNT)]


def images_of(source):
    transform = image_transform(64, train=False)
    return torch.stack([transform(source[i].image) for i in range(COUNT)])


@dataclass(frozen=True)
class Told(Staged):
    """A strategy that keeps tokens by given scores, one row for each image."""

    name: ClassVar[str] = "told"
    rows: ClassVar[Tensor]

    schedule: Schedule = HALF
    merge: Merge = "one"

    def score(self, tower, stage, tokens, text):
        """Return the given scores, with 0 for CLS."""
        return torch.cat([torch.zeros(len(self.rows), 1), self.rows], dim=1)


def told(model, source, tokenizer, rows, **options):
    strategy = type("Told", (Told,), {"rows": rows})(**options)
    return selection_scores(model, source, tokenizer, strategy, batch_size=COUNT)


@pytest.mark.parametrize("merge", ["one", "none"])
def test_scores_equal_to_the_mask_keep_all_named_patches(model, source, tokenizer, merge):
    named = named_patches(source)
    assert named.sum(1).min() > 0 and named.sum(1).max() <= KEEP
    (stage,) = told(model, source, tokenizer, named.float(), merge=merge)["stages"]
    everything = {"mean": 1.0, "low": 1.0, "high": 1.0, "images": COUNT}
    assert stage["kept"] == stage["purity"] == everything
    assert stage["kept_chance"]["mean"] == KEEP / PATCHES


def test_scores_opposite_to_the_mask_keep_no_named_patch(model, source, tokenizer):
    (stage,) = told(model, source, tokenizer, -named_patches(source).float())["stages"]
    assert stage["kept"]["mean"] == 0
    assert 0 < stage["purity"]["mean"] < stage["purity_chance"]["mean"]


def test_purity_and_its_chance():
    source = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]]).bool()
    pure, _ = purity(torch.tensor([[1, 1, 0, 1, 0, 1]]).bool(), source[None])
    assert pure.item() == pytest.approx((2 / 3 + 2 / 3 + 1 + 0) / 4)
    drawn = [[i in chosen for i in range(6)] for chosen in combinations(range(6), 3)]
    pure, chance = purity(torch.tensor(drawn), source.expand(len(drawn), -1, -1))
    assert pure.mean().item() == pytest.approx(chance[0].item())
    assert purity(torch.zeros(1, 6, dtype=torch.bool), source[None])[1].isnan()


def test_kept_patches_are_traced_through_the_stages():
    """Trace eight patches through two stages.

    The second stage keeps the merged token of the first too, and its second slot is padding.
    """
    weights = torch.zeros(1, 9), torch.zeros(1, 6)
    first = ReductionInfo(torch.tensor([[1, 3, 4, 8]]), weights[0], None)
    mask = torch.tensor([[True, True, False, True, True]])
    second = ReductionInfo(torch.tensor([[2, 3, 5]]), weights[1], mask)
    infos = [StageInfo(Stage(i, 1, 0), each) for i, each in enumerate((first, second))]
    kept = [each[0].nonzero().flatten().tolist() for each in kept_patches(infos, 8)]
    assert kept == [[0, 2, 3, 7], [2]]


def test_a_merging_strategy_has_only_purity(model, source, tokenizer):
    scores = selection_scores(model, source, tokenizer, "tome:r=8")
    assert [stage["keep"] for stage in scores["stages"]] == [56, 48, 40]
    for stage in scores["stages"]:
        assert stage["kept"] is stage["agrees"] is stage["changed_by_another_image"] is None
        assert stage["purity_chance"]["mean"] < stage["purity"]["mean"] <= 1
    assert scores["insertion"] is None and scores["lost"]["mean"] > 0


@pytest.mark.slow
def test_agreement_and_loss_are_those_of_the_model(model, source, tokenizer):
    strategy = ELIP(HALF, scorer="last")
    scores = selection_scores(model, source, tokenizer, strategy, batch_size=9)
    with torch.no_grad():
        images, guide = (
            images_of(source),
            model.eval().encode_captions(tokenizer, own_captions(source)),
        )
        shares = scorer_agreement(model.visual, images, guide, strategy, ("last",))
        tokens, _ = run_tower(model.tower, images, guide, strategy)
        reduced, dense = model.project_image(tokens), model.encode_image(images, reduce=False)
    (stage,) = scores["stages"]
    assert stage["agrees"]["mean"] == pytest.approx(shares["last"][0])
    assert stage["agrees_chance"]["mean"] == pytest.approx(shares["chance"][0])
    lost = (1 - (reduced * dense).sum(1)).mean().item()
    assert scores["lost"]["mean"] == pytest.approx(lost, abs=1e-5)


def test_a_curve_uses_the_patches_with_the_highest_scores(model, source, monkeypatch):
    """Compare scores with patch dropout of tokens chosen by hand, and areas with their means."""
    images, counts = images_of(source)[:3], []
    row = torch.rand(3, PATCHES, generator=torch.Generator().manual_seed(1))
    texts = torch.nn.functional.normalize(torch.randn(3, 64), dim=1)
    model.eval()
    with torch.no_grad():
        tokens, best = model.tower.embed(images), row.topk(8, dim=1).indices.sort().values
        index = torch.cat([torch.zeros(3, 1, dtype=torch.int64), best + 1], dim=1)
        tokens = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
        for i in range(model.tower.depth):
            tokens = model.tower.block(i, tokens)
        expected = (model.project_image(model.tower.finish(tokens)) * texts).sum(1)
        torch.testing.assert_close(
            deletion_insertion._score(model, images, texts, row, 8), expected
        )

    def score(model, images, texts, order, count):
        counts.append(count)
        return torch.full((3,), count / PATCHES)

    monkeypatch.setattr(deletion_insertion, "_score", score)
    areas = removal_areas(model, images, texts, row)
    assert counts == [PATCHES, *[8 * i for i in range(1, POINTS)] * 3]
    torch.testing.assert_close(areas["insertion"], torch.full((3,), (1 / 8 + 1) / 2))
    assert areas.keys() == {"insertion", "deletion", "random", "all_patches"}


@pytest.mark.parametrize("name", ["elip_albef_tiny", "elip_blip_tiny", "elip_meter_tiny"])
def test_every_model_is_measured_as_json_with_and_without_selection(name, source, tokenizer):
    model = small(name, tokenizer).train()
    state = torch.get_rng_state()
    for strategy in (None, "tome"):
        scores = selection_scores(model, source, tokenizer, strategy, limit=4)
        assert json.loads(json.dumps(scores, allow_nan=False)) == scores
        assert set(OF_THE_WHOLE) < set(scores) and scores["num_images"] == 4
        assert all(set(OF_A_STAGE) < set(stage) for stage in scores["stages"])
        assert (scores["insertion"] is None) == (strategy is not None or not model.ranks)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_a_model_that_reduces_nothing_loses_nothing(model, source, tokenizer):
    for strategy in (PatchDropout(0.5), model.dense):
        scores = selection_scores(model, source, tokenizer, strategy, limit=4)
        assert scores["stages"] == [] and scores["lost"]["mean"] == pytest.approx(0, abs=1e-6)


def test_named_patches_need_masks_or_boxes(tmp_path, model, tokenizer):
    Image.new("RGB", (128, 64), "white").save(tmp_path / "a.png")
    entry = {"image": "a.png", "caption": ["a dog", "a cat"]}
    boxes = [[[32, 0, 16, 16]], [[64, 0, 32, 64], [0, 0, 30, 30]]]
    path = tmp_path / "list.json"
    path.write_text(json.dumps([entry, entry]))
    scores = selection_scores(model, JsonSource(path), tokenizer)
    assert scores["stages"][0]["kept"] is None and scores["named"]["mean"] == 0
    assert scores["stages"][0]["purity"] is None and scores["stages"][0]["agrees"] is not None
    path.write_text(json.dumps([entry | {"boxes": boxes}] * 2))
    mask = JsonSource(path).named_mask(0, 1)
    assert mask.shape == (64, 128) and mask.sum() == 32 * 64 + 900 and mask[:, 64:96].all()
    scores = selection_scores(model, JsonSource(path), tokenizer)
    # The middle of the image is cut out: 4 of 64 patches, and the half of them
    assert scores["named"]["mean"] == pytest.approx((4 + 32) / 2 / PATCHES)
    assert scores["stages"][0]["kept"]["images"] == 2


def test_fewer_than_two_samples_raise(model, source, tokenizer):
    with pytest.raises(DataError, match="source: expected two readable samples or more, got 1"):
        selection_scores(model, source, tokenizer, limit=1)


def test_the_command_prints_and_writes(tmp_path, model, tokenizer, capsys):
    model.save_pretrained(tmp_path / "model", tokenizer)
    output = tmp_path / "scores.json"
    data = "emoji_scenes:size=6,clutter=2"
    command = ["python", "-m", "benchmarks.selection", "--model", tmp_path / "model"]
    arguments = [*command, "--data", data]
    options = ["--count", 5, "--strategy", "elip:scorer=cls", "--output", output]
    assert exit_status(*arguments, *options) == 0
    scores = json.loads(output.read_text())
    assert scores["num_images"] == 5 and "scorer='cls'" in scores["strategy"]
    assert "5 images, 64 patches" in capsys.readouterr().out
    assert exit_status(*arguments, "--strategy", "elpi") == 2
    assert "error: --strategy: strategy: expected" in capsys.readouterr().err
