"""Saving and loading of the adapters that `adapt_` adds, and of the other parameters that train.

adapter.json                the settings of `adapt_`
adapter_model.safetensors   the weights, under the names that peft uses
adapter_config.json         for LoRA: the configuration in the format of peft
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from elip_models.integrations.peft.adapt import Model, adapt_, adapted_layer_of
from elip_models.integrations.peft.adapt_config import AdaptConfig
from elip_models.integrations.peft.adaptable_model import AdaptableModel
from elip_models.saving.files import read_object, read_tensors, write_json, write_tensors
from elip_models.saving.saved_folder import ADAPTER_FILES, saved_folder
from elip_models.saving.weights import kind_of
from elip_models.validation import as_config_error

SETTINGS, WEIGHTS = "adapter.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names in a file of peft


def save_adapter(model: AdaptableModel, folder: str | Path) -> Path:
    """Write the adapters and all other trainable parameters; returns the folder.

    For momentum encoders only the adapters are saved. `PeftModel.from_pretrained(model, folder)`
    also reads LoRA, where `model` is the model before `adapt_`.

    Raises:
        ValueError: the model has no adapters.
    """
    if model.adapted is None:
        raise ValueError("model: expected one with adapters, got a plain one; call adapt_ first")
    with saved_folder(folder, ADAPTER_FILES) as new:
        if model.adapted.config.kind == "lora":
            model.peft_config["default"].save_pretrained(new)
        write_tensors(new / WEIGHTS, _saved(model))
        write_json(new / SETTINGS, asdict(model.adapted.config))
    return Path(folder)


def load_adapter_(model: Model, folder: str | Path) -> Model:
    """Add the adapters that `save_adapter` wrote to a model in place; returns the model.

    Raises:
        FileNotFoundError: the folder has no adapter.
        ValueError: the adapter belongs to another model.
    """
    if not has_adapter(folder):
        raise FileNotFoundError(f"folder: expected {SETTINGS}, as save_adapter writes, in {folder}")
    values = read_object(Path(folder) / SETTINGS)
    tuples = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    with as_config_error(str(Path(folder) / SETTINGS)):
        config = AdaptConfig.from_dict(tuples)
        weights = read_tensors(Path(folder) / WEIGHTS)
        _check_rank(config, weights)
        adapt_(model, config)
    parameters = _saved(model)
    shapes, expected = (
        {name: (tuple(tensor.shape), kind_of(tensor)) for name, tensor in tensors.items()}
        for tensors in (weights, parameters)
    )
    if other := sorted(shapes.items() ^ expected.items()):
        raise ValueError(f"folder: expected an adapter of this model, which differs in {other[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model


def _check_rank(config: AdaptConfig, weights: dict[str, Tensor]) -> None:
    """Raise ValueError if the adapters would be larger than those in the file."""
    field, down = ("r", "lora_A") if config.kind == "lora" else ("width", "adapter_down")
    rank = getattr(config, field)
    shapes = {n: tuple(w.shape) for n, w in weights.items() if f".{down}.weight" in n}
    others = [f"{name} of {shape}" for name, shape in shapes.items() if shape[:1] != (rank,)]
    if config.kind is not None and (others or not shapes):
        stored = others[0] if others else f"no {down}"
        raise ValueError(f"{field}: expected the first size in {WEIGHTS}, {stored}, got {rank}")


def has_adapter(folder: str | Path) -> bool:
    """Return whether the folder contains an adapter of `save_adapter`."""
    return (Path(folder) / SETTINGS).is_file()


def _saved(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters to write, under the names that peft uses."""
    return {
        PREFIX + name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or adapted_layer_of(name)
    }
