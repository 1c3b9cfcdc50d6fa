"""Training on a stream: distribution of shards over readers, seeds, resuming."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import fsspec
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
from elip_models.pretraining.data.loader import EpochSampler
from elip_models.pretraining.data.training_samples import TrainingSamples
from elip_models.pretraining.training.recipe import load_recipe
from elip_models.pretraining.training.trainer import train
from elip_models.pretraining.training.training_data import open_training_data
from elip_models.validation import ConfigError, TrainingError
from tests.helpers.damage import shard
from tests.helpers.streaming import served
from tests.helpers.tiers import first_quick
from tests.helpers.tiny_run import logged, own_process, tiny_arguments, tiny_config

SHARDS, SAMPLES = 5, 4


@pytest.fixture(autouse=True)
def _own_process(monkeypatch):
    monkeypatch.setattr(streams, "_RETRY_DELAYS", (0.0, 0.0))
    with own_process():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write shards of numbered samples, whose images have the number as their colour."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(SHARDS):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for place in range(SAMPLES):
                index, image = number * SAMPLES + place, io.BytesIO()
                Image.new("RGB", (8, 8), (index, 0, 0)).save(image, "PNG")
                caption = f"number {index}".encode()
                for suffix, content in (("png", image.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{index:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def spec(folder, **options):
    urls = f"pipe:cat {folder}/{{0..{SHARDS - 1}}}.tar"
    return {"stream": urls, "samples": SHARDS * SAMPLES, "shuffle": 3, **options}


def numbered(sample, place, rng):
    """Return the number of a sample and a random number drawn for it."""
    number = sample.image.getpixel((0, 0))[0]
    drawn = int(rng.integers(2**31))
    return {"images": torch.tensor([number]), "drawn": torch.tensor([drawn])}


def batches_of(spec, **options):
    return StreamBatches(open_stream(spec), numbered, **{"batch_size": 2, "seed": 0, **options})


def take(count, batches):
    return list(itertools.islice(stream_loader(batches), count))


def numbers(taken):
    return [number for batch in taken for number in batch["images"].flatten().tolist()]


def drawn(taken):
    return [each for batch in taken for each in batch["drawn"].flatten().tolist()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_same_seed_same_batches_other_seed_others(folder, num_workers):
    first, again, other = (
        take(9, batches_of(spec(folder), seed=seed, num_workers=num_workers)) for seed in (3, 3, 4)
    )
    assert numbers(first) == numbers(again) != numbers(other)
    assert drawn(first) == drawn(again)
    assert [batch["worker"] for batch in first[:4]] == ([0, 1, 0, 1] if num_workers else [0] * 4)


def test_a_pass_has_every_sample_once_and_the_next_in_another_order(folder):
    taken = numbers(take(20, batches_of(spec(folder, shuffle=1))))
    first, second = taken[:20], taken[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_a_repeated_sample_is_augmented_differently(folder):
    taken = take(20, batches_of(spec(folder)))
    assert len(set(drawn(taken))) == 40


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (2, 2)])
def test_readers_share_each_pass_without_waiting(folder, world_size, num_workers):
    """Distribute five shards over readers, which do not wait for each other."""
    workers, first_pass = max(1, num_workers), []
    for rank in range(world_size):
        batches = batches_of(
            spec(folder, shuffle=1), rank=rank, world_size=world_size, num_workers=num_workers
        )
        taken = take(20 * workers, batches)
        for worker in range(workers):
            own = numbers(batch for batch in taken if batch["worker"] == worker)
            assert len(own) == 40
            shards = len(range(rank * workers + worker, SHARDS, world_size * workers))
            first_pass += own[: shards * SAMPLES]
    assert sorted(first_pass) == list(range(20))


@pytest.mark.parametrize(("world_size", "num_workers", "readers"), [(6, 0, 6), (3, 2, 6)])
def test_fewer_shards_than_readers(folder, world_size, num_workers, readers):
    options = {"world_size": world_size, "num_workers": num_workers}
    with pytest.raises(ValueError, match=rf"at least {readers} shards.*got 5; .*num_workers"):
        batches_of(spec(folder), **options)
    own = [
        tuple(numbers(take(10, batches_of(spec(folder, resample=True), rank=rank, **options))))
        for rank in range(2)
    ]
    assert own[0] != own[1]


@pytest.mark.parametrize(("num_workers", "done"), [(0, 1), (0, 4), (2, 1), (2, 5)])
def test_a_resumed_run_skips_no_sample(folder, num_workers, done):
    options = {"num_workers": num_workers, "batch_size": 3}
    before = take(done, batches_of(spec(folder), **options))
    resumed = batches_of(spec(folder), **options)
    resumed.done = done
    for batch in before:
        resumed.turns[batch["worker"]] = batch["turn"]
    after = take(20, resumed)
    assert after[0]["worker"] == done % max(1, num_workers)
    assert set(numbers(before)) | set(numbers(after)) == set(range(20))
    for worker, first in enumerate(resumed.turns):
        places = [SAMPLES * first, len(numbers(b for b in before if b["worker"] == worker))]
        assert places[0] <= places[1], "a shard was passed over"


def test_lost_shards_are_reported_once_and_the_others_are_read(folder):
    urls = [f"pipe:cat {folder}/{number}.tar" for number in range(4)] + ["pipe:exit 7"]
    taken = take(20, batches_of({"stream": urls, "samples": 20, "shuffle": 350}))
    assert set(numbers(taken)) <= set(range(16))
    skipped = [skip for batch in taken for skip in batch["skipped"]]
    assert skipped and set(skipped) == {("pipe:exit *** [4]", "exit status 7; more may be lost")}
    shards = [shard for batch in taken for shard in batch["shards"]]
    assert {("pipe:exit *** [4]", "exit status 7"), ("pipe:cat *** [0]", "")} <= set(shards)


def test_an_empty_stream_raises_without_waiting(folder):
    start = time.monotonic()
    [batch] = take(9, batches_of({"stream": "pipe:exit 7", "samples": 5}))
    assert isinstance(batch, DataError)
    assert "pipe:exit *** [0] (exit status 7; more may be lost)" in str(batch)
    assert time.monotonic() - start < 10


def test_a_stream_without_decodable_images_raises(tmp_path, monkeypatch):
    monkeypatch.setattr("elip_models.pretraining.data.stream_batches.MAX_IN_A_ROW", 20)
    path = shard(tmp_path / "a.tar", [("a.png", b"no image"), ("a.txt", b"a")])
    [batch] = take(9, batches_of({"stream": f"pipe:cat {path}", "samples": 5, "shuffle": 2}))
    assert isinstance(batch, DataError)
    assert "pipe:cat *** [0]:a (not a readable image" in str(batch)


NUMBERS = ("loss", "step", "epoch", "lr", "grad_norm")


def scenes(folder, count=4, each=6):
    """Write shards of built-in scenes and return their URL."""
    source = EmojiScenes(count * each, image_size=32)
    for number in range(count):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for index in range(number * each, (number + 1) * each):
                image = io.BytesIO()
                source[index].image.save(image, "PNG")
                text = json.dumps({"captions": source.captions(index)}).encode()
                for suffix, content in (("png", image.getvalue()), ("json", text)):
                    info = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"pipe:cat {folder}/{{0..{count - 1}}}.tar"


def stream(url, **options):
    options = {"stream": url, "samples": 24, "shuffle": 4} | options
    return f"data.train={json.dumps(options)}"


@pytest.mark.parametrize("num_workers", first_quick([0, 2]))
def test_a_run_resumes_at_its_shards(tmp_path, num_workers):
    overrides = (
        stream(scenes(tmp_path)),
        f"data.num_workers={num_workers}",
        "checkpoint_every=3",
        "optim.steps=3",
    )
    run = tmp_path / "run"
    first = train(tiny_config(run, *overrides))
    assert first.skipped.startswith("All of 24 samples")
    before = logged(run, *NUMBERS)
    [state] = (run / "checkpoints" / "step_00000003").glob("stream_*.json")
    turns = json.loads(state.read_text())
    assert len(turns) == max(1, num_workers) and all(0 <= turn < 12 for turn in turns)
    train(tiny_config(run, *overrides[:-1], "optim.steps=5"), resume=True)
    rows = logged(run, *NUMBERS)
    assert rows[:3] == before
    assert [(row["step"], row["epoch"]) for row in rows[3:]] == [(4, 1.3333), (5, 1.6667)]
    again = tiny_config(run, *overrides, "optim.steps=6", f"data.num_workers={num_workers + 1}")
    with pytest.raises(TrainingError, match=f"num_workers = {num_workers}, got {num_workers + 1}"):
        train(again, resume=True)


@pytest.mark.slow
def test_a_checkpoint_with_a_damaged_position_is_not_used(tmp_path):
    config = tiny_config(tmp_path / "run", stream(scenes(tmp_path)), "checkpoint_every=2")
    train(config)
    state = tmp_path / "run" / "checkpoints" / "step_00000004" / "stream_0.json"
    state.write_text("[100]")
    rows = logged(tmp_path / "run", "loss", "step")
    train(config, resume=True)
    assert [row["step"] for row in logged(tmp_path / "run", "step")] == [1, 2, 3, 4]
    assert logged(tmp_path / "run", "loss", "step")[:2] == rows[:2]


@pytest.mark.slow
def test_too_many_lost_shards_stop_the_run(tmp_path):
    scenes(tmp_path)
    for path in tmp_path.glob("*.tar"):
        fsspec.filesystem("memory").pipe(f"/lost/{path.name}", path.read_bytes())
    urls = "memory://lost/{0..4}.tar"
    config = tiny_config(
        tmp_path / "run", stream(urls), "optim.steps=600", "data.max_bad_share=0.1"
    )
    with pytest.raises(DataError, match=r"\d+ of 100 shards .*4\.tar \(no such file: .*4\.tar\)"):
        train(config)


def test_a_run_over_https_reports_unreadable_samples(tmp_path):
    scenes(tmp_path)
    (tmp_path / "1.tar").unlink()
    with served(tmp_path, breaks_after=20_000) as url:
        urls = f"{url}/{{0..3}}.tar"
        result = train(tiny_config(tmp_path / "run", stream(urls), "data.max_bad_share=0.5"))
    assert "1.tar (HTTP Error 404: Not Found)" in result.skipped
    assert "shards" in result.skipped


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.num_workers=5",), r"data\.train: .*at least 5 shards.*got 4"),
        (("optim.batch_size=25",), r"optim\.batch_size: expected at most 24, .*got 25"),
        (("data.weights=[2]",), r"data\.train: expected data\.weights: null"),
        (("data.eval=pipe:cat a.tar",), r"data\.eval: .*samples can be counted"),
        (("data.train=['pipe:a', b.json]",), r"data\.train: expected one stream alone.*2 sources"),
        (("data.train.samples=0",), r"data\.train: samples: expected .*at least 1"),
    ],
)
def test_unsupported_uses_of_a_stream_raise(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(tmp_path / "run", stream(scenes(tmp_path)), *overrides))


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/someone/pairs/train-{0000..0002}.tar,samples=24",
        "pipe:aws s3 cp s3://bucket/{0..2}.tar -,samples=24,resample=true",
        "{stream: 'https://host/{0..2}.tar', samples: 24, resample: true}",
    ],
)
def test_a_stream_on_the_command_line(tmp_path, text):
    source = open_training_data(tiny_config(tmp_path, f"data.train={text}"), 32)
    assert (len(source), len(source.shards)) == (24, 3)
    assert source.spec.resample == ("resample" in text)


def test_a_task_on_a_stream_raises(tmp_path):
    needed = ("data.tokenizer=a", "model.pretrained=a", f"output_dir={tmp_path}")
    config = load_recipe("finetune/vqa_tiny", ["data.train=pipe:a,samples=1", *needed])
    with pytest.raises(ValueError, match="expected data on disk for vqa, got a stream"):
        open_training_data(config, 32)


def test_guide_other_trains_on_a_stream(tmp_path):
    url = scenes(tmp_path)
    result = train(tiny_config(tmp_path / "run", stream(url), "model.overrides.guide=other"))
    assert result.step == 4


def test_a_worker_ignores_the_signal_that_ends_the_job():
    dataset = TrainingSamples(EmojiScenes(8, image_size=8), numbered, seed=0)
    others = _children()
    batches = iter(train_loader(dataset, EpochSampler(8, 2, 0), 2))
    for _ in range(2):
        next(batches)  # of each worker: both have begun
    children = _children() - others
    assert len(children) >= 2
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    assert len([next(batches) for _ in range(12)]) == 12
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 10
    assert not _children() & children


def _children():
    me = os.getpid()
    with open(f"/proc/{me}/task/{me}/children") as file:
        return {int(pid) for pid in file.read().split()}


@pytest.mark.slow
def test_two_processes_with_unequal_shards_end_and_resume(tmp_path):
    url, run = scenes(tmp_path, count=3, each=9), tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", "-m", "elip_models.cli"]
    overrides = (stream(url), "optim.batch_size=4", "checkpoint_every=4")
    arguments = tiny_arguments(run, *overrides, "optim.steps=12")
    subprocess.run([*command, *arguments], check=True, capture_output=True, timeout=200)
    assert len(logged(run, "loss")) == 12
    names = {each.name for each in (run / "checkpoints" / "step_00000012").glob("stream_*")}
    assert names == {"stream_0.json", "stream_1.json"}
    arguments = [*tiny_arguments(run, *overrides, "optim.steps=14"), "--resume"]
    subprocess.run([*command, *arguments], check=True, capture_output=True, timeout=200)
    assert [row["step"] for row in logged(run, "step", "loss")] == list(range(1, 15))
