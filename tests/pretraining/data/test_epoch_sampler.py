"""EpochSampler: every epoch is a permutation, split over the ranks, and resumes at any position."""

import itertools

import pytest

from elip_models.pretraining.data import EpochSampler
from tests.pretraining.data.test_data_loader import BATCH, LENGTH


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


def test_the_end_of_an_epoch_is_the_beginning_of_the_next():
    sampler = EpochSampler(LENGTH, BATCH, 0)
    sampler.set_position(2, sampler.batches_per_epoch)
    assert (sampler.epoch, sampler.offset) == (3, 0)
    assert next(iter(sampler))[0][0] == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"length": 0}, ValueError, "length: expected an integer at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer at least 1, got 0"),
        ({"batch_size": 11}, ValueError, r"batch_size: expected at most 10 per rank \(10 samples"),
        ({"batch_size": 6, "world_size": 2}, ValueError, "expected at most 5 per rank .*, got 6"),
        ({"seed": -1}, ValueError, "seed: expected an integer at least 0, got -1"),
        ({"rank": 1}, ValueError, "rank: expected less than world_size = 1, got 1"),
        ({"world_size": 1.0}, TypeError, r"world_size: expected an integer .*, got 1\.0"),
    ],
)
def test_bad_sampler_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        EpochSampler(**{"length": 10, "batch_size": 2, "seed": 0, **arguments})


@pytest.mark.parametrize(
    ("epoch", "offset", "error", "message"),
    [
        (-1, 0, ValueError, "epoch: expected an integer at least 0, got -1"),
        (0, 1.5, TypeError, r"offset: expected an integer .*, got 1\.5"),
        (0, 6, ValueError, "offset: expected at most batches_per_epoch = 5, got 6; use the"),
    ],
)
def test_bad_positions(epoch, offset, error, message):
    with pytest.raises(error, match=message):
        EpochSampler(10, 2, 0).set_position(epoch, offset)
