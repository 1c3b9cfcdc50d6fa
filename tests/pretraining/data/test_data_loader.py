"""Loading: batches depend on (seed, epoch, offset) only; bad samples are replaced and counted."""

import itertools
from functools import partial

import pytest
import torch
from PIL import Image

from elip_models.images import SampleError
from elip_models.pretraining.data import (
    DataError,
    EmojiScenes,
    EpochSampler,
    Sample,
    SkipReport,
    TrainingSamples,
    check_source,
    evaluation_batches,
    image_transform,
    train_loader,
)
from elip_models.pretraining.models.config import VisionConfig
from elip_models.pretraining.tasks.task import Preprocessor, image_with_caption

SIZE, BATCH, LENGTH = 16, 4, 22
TENSORS = ("images", "input_ids", "attention_mask")


class DamagedSource:
    """A tiny source whose samples at the indices `bad` cannot be read."""

    def __init__(self, length: int, bad: set[int]) -> None:
        self.length = length
        self.bad = bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise SampleError(f"sample {index}", "corrupt")
        image = Image.new("RGB", (4, 4), (index % 256, 0, 0))
        return Sample(image, self.captions(index), f"sample {index}")

    def captions(self, index: int) -> tuple[str, ...]:
        return (f"caption {index}",)


@pytest.fixture
def dataset(tokenizer) -> TrainingSamples:
    return make_dataset(EmojiScenes(LENGTH, seed=4, image_size=SIZE), tokenizer)


def make_dataset(source, tokenizer) -> TrainingSamples:
    transform = image_transform(SIZE, train=True, scale=(0.5, 1.0))
    preprocessor = Preprocessor(source, transform, tokenizer, VisionConfig(), 24)
    return TrainingSamples(source, partial(image_with_caption, preprocessor), seed=0)


def take(dataset, sampler, count, num_workers=0) -> list[dict]:
    return list(itertools.islice(train_loader(dataset, sampler, num_workers), count))


def assert_same_batches(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in TENSORS)
        assert all(a[name] == b[name] for name in a.keys() - set(TENSORS))


def test_text_is_padded_or_truncated_and_keeps_its_end(dataset, tokenizer):
    (batch,) = take(dataset, EpochSampler(LENGTH, BATCH, 0), 1)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert batch["images"].shape == (BATCH, 3, SIZE, SIZE) and batch["skipped"] == []
    assert ids.shape == mask.shape == (BATCH, 24) and ids.dtype == mask.dtype == torch.int64
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert (ids.gather(1, mask.sum(1, keepdim=True) - 1) == tokenizer.eos_token_id).all()
    assert (ids[mask == 0] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_gives_the_remaining_batches_with_any_number_of_workers(tokenizer, num_workers):
    dataset = make_dataset(DamagedSource(LENGTH, {2, 9}), tokenizer)
    batches = take(dataset, EpochSampler(LENGTH, BATCH, 0), 12)
    assert not torch.equal(batches[0]["images"], batches[5]["images"]), "the next epoch differs"
    for done in (3, 5, 7):
        sampler = EpochSampler(LENGTH, BATCH, 0)
        sampler.batches_done = done
        assert_same_batches(take(dataset, sampler, 12 - done, num_workers), batches[done:])


def test_a_bad_sample_is_replaced_and_reported(tokenizer):
    bad = {3, 4, 5}
    dataset = make_dataset(DamagedSource(20, bad), tokenizer)
    batches = take(dataset, EpochSampler(20, BATCH, 0), 5)
    assert all(len(batch["images"]) == BATCH for batch in batches)
    skipped = [skip for batch in batches for skip in batch["skipped"]]
    assert sorted(skipped) == [(f"sample {index}", "corrupt", index) for index in sorted(bad)]
    assert torch.equal(dataset[0, 3]["images"], dataset[0, 3]["images"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_source_without_a_readable_sample_is_a_data_error(tokenizer, num_workers):
    dataset = make_dataset(DamagedSource(8, set(range(8))), tokenizer)
    with pytest.raises(DataError, match=r"^no readable sample in .*sample \d \(corrupt\)"):
        take(dataset, EpochSampler(8, BATCH, 0), 1, num_workers)


def test_a_share_above_the_limit_stops_after_a_hundred_samples_or_one_pass():
    report, skipped = SkipReport(), [(f"sample {n}", "corrupt", n) for n in range(6)]
    report.update(skipped, 99)
    with pytest.raises(DataError) as error:
        report.update([], 1)
    assert "6 of 100 samples (6.0%)" in str(error.value) and str(error.value).count("corrupt") == 5
    assert str(error.value).endswith("repair the data, or raise max_bad_share.")
    small = SkipReport(0.1, length=10)
    small.update(skipped[:2], 9)
    with pytest.raises(DataError, match=r"2 of 10 samples \(20\.0%\) .*: sample 0 \(corrupt\); "):
        small.update([], 1)


def test_check_source_reads_everything_and_never_raises():
    report = check_source(DamagedSource(12, set(range(6))))
    listed = "; ".join(f"sample {index} (corrupt)" for index in range(5))
    said = f"6 of 12 samples (50.0%) could not be read, among them: {listed}."
    assert report.summary() == said
    assert check_source(DamagedSource(12, {7}), limit=7).reasons == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_yields_readable_samples_in_order(num_workers):
    source = DamagedSource(10, {0, 1, 2, 6})
    report = SkipReport(0.5, length=10)
    options = {"report": report, "num_workers": num_workers}
    batches = list(evaluation_batches(source, image_transform(SIZE, train=False), 3, **options))
    good = [index for index in range(10) if index not in source.bad]
    samples = [sample for batch in batches for sample in batch.samples]
    assert samples == [Sample(None, (f"caption {i}",), f"sample {i}") for i in good]
    assert [index for batch in batches for index in batch.indices] == good
    assert all(batch.images.shape == (len(batch.samples), 3, SIZE, SIZE) for batch in batches)
    assert (report.seen, len(report.reasons)) == (10, 4)


def epochs_of(sampler: EpochSampler, epochs: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(sampler, epochs * sampler.batches_per_epoch))


def test_an_epoch_is_a_permutation_without_its_incomplete_batch():
    sampler = EpochSampler(LENGTH, BATCH, seed=1)
    batches = epochs_of(sampler, 2)
    orders = [[i for b in batches for e, i in b if e == epoch] for epoch in (0, 1)]
    for order in orders:
        assert len(order) == len(set(order)) == 20 and set(order) <= set(range(LENGTH))
    assert orders[0] != orders[1]
    assert batches == epochs_of(EpochSampler(LENGTH, BATCH, seed=1), 2)
    assert batches != epochs_of(EpochSampler(LENGTH, BATCH, seed=2), 2)


def test_ranks_partition_the_global_batch():
    whole = epochs_of(EpochSampler(LENGTH, 2 * BATCH, seed=1), 3)
    ranks = [epochs_of(EpochSampler(LENGTH, BATCH, 1, rank, 2), 3) for rank in (0, 1)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6}, "batch_size: expected at most 5 per rank .*, got 6"),
        ({"batch_size": 0}, "batch_size: expected an integer at least 1, got 0"),
        ({"rank": 2}, r"rank: expected an integer in \[0, 1\], got 2"),
        ({"weights": (-1.0,)}, "weights: expected .* above 0, got"),
    ],
)
def test_settings_that_would_lose_or_repeat_samples_raise(options, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(10, **{"batch_size": 2, "seed": 0, "world_size": 2, **options})
