"""Models of timm, open_clip and transformers from a folder, which is not trusted.

No code of the folder runs. A config that does not fit the weights beside it takes no memory.
Weights that are missing, not finite or of another kind, such as int8 for float, raise ValueError.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elip_models.saving.files import check_finite, read_object, read_tensors
from elip_models.saving.meta_build import (
    WithoutRandomValues,
    check_config,
    library_errors,
    outline_of,
    read_header,
    read_headers,
)
from elip_models.saving.weights import check_weights, kind_of, load_weights
from elip_models.validation import mismatch_error

CONFIG = "config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
ADAPTER = "adapter_config.json"
PACKED = 16
"""A quantised file may have that many parameters in one number."""
SPARE = 2**24
"""A model may have that many numbers that its file lacks, such as a new pooler or masks."""


class NewPartsWarning(UserWarning):
    """Parts of a model that its weights lack, which have initial values.

    Attributes:
        parts: their names in the model.
    """

    def __init__(self, name: str | Path, kind: str, parts: list[str]) -> None:
        super().__init__(
            f"{name} has no weights for {', '.join(parts)} of {kind}, which have initial values"
        )
        self.parts = tuple(parts)


def load_timm(folder: Path) -> nn.Module:
    """Load the timm model that `save_reduced` wrote."""
    import timm

    return _load(
        folder / CONFIG,
        folder / "model.safetensors",
        lambda: timm.create_model(f"local-dir:{folder}", pretrained=False),
    )


def load_open_clip(folder: Path) -> nn.Module:
    """Load the open_clip model that `save_reduced` wrote; its towers are not from a hub."""
    path = folder / OPEN_CLIP_CONFIG
    described = read_object(path).get("model_cfg")
    if mismatch_error(described, dict) or any(
        mismatch_error(described.get(tower), dict) for tower in ("vision_cfg", "text_cfg")
    ):
        raise ValueError(f"{path}: expected 'model_cfg' with 'vision_cfg' and 'text_cfg'")
    vision, text = described["vision_cfg"], described["text_cfg"]
    if text.get("hf_model_name") or ":" in str(vision.get("timm_model_name")):
        raise ValueError(
            f"{path}: expected towers that the folder describes, got one of a hub or another "
            f"folder; load it by open_clip if you trust it, and pass it as model="
        )
    return _load(path, folder / "open_clip_model.safetensors", lambda: make_open_clip(folder))


def make_open_clip(folder: Path) -> nn.Module:
    """Make the model that open_clip_config.json in a folder describes, with random weights."""
    import open_clip

    return open_clip.create_model(
        f"local-dir:{folder}",
        load_weights=False,
        device=torch.get_default_device(),
        pretrained_image=False,
        pretrained_text=False,
    )


def _load(config: Path, weights: Path, make: Callable[[], nn.Module]) -> nn.Module:
    if not weights.is_file():
        raise FileNotFoundError(f"folder: expected {weights}, as save_reduced writes it, got none")
    check_config(config, read_object(config))
    stored = read_header(weights)
    with library_errors(config, f"a config of a model in {weights.name}"):
        check_weights(outline_of(make), stored)
        with WithoutRandomValues():
            model = make()
    load_weights(model, read_tensors(weights))
    return model.eval()


def class_in(described: dict[str, Any], where: str | Path) -> Any:
    """Return the class of transformers that a config names, with its head, or AutoModel.

    Raises:
        ValueError: the class is none of transformers.
    """
    import transformers

    names = described.get("architectures") or ["AutoModel"]
    name = names[0] if isinstance(names, list) else names
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if kind is not transformers.AutoModel and not (
        isinstance(kind, type)
        and issubclass(kind, transformers.PreTrainedModel)
        and kind.__module__.startswith("transformers.models.")
    ):
        raise ValueError(
            f"model: expected a model loaded by its own class, {name!r:.100} in {where}, "
            "which is no model class of transformers, got None"
        )
    return kind


def load_transformers(
    name: str | Path, kind: Any, config: Any, *, new_parts: bool = False
) -> nn.Module:
    """Load a transformers model from a folder, or by its name on the hub.

    Args:
        name: folder or name.
        kind: class of transformers, or AutoModel.
        config: an instance of the config's class.
        new_parts: whether parts of the model that the weights lack altogether, such as a pooler,
            get initial values, with a warning. All other missing tensors raise ValueError.
    """
    is_folder = os.path.isdir(name)
    path = Path(name) / CONFIG if is_folder else name
    with library_errors(path, f"weights of a {type(config).__name__}"):
        stored = _check_size(Path(name), kind, config) if is_folder else {}
        model, info = kind.from_pretrained(
            name,
            config=config,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    missing = sorted(info["missing_keys"])
    new = _parts_without(model, missing) if new_parts else []
    absent = [name for name in missing if name.partition(".")[0] not in new]
    absent += [f"{name} of its shape" for name, *_ in info["mismatched_keys"]]
    if absent:
        raise ValueError(
            f"{name}: expected all weights of {type(model).__name__}, got none for "
            f"{', '.join(absent[:3])}{f' and {len(absent) - 3} more' if len(absent) > 3 else ''}"
        )
    if missing:
        warnings.warn(NewPartsWarning(name, type(model).__name__, new), stacklevel=2)
    if not getattr(config, "quantization_config", None):
        _check_kinds(Path(name), model, stored)
        check_finite(Path(name), model.state_dict())
    return model.eval()


def from_config(kind: Any, config: Any) -> nn.Module:
    """Return a transformers model with random weights; `kind` is as in `load_transformers`."""
    from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel

    if issubclass(kind, PreTrainedModel):
        return kind(config)
    if kind is AutoModel and type(config) not in MODEL_MAPPING:  # listing all takes seconds
        raise ValueError(f"{type(config).__name__} is of no model that AutoModel has")
    return kind.from_config(config, trust_remote_code=False)


def _parts_without(model: nn.Module, missing: list[str]) -> list[str]:
    """Return the children of a model of which all tensors are missing."""
    present = {name.partition(".")[0] for name in model.state_dict() if name not in missing}
    return sorted({name.partition(".")[0] for name in missing} - present)


def _check_size(folder: Path, kind: Any, config: Any) -> dict[str, Tensor]:
    """Return the header of the weights; ValueError if the config has many more numbers than they.

    The header is empty for weights in files of pickle.
    """
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"{folder}: expected a whole model, got an adapter; use PeftModel.from_pretrained"
        )
    stored = read_headers(folder)
    numbers = sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin"))
    if stored is not None:
        numbers = 2 * sum(tensor.numel() for tensor in stored.values())
    elif not numbers:
        raise FileNotFoundError(f"folder: expected model.safetensors in {folder}, got none")
    if getattr(config, "quantization_config", None) is not None:
        numbers *= PACKED
    outline = outline_of(lambda: from_config(kind, config))
    size = sum(tensor.numel() for tensor in (*outline.parameters(), *outline.buffers()))
    if size > numbers + SPARE:
        raise ValueError(
            f"model: expected at most {numbers + SPARE} numbers, by its file, got more"
        )
    return stored or {}


def _check_kinds(folder: Path, made: nn.Module, stored: dict[str, Tensor]) -> None:
    """Raise ValueError for stored weights that are no floats, by the last part of names."""
    weights = {name.rpartition(".")[2] for name, _ in made.named_parameters()}
    for name, tensor in stored.items():
        if name.rpartition(".")[2] in weights and kind_of(tensor) != "float":
            raise ValueError(f"{folder}: {name}: expected floating numbers, got {tensor.dtype}")
