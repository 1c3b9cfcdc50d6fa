"""Files of weights: safetensors, or what torch.save writes, as one file or as shards.

Only tensors are read; no code in a file is run.
"""

from pathlib import Path

import torch
from torch import Tensor

from elip_models.saving.files import read_object, read_tensors
from elip_models.validation import mismatch_error, shortened

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MOST_SHARED = 4
"""Tensors of a file may together be so many times its size, by sharing memory, as tied ones do."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file or folder, without DataParallel's and compile's prefixes.

    They may be infinite, as the attention mask of some checkpoints of CLIP is.
    FileNotFoundError is raised for a missing file, ValueError for one with other content.
    """
    if path.is_dir():
        files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not files:
            raise FileNotFoundError(
                f"source: expected one of {', '.join(WEIGHT_FILES)} in a folder, got none in {path}"
            )
        path = files[0]
    if path.suffix == ".json":
        shards = read_object(path).get("weight_map")
        if mismatch_error(shards, dict[str, str]):
            raise ValueError(
                f"source: expected weights, or the index of their shards, got {path}; pass the "
                "folder of a config"
            )
        if outside := [shard for shard in shards.values() if Path(shard).name != shard]:
            raise ValueError(
                f"source: expected shards beside the index {path}, got {shortened(outside[0])}; "
                "move them there"
            )
        files = [path.parent / shard for shard in sorted(set(shards.values()))]
    else:
        files = [path]
    stored = {name: weight for file in files for name, weight in _read_file(file).items()}
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in stored.items()}
    if len(weights) < len(stored):
        raise ValueError(f"source: expected each tensor once, with or without _orig_mod, in {path}")
    while weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): weight for name, weight in weights.items()}
    return weights


def _read_file(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file: all of it, or its value of 'state_dict' or 'model'."""
    if not path.is_file():
        raise FileNotFoundError(f"source: expected a file or a folder, got none at {path}")
    if path.suffix == ".safetensors":
        return read_tensors(path, finite=False)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content = content.get("state_dict") or content.get("model") or content
        pairs = content.items()
    except Exception as error:  # torch.load documents no class of errors for other content
        lines = [line for line in str(error).splitlines() if "WeightsUnpickler error" in line]
        reason = (lines or str(error).splitlines() or [""])[0].partition(". ")[0].strip()
        raise ValueError(
            f"source: expected a file of tensors, got {path}, which is damaged or has other "
            f"content ({type(error).__name__}: {reason:.200}); if you trust it, save only its "
            "state dict, torch.save({'model': state_dict}, ..)"
        ) from error
    others = [str(n) for n, w in pairs if not (type(n) is str and isinstance(w, Tensor))]
    if others or not content:
        raise ValueError(
            f"source: expected a state dict, bare or under 'state_dict' or 'model', in {path}, got "
            f"other values under {', '.join(others)!r:.200}"
        )
    size, total = path.stat().st_size, sum(w.numel() * w.element_size() for _, w in pairs)
    if total > MOST_SHARED * size:
        raise ValueError(
            f"source: expected tensors of at most {MOST_SHARED} times the size of {path}, got "
            f"{total} bytes from {size}; save a copy of each tensor"
        )
    return content
