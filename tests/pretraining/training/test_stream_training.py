"""Training on a stream: distribution of shards over readers, seeds, resuming."""

import errno
import io
import itertools
import json
import os
import shutil
import signal
import time

import pytest
import torch
from PIL import Image

from elip_models.pretraining.data import (
    DataError,
    EmojiScenes,
    StreamBatches,
    open_stream,
    stream_loader,
    streams,
    train_loader,
)
from elip_models.pretraining.data.training_samples import EpochSampler, TrainingSamples
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.trainer import train
from elip_models.validation import ConfigError, TrainingError
from tests.helpers.damage import shard
from tests.helpers.streaming import served
from tests.helpers.tiers import first_quick
from tests.helpers.tiny_run import logged, tiny_config

SHARDS, SAMPLES = 5, 4


@pytest.fixture(autouse=True)
def _no_delay(monkeypatch):
    monkeypatch.setattr(streams, "_RETRY_DELAYS", (0.0, 0.0))


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write shards of numbered samples, whose images have the number as their colour."""
    folder = tmp_path_factory.mktemp("shards")
    for first in range(0, SHARDS * SAMPLES, SAMPLES):
        members = []
        for number in range(first, first + SAMPLES):
            image = png(Image.new("RGB", (8, 8), (number, 0, 0)))
            members += [(f"{number:03d}.png", image), (f"{number:03d}.txt", b"a number")]
        shard(folder / f"{first // SAMPLES}.tar", members)
    return folder


def spec(folder, **options):
    urls = f"file://{folder}/{{0..{SHARDS - 1}}}.tar"
    return {"stream": urls, "samples": SHARDS * SAMPLES, **options}


def numbered(sample, place, rng):
    """Return the number of a sample and a random number drawn for it."""
    number = sample.image.getpixel((0, 0))[0]
    drawn = int(rng.integers(2**31))
    return {"images": torch.tensor([number]), "drawn": torch.tensor([drawn])}


def batches_of(spec, **options):
    return StreamBatches(open_stream(spec), numbered, **{"batch_size": 2, "seed": 0, **options})


def take(count, batches):
    return list(itertools.islice(stream_loader(batches), count))


def numbers(batches, name="images"):
    return [number for batch in batches for number in batch[name].flatten().tolist()]


def drawn(batches):
    return numbers(batches, "drawn")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_same_seed_same_batches_other_seed_others(folder, num_workers):
    first, again, other = (
        take(9, batches_of(spec(folder), seed=seed, num_workers=num_workers)) for seed in (3, 3, 4)
    )
    assert numbers(first) == numbers(again) != numbers(other)
    assert drawn(first) == drawn(again)
    assert [batch["worker"] for batch in first[:4]] == ([0, 1, 0, 1] if num_workers else [0] * 4)


def test_a_pass_has_every_sample_once_and_the_next_in_another_order_and_augmentation(folder):
    batches = take(20, batches_of(spec(folder)))
    first, second = numbers(batches[:10]), numbers(batches[10:])
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second and len(set(drawn(batches))) == 40


def test_readers_share_each_pass_without_waiting(folder):
    """Distribute five shards over two workers of two ranks, which do not wait for each other."""
    first_pass = []
    for rank in range(2):
        batches = take(40, batches_of(spec(folder), rank=rank, world_size=2, num_workers=2))
        for worker in range(2):
            own = numbers(batch for batch in batches if batch["worker"] == worker)
            assert len(own) == 40
            first_pass += own[: len(range(2 * rank + worker, SHARDS, 4)) * SAMPLES]
    assert sorted(first_pass) == list(range(20))


def test_fewer_shards_than_readers(folder):
    options = {"world_size": 3, "num_workers": 2}
    with pytest.raises(ValueError, match=r"at least 6 shards.*got 5; .*num_workers"):
        batches_of(spec(folder), **options)
    own = [
        tuple(numbers(take(10, batches_of(spec(folder, resample=True), rank=rank, **options))))
        for rank in range(2)
    ]
    assert own[0] != own[1]


def test_lost_shards_and_samples_are_reported_and_the_others_are_read(folder, tmp_path):
    broken = shard(tmp_path / "broken.tar", [("a.png", b"no image"), ("a.txt", b"a")])
    urls = [f"file://{folder}/{number}.tar" for number in range(4)]
    urls += [f"file://{tmp_path}/none.tar", f"file://{broken}"]
    batches = take(8, batches_of({"stream": urls, "samples": 20}))
    assert sorted(numbers(batches)) == list(range(16))
    [(name, problem)] = [shard for batch in batches for shard in batch["shards"] if shard[1]]
    assert name == "none.tar" and "No such file or directory" in problem
    skipped = dict(skip for batch in batches for skip in batch["skipped"])
    assert skipped.keys() <= {"broken.tar:a"}
    later = take(20, batches_of({"stream": urls, "samples": 20}))
    assert "broken.tar:a" in dict(skip for batch in later for skip in batch["skipped"])


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("members", [None, [("a.png", b"no image"), ("a.txt", b"a")]])
def test_a_stream_without_a_readable_sample_is_a_data_error(tmp_path, members, num_workers):
    if members is not None:
        shard(tmp_path / "a.tar", members)
    stream = {"stream": f"file://{tmp_path}/a.tar", "samples": 5}
    batches = batches_of(stream, num_workers=num_workers)
    with pytest.raises(DataError, match=r"^no readable sample in 20 consecutive shards.*a\.tar: "):
        take(9, batches)


NUMBERS = ("loss", "step", "epoch", "lr", "grad_norm")


def scenes(folder, count=4, samples=6):
    """Write shards of built-in scenes and return their URL."""
    source = EmojiScenes(count * samples, image_size=32)
    for number in range(count):
        members = []
        for index in range(number * samples, (number + 1) * samples):
            text = json.dumps({"captions": source.captions(index)}).encode()
            image = png(source[index].image)
            members += [(f"{index:06d}.png", image), (f"{index:06d}.json", text)]
        shard(folder / f"{number}.tar", members)
    return f"file://{folder}/{{0..{count - 1}}}.tar"


def stream(url, **options):
    options = {"stream": url, "samples": 24} | options
    return f"data.train={json.dumps(options)}"


@pytest.mark.parametrize("num_workers", first_quick([0, 2]))
def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(tmp_path, num_workers):
    overrides = (stream(scenes(tmp_path)), "checkpoint_every=3", "optim.steps=5")
    overrides += (f"data.num_workers={num_workers}",)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    result = train(tiny_config(whole, *overrides))
    assert result.skipped.startswith("All of 40 samples")
    shutil.copytree(whole, resumed)
    shutil.rmtree(RunFolder(resumed).checkpoints.latest())
    shutil.rmtree(resumed / "model")
    train(tiny_config(resumed, *overrides), resume=True)
    assert logged(resumed, *NUMBERS) == logged(whole, *NUMBERS)
    again = tiny_config(resumed, *overrides, f"data.num_workers={num_workers + 1}")
    with pytest.raises(TrainingError, match=f"num_workers = {num_workers}, got {num_workers + 1}"):
        train(again, resume=True)


def test_a_run_over_https_reports_unreadable_shards(tmp_path):
    scenes(tmp_path)
    (tmp_path / "1.tar").unlink()
    with served(tmp_path, breaks=1) as url:
        urls = f"{url}/{{0..3}}.tar"
        result = train(tiny_config(tmp_path / "run", stream(urls), "data.max_bad_share=0.5"))
    assert "shards" in result.skipped and "1.tar (ClientResponseError: 404" in result.skipped


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.num_workers=5",), r"data\.train: .*at least 5 shards.*got 4"),
        (("optim.batch_size=25",), r"optim\.batch_size: expected at most 24, .*got 25"),
        (("data.weights=[2]",), r"data\.train: expected data\.weights: null"),
        (("data.eval=https://h/a.tar",), r"data\.eval: .*samples can be counted"),
        (("data.train=['https://h/a.tar', b.json]",), r"data\.train: expected one stream"),
        (("data.train.samples=0",), r"data\.train: samples: expected .*at least 1"),
    ],
)
def test_unsupported_uses_of_a_stream_raise(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(tmp_path / "run", stream(scenes(tmp_path)), *overrides))


@pytest.mark.parametrize("signals", [1, 2])
def test_a_worker_outlives_the_signals_that_end_the_job(signals):
    dataset = TrainingSamples(EmojiScenes(8, image_size=8), numbered, seed=0)
    others = _children()
    batches = iter(train_loader(dataset, EpochSampler(8, 2, 0), 2))
    for _ in range(2):
        next(batches)  # of each worker: both have begun
    children = _children() - others
    assert len(children) >= 2
    for pid in [*children] * signals:
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.02)
    assert len([next(batches) for _ in range(12)]) == 12
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 10
    assert not _children() & children


def _children():
    me = os.getpid()
    with open(f"/proc/{me}/task/{me}/children") as file:
        return {int(pid) for pid in file.read().split()}


class FullDisk(io.BytesIO):
    def write(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_full_temporary_folder_ends_the_run_and_loses_no_shard(folder, num_workers, monkeypatch):
    monkeypatch.setattr(streams.tempfile, "TemporaryFile", FullDisk)
    with pytest.raises(DataError, match=r"^TMPDIR: expected space.*set TMPDIR to"):
        take(1, batches_of(spec(folder), num_workers=num_workers))
