"""Workers of the whole suite, and shared fixtures: golden tensors, scenes as files, a tokenizer."""

import gc
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

TESTS = Path(__file__).resolve().parent
GOLDEN = TESTS / "golden"
LONGEST = ("test_interpreter", "test_interpreter_further", "test_gpu_on_cpu", "test_distributed")
SECONDS = 600  # of the longest test on a busy machine, several times
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

CACHE = TemporaryDirectory()  # that of `datasets`, which keeps the index of tar shards
os.environ["HF_DATASETS_CACHE"] = CACHE.name

if IS_WORKER:  # one core for each worker and for the processes that it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run the whole suite on two workers, and single files in this process; `-n` overrides both."""
    folders = {(config.invocation_params.dir / arg).resolve() for arg in config.args}
    option = config.option
    is_asked = IS_WORKER or option.usepdb or getattr(option, "numprocesses", 0) is not None
    if folders == {TESTS} and not is_asked:
        option.numprocesses, option.dist = 2, "loadscope"  # fixtures of a file run once
        option.loadscopereorder = False  # or the longest files, which have few tests, come last


def pytest_collection_modifyitems(config, items):
    """Move the longest tests to the front, so that both workers end at the same time.

    A test that waits for ever fails with the stacks of its threads.
    """
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            item.add_marker(pytest.mark.timeout(SECONDS, method="thread"))


def pytest_collection_finish():
    """Leave what is imported by now out of garbage collections, which took a tenth of the time."""
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)


def pytest_unconfigure():
    """Collect what was frozen, or Triton's bindings list it as leaked when the process ends."""
    gc.unfreeze()


class Golden(dict):
    """Tensors of one case of `tests/golden` by key, and its description `meta`."""

    def __init__(self, name):
        from safetensors.torch import load_file

        stored = load_file(GOLDEN / f"{name}.safetensors")
        super().__init__({k: v.float() if v.dtype == torch.half else v for k, v in stored.items()})
        self.meta = json.loads((GOLDEN / f"{name}.json").read_text())

    def under(self, prefix):
        """Return the tensors whose keys begin with `prefix`, by the rest of the key."""
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
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # of devices that are not there, it would keep a stack trace for each test
        torch.default_generator.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fill `torch.empty` with NaN, so that tests find outputs that no kernel wrote."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def free_port():
    """Return an unused TCP port of this machine."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """Return all captions of a hundred scenes."""
    from elip_models.pretraining.data import EmojiScenes

    source = EmojiScenes(100, seed=1)
    return [text for index in range(100) for text in source.captions(index)]


@pytest.fixture(scope="module")
def tokenizer(captions):
    """Return a tokenizer trained on `captions`."""
    from elip_models.pretraining.data import train_tokenizer

    return train_tokenizer(captions, 600)
