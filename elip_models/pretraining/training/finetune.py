"""The recipe that fine-tunes a saved model for a downstream task.

    finetune/vqa_albef    settings of the original papers, one recipe for each task and family
    finetune/vqa_tiny     built-in data, for any family

The architecture comes from the saved model. The recipe may set another image size, and another text
length up to the number of the model's text positions. As in the paper, the image tower is dense by
default.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.config import (
    ReductionConfig,
    TextReductionConfig,
    VisionConfig,
)
from elip_models.pretraining.models.registry import (
    CONFIGS,
    MODELS,
    downstream_of,
    family_of,
    inherited_fields,
)
from elip_models.pretraining.tasks.registry import TASKS
from elip_models.pretraining.training.recipe import FINETUNE, recipe_with
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.training_data import input_fields
from elip_models.saving.files import read_config
from elip_models.validation import ConfigError, as_config_error

REDUCTION = {
    field.name for config in (ReductionConfig, TextReductionConfig) for field in fields(config)
} - {field.name for field in fields(VisionConfig)}


def finetune_recipe(
    task: str, folder: Path, overrides: Mapping[str, Any], *, reduced: bool = False
) -> RunConfig:
    """Return the recipe of a run that fine-tunes the model in `folder`.

    `task` is a task, for which the model's family has a recipe, or the name or path of a recipe.
    With `reduced`, the image tower is reduced as in the saved model; options that the task's model
    does not have, such as text reduction, are dropped.
    """
    with as_config_error("--from"):
        if (folder / "model" / "config.json").is_file():
            folder = folder / "model"
        family, config = read_pretrained(folder)
    with as_config_error("TASK"):
        recipe = recipe_of(task, family)
    return recipe_for(recipe, family, config, folder, overrides, reduced=reduced)


def read_pretrained(folder: Path) -> tuple[type[PretrainedModel], dict[str, Any]]:
    """Return the pre-training class of a saved model, and its config.

    Raises:
        ValueError: a model of another library.
    """
    family, config = read_config(folder)
    if family not in MODELS:
        raise ValueError(f"expected a folder with a model of this library, got {folder}")
    model = MODELS[family]
    return (model if model.task is None else model.pretraining), config


def recipe_for(
    recipe: str,
    family: type[PretrainedModel],
    config: dict[str, Any],
    folder: Path,
    overrides: Mapping[str, Any],
    *,
    reduced: bool,
) -> RunConfig:
    """Return the recipe that fine-tunes a model of a pre-trained family with this config.

    The model is that in `folder`, which need not exist yet. See `finetune_recipe`.
    """
    initial = {
        "model.name": next(name for name in CONFIGS if family_of(name) is family),
        "model.pretrained": str(folder),
        "data.tokenizer": str(folder),
        **overrides,
    }
    chosen = recipe_with(recipe, initial)
    if chosen.task is None:
        raise ConfigError(f"recipe {recipe}: expected one with a task, got none")
    with as_config_error("task"):
        model = downstream_of(family, chosen.task)
    dropped = {"gather", *input_fields(chosen.data)} | (set() if reduced else REDUCTION)
    if "max_positions" in config:  # more positions than the text length, which the recipe sets
        dropped.add("context_length")
    kept = {n: value for n, value in inherited_fields(model, config).items() if n not in dropped}
    return recipe_with(recipe, initial, kept)


def recipe_of(task: str, family: type[PretrainedModel]) -> str:
    """Return the recipe that `family` has for a task; other names and paths as they are.

    Raises:
        ValueError: a task that the family does not have.
    """
    if task not in TASKS:
        return task
    downstream_of(family, task)
    return f"{FINETUNE}/{task}_{family.family}"
