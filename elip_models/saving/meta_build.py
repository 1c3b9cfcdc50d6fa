"""Models on the meta device: a config is compared with its weight file before it takes memory."""

import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, ValuesView
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from elip_models.saving.files import read_object
from elip_models.saving.weights import first_names
from elip_models.validation import mismatch_error, require_extra

with require_extra("elip_models.saving"):
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError, safe_open

LARGEST = 2**24
DEEPEST = 1024
DEPTH = re.compile(r"(layers?|depths?|blocks|stages)$")
MOST_TENSORS = 32_768
"""Of a model whose weights are not read: 1,024 layers of 32."""
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
INITIALISERS = {
    "uniform_",
    "normal_",
    "trunc_normal_",
    "erfinv_",
    "mul_",
    "add_",
    "clamp_",
    "fill_",
    "zero_",
    "ones_",
    "zeros_",
    "constant_",
    "copy_",
}
NOT_STORED: dict[str, Callable[[torch.Size], Tensor]] = {
    "position_ids": lambda shape: torch.arange(shape[-1]).expand(shape),
    "token_type_ids": lambda shape: torch.zeros(shape, dtype=torch.long),
}
"""Values of the buffers that transformers does not store, by name; shapes (1, L)."""
LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
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
        kinds = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
        return {
            name: torch.empty(shape, dtype=DTYPES.get(dtype, torch.uint8), device="meta")
            for name, (shape, dtype) in kinds.items()
        }
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: expected a complete safetensors file, got {error}") from error


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


@contextmanager
def at_most(tensors: int, numbers: float = math.inf) -> Iterator[None]:
    """Raise ValueError once modules that this thread creates have more parameters than that.

    `numbers` is the most that their parameters and buffers on the meta device may have together.
    """
    thread, count, size = threading.get_ident(), 0, 0

    def check(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal count, size
        if threading.get_ident() != thread or tensor is None:
            return
        count += isinstance(tensor, nn.Parameter)
        size += tensor.numel() if tensor.is_meta else 0
        if count > tensors:
            raise ValueError(f"model: expected at most {tensors} tensors, by its file, got more")
        if size > numbers:
            raise ValueError(f"model: expected at most {numbers} numbers, by its file, got more")

    handles = (
        register_module_parameter_registration_hook(check),
        register_module_buffer_registration_hook(check),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def meta_device(tensors: int) -> Iterator[None]:
    """Create modules on the meta device, without initial values; `with_memory` gives them memory.

    ValueError is raised for many more parameters than a file of that many tensors has.
    """
    with at_most(4 * tensors + 1000), torch.device("meta"), _WithoutInitialValues():
        yield


def with_memory(
    outline: nn.Module, make: Callable[[], nn.Module], weight_names: Iterable[str]
) -> nn.Module:
    """Return `outline`, which `make()` made under `meta_device`, with memory for its tensors.

    The memory has no values yet: the caller loads the weights of `weight_names`. If these leave out
    a tensor of the model, the result is a new `make()` instead, which has initial values.
    """
    first = first_names(outline)
    loaded = {first[name] for name in weight_names if name in first}
    state = outline.state_dict(keep_vars=True)
    undefined = {id(tensor) for tensor in _meta_tensors(outline)}
    undefined -= {id(tensor) for name, tensor in state.items() if first[name] in loaded}
    device = torch.get_default_device()
    new: dict[int, Tensor] = {}  # a tensor that modules share stays shared
    for module in outline.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            is_known = type(module).__module__.startswith("transformers.") and name in NOT_STORED
            if is_known and id(tensor) in undefined:
                undefined.remove(id(tensor))
                new[id(tensor)] = NOT_STORED[name](tensor.shape).to(device)
    if undefined:
        return make()
    for module in outline.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in new:
                        new[id(tensor)] = _with_memory(tensor, device)
                    tensors[name] = new[id(tensor)]
    return outline


def _with_memory(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty


def _meta_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers, and tensors in plain attributes, if without memory."""
    for module in model.modules():
        values = [*module._parameters.values(), *module._buffers.values()]
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                inner = value.values() if isinstance(value, dict) else value
                values += inner if isinstance(inner, list | tuple | ValuesView) else [inner]
        yield from (value for value in values if isinstance(value, Tensor) and value.is_meta)


@contextmanager
def library_errors(path: Any, expected: str) -> Iterator[None]:
    """Turn an error of a library, which reads `path`, into a ValueError that names the path."""
    try:
        yield
    except LIBRARY_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: expected {expected}, got {reason:.300}") from error


class _WithoutInitialValues(TorchFunctionMode):
    """Leave out what sets values, for meta tensors have none and it takes most of the time."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_setting = func is torch.tensor and args and isinstance(args[0], int | float)
        if is_setting:  # keeps its value
            return func(*args, **{"device": "cpu", **kwargs})
        if getattr(func, "__name__", "") in INITIALISERS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
