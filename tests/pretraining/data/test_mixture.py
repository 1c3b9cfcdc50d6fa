"""Several sources of different kinds in one run: weights, shuffling, and exact resuming."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from elip_models.pretraining.data import (
    EmojiScenes,
    EpochSampler,
    MixedSource,
    check_source,
    open_source,
)
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.trainer import train
from tests.helpers.tiers import tiered
from tests.helpers.tiny_run import logged, own_process, tiny_config

LENGTHS = (20, 8)


@pytest.fixture
def list_and_shards(scene_files, tmp_path):
    """Return ten scenes in a JSON list and ten in a tar shard, in a folder to change."""
    folder = shutil.copytree(scene_files, tmp_path / "files")
    return [str(folder / "test.json"), str(folder / "test-*.tar")]


def epoch_of(sampler, epoch):
    batches = iter(sampler)
    for _ in range(epoch * sampler.batches_per_epoch):
        next(batches)
    return [place for _ in range(sampler.batches_per_epoch) for place in next(batches)]


def test_several_specs_are_one_source(list_and_shards):
    source = open_source(list_and_shards, image_size=64)
    assert isinstance(source, MixedSource) and source.lengths == (10, 10)
    ids = ["0/emoji_scenes-2-9", "1/test-0000.tar:emoji_scenes-2-0"]
    assert [source[index].id for index in (9, 10)] == ids
    assert source.captions(10) == EmojiScenes(1, seed=2).captions(0)
    with pytest.raises(IndexError, match="expected 0 <= index < 20, got 20"):
        source[20]
    assert check_source(source).reasons == []
    alone = open_source(list_and_shards[:1], image_size=64)
    assert len(alone) == 10 and not isinstance(alone, MixedSource)
    with pytest.raises(ValueError, match="spec: expected at least one"):
        open_source([], image_size=64)


def run_python_of_the_document(word):
    """Run the only block of docs/data.md that contains `word`."""
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    exec(block, {})


def test_coco_and_visual_genome_are_read_as_the_document_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train2014/9.jpg", "VG_100K/1.jpg", "VG_100K_2/51.jpg"):
        Path(name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(name)
    images = [{"id": 9, "file_name": "9.jpg"}]
    captions = [{"image_id": 9, "caption": "A dog."}, {"image_id": 9, "caption": "A cat."}]
    Path("annotations").mkdir()
    coco = {"images": images, "annotations": captions}
    Path("annotations/captions_train2014.json").write_text(json.dumps(coco))
    regions = [{"id": n, "regions": [{"phrase": f"phrase {n}"}]} for n in (1, 51, 99)]
    Path("region_descriptions.json").write_text(json.dumps(regions))
    run_python_of_the_document("region_descriptions")
    coco = "annotations/captions_train2014.json,images=train2014"
    source = open_source([coco, "vg.json"], image_size=8)
    assert source.lengths == (1, 2) and check_source(source).reasons == []
    assert source.captions(0) == ("A dog.", "A cat.")
    assert source.captions(2) == ("phrase 51",)


def test_an_epoch_is_a_permutation_across_the_sources():
    sampler = EpochSampler(LENGTHS, 4, seed=0)
    for epoch in (0, 1):
        places = epoch_of(sampler, epoch)
        assert sorted(places) == [(epoch, index) for index in range(28)]
        batches = [places[start : start + 4] for start in range(0, 28, 4)]
        mixed = [batch for batch in batches if 0 < sum(index < 20 for _, index in batch) < 4]
        assert len(mixed) >= 4
    plain = EpochSampler(28, 4, seed=0)
    assert epoch_of(plain, 1) == epoch_of(sampler, 1)


@pytest.mark.parametrize("weights", [(1, 2), (0.5, 3), (0.3, 1.6), (1.05, 0.1)])
def test_a_weight_is_how_often_the_samples_of_a_source_come_in_an_epoch(weights):
    sampler = EpochSampler(LENGTHS, 1, seed=0, weights=weights)
    counts = [round(weight * length) for weight, length in zip(weights, LENGTHS, strict=True)]
    assert sampler.batches_per_epoch == sampler.samples == sum(counts)
    seen: Counter = Counter()
    for epoch in range(7):
        places = epoch_of(sampler, epoch)
        assert len(set(places)) == len(places), "a sample comes again with another turn"
        assert sum(index < 20 for _, index in places) == counts[0]
        seen.update(index for _, index in places)
    for first, last in ((0, 20), (20, 28)):
        times = [seen[index] for index in range(first, last)]
        assert max(times) - min(times) <= 1


@pytest.mark.parametrize("weights", tiered(["[0.5, 2]", "null"], ["[0.5, 2]"]))
def test_a_list_and_shards_train_together_and_resume_exactly(weights, list_and_shards, tmp_path):
    overrides = (
        f"data.train={list_and_shards}",
        f"data.weights={weights}",
        "optim.steps=9",
        "checkpoint_every=5",
        "model.overrides.drop_path=0.2",
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    with own_process():
        train(tiny_config(whole, *overrides))
    shutil.copytree(whole, resumed)
    shutil.rmtree(RunFolder(resumed).checkpoints.latest())
    shutil.rmtree(resumed / "model")
    with own_process():
        result = train(tiny_config(resumed, *overrides), resume=True)
    assert logged(resumed, "loss", "epoch") == logged(whole, "loss", "epoch")
    assert logged(resumed, "epoch")[-1]["epoch"] > 1
    newest = [RunFolder(folder).checkpoints.latest() for folder in (whole, resumed)]
    saved, again = (
        torch.load(each / "optimizer.bin", weights_only=True)["state"] for each in newest
    )
    assert result.step == 9 and saved.keys() == again.keys()
    assert all(torch.equal(saved[key]["exp_avg"], again[key]["exp_avg"]) for key in saved)
