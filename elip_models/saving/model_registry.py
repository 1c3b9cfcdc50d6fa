"""Models that another package makes by name: `elip_models.pretraining` has those of the paper.

A source is a module, imported on first use, with these functions:

    list_models()                                names of models
    create_model(name, pretrained, **options)    the model of a name
    is_family(value)                             whether config.json's "model" is one of its own
    load_model(folder, **options)                a model that `save_pretrained` wrote
    from_config(family, values)                  a model with random weights
"""

from importlib import import_module
from types import ModuleType
from typing import Any

SOURCES: list[str] = []
"""Names of modules, registered by the packages that have them."""


def register_models(module: str) -> None:
    """Add a source of models, by the name of its module."""
    if module not in SOURCES:
        SOURCES.append(module)


def registered_names() -> list[str]:
    """Return the names of the models of all sources."""
    return [name for source in _sources() for name in source.list_models()]


def source_of_name(name: str) -> ModuleType | None:
    """Return the source that lists a name, or None."""
    return next((source for source in _sources() if name in source.list_models()), None)


def source_of_family(value: Any) -> ModuleType | None:
    """Return the source whose models have this value as "model" in config.json, or None."""
    return next((source for source in _sources() if source.is_family(value)), None)


def _sources() -> list[ModuleType]:
    return [import_module(name) for name in SOURCES]
