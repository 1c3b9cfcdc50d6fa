"""Reading and writing of model files: writes are atomic, and errors name the file."""

import hashlib
import json
import math
import os
import reprlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elip_models.validation import check, require_extra

with require_extra("elip_models.saving"):
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DIGEST = "sha256"
"""The entry of a checked JSON object with the SHA-256 of the others."""


def write_file(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Write a file completely or not at all, even if the machine fails.

    Args:
        path: The file, which is replaced if it exists.
        content: What it contains afterwards.
        mode: Permissions, such as 0o600; None: those of any new file.
    """
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.{threading.get_ident()}")
    temporary.unlink(missing_ok=True)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode or 0o666)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except OSError as error:  # that of a write does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk.

    On Windows nothing is done: it syncs no folder, and no file that is opened for reading.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder and its subfolders, by its relative path."""
    files = sorted(entry for entry in folder.rglob("*") if entry.is_file())
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}


def damage_of(folder: Path, digests: Mapping[str, str]) -> str | None:
    """Describe the first file that is missing or has another SHA-256; None if there is none."""
    for name, digest in digests.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_sha256(folder / name) != digest:
            return f"{name} is not what was written"
    return None


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    """Write a dict or a list as JSON, completely or not at all."""
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def write_checked(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with its SHA-256, completely or not at all; `read_checked` reads it."""
    write_json(path, _sealed(content))


def read_checked(path: Path) -> dict[str, Any]:
    """Return the object that `write_checked` wrote; ValueError if it has changed since."""
    return _checked(path, read_object(path))


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return content | {DIGEST: digest}


def _checked(path: Path, sealed: dict[str, Any]) -> dict[str, Any]:
    content = {key: value for key, value in sealed.items() if key != DIGEST}
    if sealed.get(DIGEST) != _sealed(content)[DIGEST]:
        raise ValueError(f"{path} is not as it was written: its content has another SHA-256")
    return content


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], state: dict[str, Any] | None = None
) -> None:
    """Write a safetensors file, completely or not at all; memory formats are not stored.

    With a `state`, a JSON object, the file has this state and the SHA-256 of all: see `read_state`.
    """
    values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt"}
    if state is not None:
        content = {"state": state, "tensors": tensors_sha256(values)}
        metadata["state"] = json.dumps(_sealed(content))
    write_file(path, save(values, metadata=metadata))


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the state and the finite tensors that `write_tensors` wrote.

    TypeError or ValueError is raised if the file is damaged or has changed.
    """
    tensors = read_tensors(path)
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("state", "{}")
    content = _checked(path, _object(path, text))
    if content.get("tensors") != tensors_sha256(tensors):
        raise ValueError(f"{path} is not as it was written: its tensors have another SHA-256")
    check("state", content.get("state"), dict)
    return content["state"], tensors


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of the names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; any other content raises ValueError."""
    return _object(path, path.read_bytes())


def _object(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        content = json.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object, got no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {reprlib.repr(content)}")
    return content


def read_config(folder: str | os.PathLike, *, with_weights: bool = True) -> tuple[str | None, dict]:
    """Return family and config of a saved model; the family is None for another library's."""
    path = Path(folder)
    for name in ("config.json", "model.safetensors") if with_weights else ("config.json",):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"folder: expected config.json and model.safetensors, as save_pretrained "
                f"writes them, got no {name} in {path}"
            )
    config = read_object(path / "config.json")
    family = config.pop("model", None)
    if not isinstance(family, str | None):
        raise ValueError(
            f"{path / 'config.json'}: model: expected a text, got {reprlib.repr(family)}"
        )
    return family, config


def read_tensors(path: Path, *, finite: bool = True) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    ValueError is raised if the file is damaged and, with `finite`, by `check_finite`.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: expected a complete safetensors file, got {error}") from error
    if finite:
        check_finite(path, tensors)
    return tensors


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor read from `path` is not a dense one of finite numbers."""
    problems = [
        f"{problem} in {name:.100}"
        for name, tensor in tensors.items()
        if (problem := _unusable(tensor))
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path}: expected numbers, got {', '.join(problems[:3])}{more}")


def _unusable(tensor: Tensor) -> str | None:
    """Return what a tensor has instead of finite numbers in memory, or None."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        return f"a {tensor.layout} tensor on {tensor.device}"
    if tensor.is_quantized or tensor.is_complex():
        return f"a {tensor.dtype} tensor"
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    if tensor.dtype not in FLOATS:
        return f"a {tensor.dtype} tensor"
    low, high = (bound.item() for bound in tensor.detach().aminmax())  # one pass, no copy
    if math.isnan(low):
        return "NaN"
    return "infinity" if math.isinf(low) or math.isinf(high) else None
