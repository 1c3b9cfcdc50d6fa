"""Actors of Ray write the same bytes as one process, also if one of them is killed."""

import errno
import os
import pickle
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import elip_models
from elip_models.cli import main
from elip_models.embedding import output, ray_cluster
from elip_models.embedding.encoder import open_encoder
from elip_models.embedding.image_source import SourceOptions
from elip_models.embedding.open_images import open_images
from elip_models.embedding.options import EmbedOptions
from elip_models.embedding.output import OutputFolder
from elip_models.embedding.ray_actors import ShardActor
from elip_models.embedding.ray_cluster import Cluster, connected
from elip_models.embedding.shard import Shards
from elip_models.embedding.stored import Stored
from elip_models.validation import ConfigError
from tests.embedding.conftest import SMALL, files_of
from tests.embedding.test_sources import FORMS, digests
from tests.helpers.tiers import tiered
from tests.helpers.tiny_run import own_process

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
CPU = Cluster("cpu", 2, 1)


@pytest.fixture
def work(pictures, model, tmp_path):
    """What the actors get for three shards of three pictures; the folder has a manifest."""
    folder = OutputFolder(tmp_path / "out")
    source = open_images(pictures, SourceOptions())
    with folder.locked():
        folder.begin({"model": "a"})
    shards = Shards(len(source), SMALL["shard_size"], SMALL["batch_size"])
    options = EmbedOptions(workers=0)
    return CPU.work(open_encoder(model, device="cpu"), source, folder, shards, options)


def results(work, numbers):
    return [
        (row["images"][0], row["skipped"][0], row["error"][0] and pickled(row["error"][0]))
        for row in ShardActor(work)({"shards": [numbers]})
    ]


def pickled(text):
    return pickle.loads(bytes.fromhex(text))


def test_an_actor_writes_the_shards_of_one_process(work, whole):
    assert results(work, [2, 0]) == [(3, 0, ""), (3, 0, "")]
    assert results(work, [1]) == [(3, 0, "")]
    written, expected = files_of(work.folder), files_of(whole)
    assert {name: expected[name] for name in written if "shard" in name} == {
        name: content for name, content in expected.items() if "shard" in name
    }


def test_a_repeated_task_leaves_out_whole_shards_and_returns_the_same(work):
    first = results(work, [0, 1])
    shards = [OutputFolder(work.folder).shard(number) for number in (0, 1)]
    before = [path.stat().st_ino for path in shards]
    shards[1].write_bytes(b"")
    assert results(work, [0, 1]) == first
    after = [path.stat().st_ino for path in shards]
    assert after[0] == before[0] and after[1] != before[1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"folder": Path("/no/such/folder")}, "output: expected a folder that all nodes .* share"),
        ({"versions": {"torch": "0.1"}}, "ray: expected the libraries .* and 0.1 here"),
        ({"readable": Stored("/no/such.png")}, "source: .*'/no/such.png'.*cannot read: no such"),
    ],
    ids=["folder", "versions", "source"],
)
def test_a_node_without_the_files_or_libraries_is_an_error(work, change, message):
    ((images, _, error),) = results(replace(work, **change), [0])
    assert images == 0
    with pytest.raises(ConfigError, match=message):
        raise error


def test_a_full_disk_of_a_node_is_an_error_after_the_whole_shards(work, monkeypatch):
    write, calls = output.write_file, []

    def full(path, content):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(output, "write_file", full)
    first, (_, _, error) = results(work, [0, 1, 2])
    assert first == (3, 0, "")
    with pytest.raises(OSError, match="No space left on device; the files that were written"):
        raise error


def test_shards_that_the_driver_does_not_see_are_an_error(work, monkeypatch):
    folder = OutputFolder(work.folder)
    assert results(work, [0, 1])[-1] == (3, 0, "")
    ray_cluster._wait_for(folder, work.shards, [0, 1])
    monkeypatch.setattr(ray_cluster, "FILE_SECONDS", -1)
    with pytest.raises(ConfigError, match=r"output: expected .* 1 shards are missing"):
        ray_cluster._wait_for(folder, work.shards, [0, 1, 2])


GPU_NODE, CPU_NODE, HEAD = {"CPU": 32.0, "GPU": 4.0}, {"CPU": 8.0}, {"node:head": 1.0}


@pytest.mark.parametrize(
    "options, nodes, expected",
    [
        ({}, [GPU_NODE, GPU_NODE, CPU_NODE], Cluster("cuda", 8, 8)),
        ({"device": "cpu"}, [GPU_NODE, CPU_NODE], Cluster("cpu", 2, 16)),
        ({"ray_actors": 3, "device": "cuda:0"}, [GPU_NODE], Cluster("cuda", 3, 8)),
        ({}, [CPU_NODE, CPU_NODE, HEAD], Cluster("cpu", 2, 8)),
        ({"ray_actors": 3}, [CPU_NODE, CPU_NODE], Cluster("cpu", 3, 4)),
        ({"ray_actors": 5}, [CPU_NODE, {"CPU": 2.0}], Cluster("cpu", 5, 2)),
        ({"ray_actors": 9}, [CPU_NODE], "ray_actors: expected at most 8, the CPU cores"),
        ({"ray_actors": 5}, [GPU_NODE], "ray_actors: expected at most 4, the GPUs"),
        ({"device": "cuda"}, [CPU_NODE], "device: expected GPUs in the Ray cluster, got none"),
        ({"device": "mps"}, [CPU_NODE], "device: expected cuda or cpu with ray, got 'mps'"),
    ],
)
def test_actors_fit_the_nodes(options, nodes, expected):
    chosen = EmbedOptions(ray="auto", **options)
    alive = [{"Alive": True, "Resources": each} for each in nodes]
    alive.append({"Alive": False, "Resources": GPU_NODE | CPU_NODE})
    if isinstance(expected, Cluster):
        assert ray_cluster._cluster(chosen, alive) == expected
        return
    with pytest.raises(ConfigError, match=expected):
        ray_cluster._cluster(chosen, alive)


def test_automatic_precision_needs_the_device_of_the_actors(model):
    encoder = open_encoder(model, device="cpu")
    CPU.check_precision(encoder)
    with pytest.raises(
        ConfigError, match=r"precision: expected fp32, .* cpu, and the actors use c"
    ):
        replace(CPU, device="cuda").check_precision(encoder)


def test_without_ray_the_error_names_the_extra(pictures, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as status:
        main([*command(pictures, model, tmp_path / "out"), "--ray", "local"])
    said = capsys.readouterr().err
    assert status.value.code not in (0, None) and said.count("\n") == 1
    assert "embed with ray needs ray: pip install 'elip-kernels[ray]'" in said
    assert not (tmp_path / "out").exists()


def test_ray_together_with_torchrun_is_refused(pictures, model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"ray: expected one process, .* got 2 of torchrun"):
        elip_models.embed(model, pictures, tmp_path / "out", **SMALL, ray="local")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ray": 3}, "ray: expected a string or None, got 3"),
        ({"ray_actors": 0}, "ray_actors: expected an integer at least 1 or None, got 0"),
        ({"ray_actors": 1.5}, "ray_actors: expected an integer at least 1 or None, got 1.5"),
    ],
)
def test_an_option_of_another_type_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EmbedOptions(**options)


def test_actors_without_ray_are_refused(pictures, model, tmp_path):
    with pytest.raises(ConfigError, match="ray_actors: expected none without ray, got 2"):
        elip_models.embed(model, pictures, tmp_path / "out", **SMALL, ray_actors=2)


def closed_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@needs_ray
@pytest.mark.parametrize("address", ["", "head", "ray://head:10001", "head:x", "127.0.0.1:99999"])
def test_a_malformed_address_is_one_sentence(address):
    with pytest.raises(ConfigError, match="ray: expected ") as caught, connected_to(address):
        pass
    assert "\n" not in str(caught.value) and repr(address) in str(caught.value)


@needs_ray
def test_an_address_without_a_server_is_one_sentence():
    address = f"127.0.0.1:{closed_port()}"
    message = f"ray: .* got '{address}': .*refused; `ray start --head"
    with pytest.raises(ConfigError, match=message), connected_to(address):
        pass


@needs_ray
def test_an_error_of_ray_itself_is_one_sentence(monkeypatch):
    import ray

    def fail(*arguments, **options):
        raise ConnectionError("Could not find any Ray.\nStart one.")

    monkeypatch.setattr(ray, "init", fail)
    message = r"ray: expected a Ray cluster, got 'auto', .*: Could not find any Ray. Start one"
    with pytest.raises(ConfigError, match=message), connected_to("auto"):
        pass


def connected_to(address):
    return connected(EmbedOptions(ray=address))


@needs_ray
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_source_reaches_an_actor(form, pictures, tmp_path):
    from ray import cloudpickle

    source = open_images(FORMS[form](pictures, tmp_path), SourceOptions())
    sent = pickle.loads(cloudpickle.dumps(source))
    assert digests(sent) == digests(source) and sent.described() == source.described()


@needs_ray
@pytest.mark.parametrize("strategy", ["tome", "evit", "elip"])
def test_a_reduced_model_reaches_an_actor(model, strategy):
    from ray import cloudpickle

    encoder = open_encoder(model, reduce=strategy, keep=0.7, device="cpu")
    sent = pickle.loads(cloudpickle.dumps(replace(encoder, run=None)))
    pixels = torch.randn(2, 3, 160, 160)
    assert torch.equal(sent(pixels), encoder(pixels)) and sent.described() == encoder.described()


def command(pictures, model, folder):
    options = ["--workers=0", "--batch-size=2", "--shard-size=3", "--output", folder]
    return [*map(str, ["embed", pictures, "--model", model, *options])]


@needs_ray
@pytest.mark.slow
def test_two_actors_give_the_bytes_of_one_process(whole, pictures, model, tmp_path):
    arguments = [*command(pictures, model, tmp_path / "out"), "--ray=local", "--ray-actors=2"]
    done = subprocess.run(
        [sys.executable, "-m", "elip_models.cli", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "9 of 9 images embedded" in done.stdout
    assert files_of(tmp_path / "out") == files_of(whole)


@pytest.fixture(scope="module")
def ray_of_two():
    """Connect this process to a new Ray of two CPU cores."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


ON_TWO = SMALL | {"ray": "auto", "ray_actors": 2}


def killing(source, row, marker):
    """A source that once kills the process of an actor when it has come to a row."""
    payloads, driver = source.payloads, os.getpid()

    def killed(start, stop):
        for at, payload in zip(range(start, stop), payloads(start, stop), strict=True):
            if at == row and os.getpid() != driver and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield payload

    return replace(source, payloads=killed)


@pytest.fixture(scope="module")
def five(pictures, model, tmp_path_factory):
    """The output of one process in five shards, of two pictures each but for the last."""
    folder = tmp_path_factory.mktemp("five") / "out"
    with own_process():
        elip_models.embed(model, pictures, folder, **SMALL | FIVE)
    return folder


FIVE = {"shard_size": 2, "batch_size": 1}


@needs_ray
@pytest.mark.parametrize("row", tiered([2, 3], [], slow=[2]))
def test_a_killed_actor_loses_nothing_and_doubles_nothing(
    row, five, pictures, model, tmp_path, monkeypatch, ray_of_two
):
    """The first task has two shards. Its actor dies when it has written the first one, and between
    the images of the second one."""
    monkeypatch.setattr(ray_cluster, "TASKS_FOR_ACTOR", 1)
    source = killing(open_images(pictures, SourceOptions()), row, tmp_path / "killed")
    shown = []
    options = ON_TWO | FIVE | {"progress": lambda *at: shown.append(at)}
    found = elip_models.embed(model, source, tmp_path / "out", **options)
    assert (tmp_path / "killed").exists()
    assert (found.found, found.embedded, found.skipped) == (9, 9, 0)
    assert len(shown) == 6 and shown == sorted(shown) and shown[-1] == (9, 0, 9)
    assert files_of(tmp_path / "out") == files_of(five)


class Stopped(Exception):
    pass


@needs_ray
@pytest.mark.exhaustive
def test_a_stopped_driver_continues_with_or_without_ray(
    whole, pictures, model, tmp_path, ray_of_two
):
    def stop(images, skipped, total):
        if images:
            raise Stopped

    encoder = open_encoder(model, device="cpu")
    with pytest.raises(Stopped):
        elip_models.embed(encoder, pictures, tmp_path, **ON_TWO, progress=stop)
    manifest = OutputFolder(tmp_path).manifest()
    assert not manifest["complete"]
    OutputFolder(tmp_path).shard(0).unlink(missing_ok=True)
    elip_models.embed(encoder, pictures, tmp_path, **ON_TWO)
    OutputFolder(tmp_path).shard(1).unlink()
    elip_models.embed(encoder, pictures, tmp_path, **SMALL)
    assert files_of(tmp_path)["skipped.parquet"] == files_of(whole)["skipped.parquet"]
    assert elip_models.embed(model, pictures, tmp_path / "other", **SMALL).embedded == 9
    for name, content in files_of(tmp_path / "other").items():
        assert (tmp_path / name).read_bytes() == content


@needs_ray
@pytest.mark.exhaustive
def test_actors_list_damaged_images_and_encode_reduced(damaged, model, tmp_path, ray_of_two):
    said, reduced = [], {"reduce": "tome", "keep": 0.7, "check": 4}
    one = elip_models.embed(model, damaged, tmp_path / "one", **SMALL | reduced)
    options = ON_TWO | reduced | {"report": said.append}
    found = elip_models.embed(model, damaged, tmp_path / "two", **options)
    assert (found.embedded, found.skipped) == (one.embedded, one.skipped) == (9, 4)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert "cosine" in said[0]


@needs_ray
@pytest.mark.exhaustive
def test_an_error_of_an_actor_is_one_sentence(pictures, model, tmp_path, monkeypatch, ray_of_two):
    monkeypatch.setattr(ray_cluster, "library_versions", lambda: {"torch": "0.1"})
    with pytest.raises(ConfigError, match="ray: expected the libraries of the com") as caught:
        elip_models.embed(model, pictures, tmp_path / "out", **ON_TWO)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="ray: expected 'auto' in a process that has connected"):
        elip_models.embed(model, pictures, tmp_path / "out", **ON_TWO | {"ray": "local"})
