"""Reading and writing of model files: writes are atomic, and errors name the file."""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor


def write_file(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Write a file completely or not at all, even if the machine fails.

    Args:
        path: The file, which is replaced if it exists.
        content: What it contains afterwards.
        mode: Permissions, such as 0o600; None: those of any new file.
    """
    unfinished = path.with_name(f".{path.name[:40]}.{os.getpid()}.{threading.get_ident()}")
    unfinished.unlink(missing_ok=True)
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode or 0o666)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dict as JSON, completely or not at all."""
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, completely or not at all; memory formats are not stored."""
    values = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    write_file(path, save(values, metadata={"format": "pt"}))


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; any other content raises ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object, got no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {content!r:.100}")
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
    return config.pop("model", None), config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; a damaged file or NaN raises ValueError."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a complete safetensors file, got {error}") from error
    check_no_nan(path, tensors)
    return tensors


def check_no_nan(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError if a tensor read from `path` has NaN."""
    floating = {name: each for name, each in tensors.items() if each.is_floating_point()}
    names = [name for name, each in floating.items() if each.isnan().any()]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"{path}: expected numbers, got NaN in {', '.join(names[:3])}{more}")
