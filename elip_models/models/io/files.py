"""Files of models: written whole or not at all, and read with errors that name them."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, with the permissions of any new file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; ValueError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object, got no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {content!r:.100}")
    return content


def read_config(folder: str | os.PathLike, *, with_weights: bool = True) -> tuple[str | None, dict]:
    """Read family and config of a folder that `save_pretrained` wrote; no family in another's.

    Raises:
        FileNotFoundError: it lacks config.json, or model.safetensors where `with_weights`.
    """
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
    """The tensors of a safetensors file; ValueError where it is damaged, or one of them has NaN."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got {error}") from error
    check_numbers(path, tensors)
    return tensors


def check_numbers(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError where one of the tensors that `path` holds has NaN."""
    floating = {name: each for name, each in tensors.items() if each.is_floating_point()}
    spoilt = [name for name, each in floating.items() if each.isnan().any()]
    if spoilt:
        more = f" and {len(spoilt) - 3} more" if len(spoilt) > 3 else ""
        raise ValueError(f"{path}: expected numbers, got NaN in {', '.join(spoilt[:3])}{more}")
