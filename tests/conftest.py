"""Fixtures: golden tensors and emoji shards beside the repository, where they are present."""

import json
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser):
    parser.addoption("--golden", type=Path, default=SHARED / "golden", help="golden tensors")


class Golden(dict):
    """Tensors of one golden case, by key, and its `meta`."""

    def __init__(self, folder):
        from safetensors.torch import load_file

        super().__init__(load_file(folder / "tensors.safetensors"))
        self.meta = json.loads((folder / "meta.json").read_text())

    def under(self, prefix):
        """The tensors below `prefix`, by the rest of their keys."""
        return {k.removeprefix(prefix): v for k, v in self.items() if k.startswith(prefix)}


@pytest.fixture(scope="session")
def golden(request):
    """name -> Golden; skips where the golden tensors are absent."""
    root = request.config.getoption("--golden")
    if not root.is_dir():
        pytest.skip(f"golden tensors are absent: {root}")
    return lambda name: Golden(root / name)


@pytest.fixture(scope="session")
def emoji():
    """Folder of the emoji shards; skips where it is absent."""
    folder = SHARED / "data" / "emoji"
    if not folder.is_dir():
        pytest.skip(f"emoji shards are absent: {folder}")
    return folder


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
