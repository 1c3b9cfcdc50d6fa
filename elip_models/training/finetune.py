"""The recipe that fine-tunes a saved model for a downstream task.

    finetune/vqa_albef    the originals' settings, by task and family
    finetune/vqa_tiny     on the built-in world, for any family

What shapes the weights is the saved model's; the recipe may say another image size, and how long a
text is, where the model has places for it. Its image tower is dense unless asked otherwise, as in
the paper.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from elip_models.models.config import ContrastiveConfig, TextReductionConfig, VisionConfig
from elip_models.models.io.files import read_config
from elip_models.models.registry import CONFIGS, MODELS, downstream_of, family_of, inherited_fields
from elip_models.tasks.registry import TASKS
from elip_models.training.recipe import FINETUNE, recipe_names, recipe_with
from elip_models.training.run_config import RunConfig
from elip_models.training.training_data import input_fields
from elip_models.validation import ConfigError, as_config_error, did_you_mean

REDUCTION = {
    each.name for config in (ContrastiveConfig, TextReductionConfig) for each in fields(config)
} - {each.name for each in fields(VisionConfig)}


def finetune_recipe(
    task: str, start: Path, overrides: Mapping[str, Any], *, reduced: bool = False
) -> RunConfig:
    """The recipe of a run that fine-tunes the model in the folder `start`.

    Args:
        task: its name, for the recipe of the model's family; or the name or path of a recipe.
        start: as `save_pretrained` or `elip train` wrote it.
        overrides: dotted keys of the recipe.
        reduced: the image tower as the saved model reduces it; what the task's model has no place
            for, such as another guide, is left out.

    Raises:
        ConfigError: an unknown task or recipe, a folder of other content, or a setting that cannot
            be.
    """
    with as_config_error("--from"):
        folder = start / "model" if (start / "model" / "config.json").is_file() else start
        family, config = _saved(folder)
    recipe = _recipe_of(task, family)
    begun = {
        "model.name": next(name for name in CONFIGS if family_of(name) is MODELS[family]),
        "model.pretrained": str(folder),
        "data.tokenizer": str(folder),
        **overrides,
    }
    chosen = recipe_with(recipe, begun)
    if chosen.task is None:
        raise ConfigError(f"recipe {recipe}: expected one with a task, got none")
    with as_config_error("task"):
        model = downstream_of(MODELS[family], chosen.task)
    dropped = {"gather", *input_fields(chosen.data)} | (set() if reduced else REDUCTION)
    if "max_positions" in config:  # there is room: a text is as long as the recipe says
        dropped.add("context_length")
    kept = {n: value for n, value in inherited_fields(model, config).items() if n not in dropped}
    return recipe_with(recipe, begun, kept)


def _saved(folder: Path) -> tuple[str, dict[str, Any]]:
    """Family, of pre-training, and config of a folder."""
    family, config = read_config(folder)
    if family not in MODELS:
        raise ValueError(f"expected a folder of one of our models, got {folder}")
    if MODELS[family].task is not None:
        family = MODELS[family].pretraining.family
    return family, config


def _recipe_of(task: str, family: str) -> str:
    """The recipe that a name says."""
    names = [name.removeprefix(f"{FINETUNE}/") for name in recipe_names(FINETUNE)]
    if task in TASKS:
        with as_config_error("TASK"):
            downstream_of(MODELS[family], task)
        task = f"{task}_{family}"
    if task in names:
        return f"{FINETUNE}/{task}"
    if task.endswith((".yaml", ".yml")):
        return task
    raise ConfigError(
        f"TASK: expected one of {', '.join(TASKS)}, a recipe of {', '.join(names)}, or a YAML "
        f"file, got {task!r}{did_you_mean(task, [*TASKS, *names])}"
    )
