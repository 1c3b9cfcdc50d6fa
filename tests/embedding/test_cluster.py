"""Actors of Ray write the same bytes as one process, also if one of them is killed."""

import os
import pickle
import signal
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

import elip_models
from elip_models.embedding import cluster
from elip_models.embedding.cluster import Cluster, ShardActor
from elip_models.embedding.options import EmbedOptions
from elip_models.embedding.shard import Job
from elip_models.embedding.source import Stored, open_images
from elip_models.validation import ConfigError
from tests.embedding.conftest import SMALL, files_of
from tests.embedding.test_sources import FORMS, digests

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
GPU_NODE, CPU_NODE, HEAD = {"CPU": 32.0, "GPU": 4.0}, {"CPU": 8.0}, {"node:head": 1.0}


@pytest.mark.parametrize(
    "actors, device, nodes, expected",
    [
        (None, None, [GPU_NODE, GPU_NODE, CPU_NODE], Cluster("cuda", 8, 8)),
        (None, "cpu", [GPU_NODE, CPU_NODE], Cluster("cpu", 2, 16)),
        (None, None, [CPU_NODE, CPU_NODE, HEAD], Cluster("cpu", 2, 8)),
        (5, None, [CPU_NODE, {"CPU": 2.0}], Cluster("cpu", 5, 2)),
        (9, None, [CPU_NODE], "ray_actors: expected 1 to 8, the CPU cores"),
        (None, "cuda", [CPU_NODE], "ray_actors: expected 1 to 0, the GPUs"),
    ],
)
def test_actors_fit_the_nodes(actors, device, nodes, expected):
    if isinstance(expected, Cluster):
        assert Cluster.of_nodes(nodes, actors, device) == expected
        return
    with pytest.raises(ConfigError, match=expected):
        Cluster.of_nodes(nodes, actors, device)


@pytest.mark.parametrize("other", ["folder", "images", "versions"])
def test_a_node_of_other_files_or_versions_is_an_error(
    other, whole, pictures, encoder, monkeypatch
):
    source, folder, message = open_images(pictures), whole, "expected a place that all nodes of"
    if other == "images":
        files = next(source.payloads(0, 1)).files
        payloads = [Stored(files, f"/no/such/{i}.png") for i in range(9)]
        source = replace(source, payloads=lambda start, stop: iter(payloads[start:stop]))
    elif other == "folder":
        folder = Path("/no/such/folder")
    else:
        versions = cluster.library_versions() | {"torch": "1.0"}
        monkeypatch.setattr(cluster, "library_versions", lambda: versions)
        message = r"ray: expected the versions of .*, got torch 1\.0 on"
    actor = ShardActor(Job(encoder, source, folder, EmbedOptions(**SMALL)), "cpu", 1)
    with pytest.raises(ConfigError, match=message):
        actor.embed([0])


@needs_ray
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_source_reaches_an_actor(form, pictures, tmp_path):
    from ray import cloudpickle

    source = open_images(FORMS[form](pictures, tmp_path))
    sent = pickle.loads(cloudpickle.dumps(source))
    assert digests(sent) == digests(source) and sent.described() == source.described()


@pytest.fixture(scope="module")
def ray_of_two():
    """Connect this process to a new Ray of two CPU cores."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def killing(source, row, marker):
    """A source that once kills the process of an actor when it has come to a row."""
    payloads, driver = source.payloads, os.getpid()

    def killed(start, stop):
        for at, payload in zip(range(start, stop), payloads(start, stop), strict=True):
            if at == row and os.getpid() != driver and not marker.exists() and start % 2 == 0:
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield payload

    return replace(source, payloads=killed)


@needs_ray
@pytest.mark.slow
def test_a_killed_actor_loses_nothing_and_doubles_nothing(damaged, encoder, tmp_path, ray_of_two):
    options = SMALL | {"shard_size": 2, "batch_size": 1}
    elip_models.embed(encoder, damaged, tmp_path / "one", **options)
    source = killing(open_images(damaged), 8, tmp_path / "killed")
    shown = []
    options |= {"ray": "auto", "ray_actors": 2, "progress": lambda *at: shown.append(at)}
    result = elip_models.embed(encoder, source, tmp_path / "out", **options)
    assert (tmp_path / "killed").exists()
    assert (result.found, result.embedded, result.skipped) == (13, 9, 4)
    assert shown == sorted(shown) and shown[-1][::2] == (13, 13)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")
