"""Models on the meta device: a config is compared with its weight file before it takes memory."""

import logging
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from elip_kernels._switch import ProcessSwitch
from elip_models.saving.files import read_object
from elip_models.validation import mismatch_error, require_extra

with require_extra("elip_models.saving"):
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError, safe_open

LARGEST = 2**24
DEEPEST = 1024
DEPTH = re.compile(r"(layers?|depths?|blocks|stages)$")
INDEX = "model.safetensors.index.json"
RANDOM_VALUES = {
    "uniform_",
    "normal_",
    "erfinv_",
    "trunc_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
    "xavier_normal_",
}
"""Methods of a tensor, and functions of `nn.init`, that set random values."""
LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    NameError,
    pickle.PickleError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What libraries raise where a config or a file has values that they do not expect."""


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file on the meta device; only its header is read."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: _without_values(part) for name, part in slices.items()}
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: expected a complete safetensors file, got {error}") from error


def _without_values(part: Any) -> Tensor:
    shape = part.get_shape()
    dtype = (part[:0] if shape else part[...]).dtype
    return torch.empty(shape, dtype=dtype, device="meta")


def read_headers(folder: Path) -> dict[str, Tensor] | None:
    """Return `read_header` of a folder of transformers, or None where it has other weights."""
    if (folder / "model.safetensors").is_file():
        return read_header(folder / "model.safetensors")
    if not (folder / INDEX).is_file():
        return None
    files = read_object(folder / INDEX).get("weight_map")
    if mismatch_error(files, dict[str, str]) or any(Path(f).name != f for f in files.values()):
        raise ValueError(
            f"{folder / INDEX}: expected 'weight_map' with names of files beside it, got "
            f"{files!r:.100}"
        )
    headers = [read_header(folder / file) for file in sorted(set(files.values()))]
    return {name: tensor for header in headers for name, tensor in header.items()}


def check_integers(path: Path, config: dict[str, Any]) -> None:
    """Raise ValueError for an integer in a config that is larger than any size of a model."""
    left: list[tuple[str, Any]] = list(config.items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, item) for item in value]
        elif isinstance(value, int) and "theta" not in key:
            limit = DEEPEST if DEPTH.search(key) else LARGEST
            if abs(value) > limit:
                raise ValueError(f"{path}: {key}: expected at most {limit}, got {value!r:.40}")


def outline_of(make: Callable[[], nn.Module]) -> nn.Module:
    """Return what `make` returns on the meta device, to be compared with weights."""
    with torch.device("meta"), WithoutRandomValues():
        return make()


class WithoutRandomValues(TorchFunctionMode):
    """Create modules with zeros for random initial values, since weights replace them all.

    Undefined values would not do: `trunc_normal_` draws again until all are within its bounds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in RANDOM_VALUES:
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return func(*args, **kwargs)


@contextmanager
def library_errors(path: Any, expected: str) -> Iterator[None]:
    """Turn an error of a library, which reads `path`, into a ValueError that names the path."""
    try:
        yield
    except LIBRARY_ERRORS as error:
        text = str(error)
        if "weights_only" in text:  # leave out the advice to run the code in a pickle
            text = text.partition(". ")[0]
        reason = f"{type(error).__name__}: {text}"
        raise ValueError(f"{path}: expected {expected}, got {reason:.300}") from error


def _disable_logs() -> int:
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    return before


_QUIET = ProcessSwitch(_disable_logs, logging.disable)


def quiet_logs() -> AbstractContextManager[None]:
    """Disable log messages of libraries up to warnings, such as those about random weights."""
    return _QUIET.on()
