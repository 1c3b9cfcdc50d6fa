"""Adapters on disk, as `adapt_` put them into a model, and whatever else trains with them.

adapter.json                how the model was adapted
adapter_model.safetensors   the weights, by the names that peft gives them
adapter_config.json         LoRA's, as peft has it
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from elip_models.models.io.files import read_object, read_tensors
from elip_models.models.io.hub import staging_folder
from elip_models.models.peft.adapt import AdaptConfig, adapt_, adapted_layer_of

if TYPE_CHECKING:
    from elip_models.models.base import PretrainedModel

SETTINGS, WEIGHTS = "adapter.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names in a file of peft


def save_adapter(model: "PretrainedModel", folder: str | Path) -> Path:
    """Write what `adapt_` added and all that trains; returns the folder.

    Momentum encoders save their adapters, but no other parameter that follows one of `full`.
    LoRA is also read by peft: `PeftModel.from_pretrained(model, folder)` of the model as it was.

    Raises:
        ValueError: a model that is not adapted.
    """
    from safetensors.torch import save_file

    if model.adapted is None:
        raise ValueError("model: expected one that adapt_ has changed, got a plain one")
    with staging_folder(Path(folder)) as stage:
        if model.adapted.config.kind == "lora":
            model.peft_config["default"].save_pretrained(stage)
        weights = {name: p.detach().cpu().contiguous() for name, p in _saved(model).items()}
        save_file(weights, stage / WEIGHTS, metadata={"format": "pt"})
        settings = json.dumps(asdict(model.adapted.config), indent=2) + "\n"
        (stage / SETTINGS).write_text(settings, encoding="utf-8")
    return Path(folder)


def load_adapter_(model: "PretrainedModel", folder: str | Path) -> "PretrainedModel":
    """Adapt a model in place by what `save_adapter` wrote; returns it.

    Raises:
        FileNotFoundError: a folder without adapter.
        ValueError: an adapter of another model.
    """
    if not has_adapter(folder):
        raise FileNotFoundError(f"folder: expected {SETTINGS}, as save_adapter writes, in {folder}")
    values = read_object(Path(folder) / SETTINGS)
    tuples = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    adapt_(model, AdaptConfig.from_dict(tuples))
    weights, parameters = read_tensors(Path(folder) / WEIGHTS), _saved(model)
    shapes, expected = ({n: tuple(t.shape) for n, t in d.items()} for d in (weights, parameters))
    if other := sorted(shapes.items() ^ expected.items()):
        raise ValueError(f"folder: expected an adapter of this model, which differs in {other[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model


def has_adapter(folder: str | Path) -> bool:
    """Whether `save_adapter` wrote into the folder."""
    return (Path(folder) / SETTINGS).is_file()


def remove_adapter(folder: str | Path) -> None:
    """Let a folder hold none, where a plain model is saved into it."""
    (Path(folder) / SETTINGS).unlink(missing_ok=True)


def _saved(model: nn.Module) -> dict[str, nn.Parameter]:
    """What `save_adapter` writes, by the names that peft gives it."""
    return {
        PREFIX + name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or adapted_layer_of(name)
    }
