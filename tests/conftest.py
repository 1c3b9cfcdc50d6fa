"""Two workers for the whole suite, and fixtures: golden tensors, scenes as files, a tokenizer."""

import json
import os
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
GOLDEN = TESTS / "golden"
LONGEST = ("test_interpreter", "test_gpu_on_cpu", "test_distributed")
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

if IS_WORKER:  # a core each, and for what its tests start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs on two workers, a file in this process; `-n` says otherwise."""
    folders = {(config.invocation_params.dir / arg).resolve() for arg in config.args}
    option = config.option
    is_asked = IS_WORKER or option.usepdb or getattr(option, "numprocesses", 0) is not None
    if folders == {TESTS} and not is_asked:
        option.numprocesses, option.dist = 2, "loadscope"  # what a file shares is made once
        option.loadscopereorder = False  # else files of few tests, the longest, come last


def pytest_collection_modifyitems(items):
    """The longest tests first, so that both workers end together."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


class Golden(dict):
    """Tensors of one case of `tests/golden` by key, and its description `meta`."""

    def __init__(self, name):
        from safetensors.torch import load_file

        stored = load_file(GOLDEN / f"{name}.safetensors")
        super().__init__({k: v.float() if v.dtype == torch.half else v for k, v in stored.items()})
        self.meta = json.loads((GOLDEN / f"{name}.json").read_text())

    def under(self, prefix):
        """The tensors below `prefix`, by the rest of their keys."""
        return {k.removeprefix(prefix): v for k, v in self.items() if k.startswith(prefix)}


@pytest.fixture(scope="session")
def golden():
    """Return a function that loads a case of `tests/golden` by its name."""
    return Golden


@pytest.fixture(scope="session")
def scene_files(tmp_path_factory):
    """Return a folder with built-in scenes as files: four shards, and a shard and a list of ten."""
    from tests.helpers.scene_files import write_scene_files

    return write_scene_files(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """`torch.empty` is full of NaN, so that an output nobody wrote is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def free_port():
    """A TCP port of this machine that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """All captions of a hundred scenes."""
    from elip_models.data import EmojiScenes

    source = EmojiScenes(100, seed=1)
    return [text for index in range(100) for text in source.captions(index)]


@pytest.fixture(scope="module")
def tokenizer(captions):
    """A tokenizer trained on `captions`."""
    from elip_models.data import train_tokenizer

    return train_tokenizer(captions, 600)
