"""Towers: image models of other libraries, read as embedding, blocks, attention, MLP and norm.

A tower reads a model's own modules and adds nothing to it. `as_tower` returns the tower of an image
model, `as_image_text` that of a whole language-image model, whose text can guide its image tower.
"""

from importlib import import_module
from typing import Any, NamedTuple

from torch import nn

from elip_models.towers.base import Tower
from elip_models.towers.in_place import in_forward
from elip_models.towers.nested_modules import outermost
from elip_models.towers.reducible_model import (
    ImageModel,
    ImageTextModel,
    ReducibleModel,
    SelfReducingModel,
)
from elip_models.towers.tower_data import Projections, Query, TowerSize
from elip_models.towers.unsupported import check_module, other_reason
from elip_models.towers.wrapped_modules import refuses_sharding
from elip_models.validation import require_extra

__all__ = [
    "ImageTextModel",
    "Projections",
    "Query",
    "ReducibleModel",
    "SelfReducingModel",
    "Tower",
    "TowerSize",
    "as_image_text",
    "as_reducible",
    "as_tower",
    "check_module",
    "in_forward",
    "is_reducible",
    "library_of",
    "without_adapter",
]


class Adapter(NamedTuple):
    """The classes that read a library's models, as (file, class).

    The first that accepts a model decides whether it can be reduced.

    towers: for image models.
    image_texts: for whole language-image models.
    """

    towers: tuple[tuple[str, str], ...]
    image_texts: tuple[tuple[str, str], ...]


ADAPTERS = {
    "timm": Adapter(
        (
            ("eva", "EvaTower"),
            ("timm_bias", "BiasTower"),
            ("timm_naflex", "RotaryNaFlexTower"),
            ("timm_naflex", "NaFlexTower"),
            ("timm", "TimmTower"),
        ),
        (),
    ),
    "open_clip": Adapter((("open_clip", "OpenClipTower"),), (("open_clip", "OpenClipImageText"),)),
    "transformers": Adapter(
        (("hf", "HFTower"),),
        tuple(("hf_image_text", name) for name in ("HFClip", "HFSiglip", "HFBlip")),
    ),
}


def as_tower(model: nn.Module) -> Tower:
    """Return the tower of an image model.

    Raises:
        TypeError: the model cannot be reduced, with the reason.
        ImportError: a library is missing.
    """
    check_module(model)
    model = _image_model(without_adapter(model))
    _check_sharding(model)
    library = library_of(model)
    if library is None:
        raise TypeError(
            f"model: expected an image model of {', '.join(ADAPTERS)}, got "
            f"{type(model).__name__}: {other_reason(model, models_inside(model))}"
        )
    towers = (_load(name) for name in ADAPTERS[library].towers)
    tower = next(tower for tower in towers if tower.accepts(model))
    reason = tower.refuses(model)
    if reason is not None:
        raise TypeError(
            f"model: expected an image model of {library} that can be reduced, got "
            f"{type(model).__name__}: {reason}"
        )
    return tower(model)


def models_inside(model: object) -> list[str]:
    """Return how code writes the models in a wrapper that can be reduced."""
    return [*outermost(model, is_reducible)] if isinstance(model, nn.Module) else []


def is_reducible(model: nn.Module) -> bool:
    """Return whether a module is a model that can be reduced, and no wrapper around one."""
    if library_of(without_adapter(model)) is None:
        return isinstance(model, ReducibleModel)
    try:
        as_reducible(model)
    except TypeError:
        return False
    return True


def as_image_text(model: nn.Module) -> ImageTextModel | None:
    """Return the whole language-image model, or None if it is an image model alone."""
    model = without_adapter(model)
    _check_sharding(model)
    library = library_of(model)
    if library is None:
        return None
    adapters = (_load(name) for name in ADAPTERS[library].image_texts)
    adapter = next((adapter for adapter in adapters if adapter.accepts(model)), None)
    return None if adapter is None else adapter(model)


def without_adapter(model: nn.Module) -> nn.Module:
    """Return the model inside a peft model; any other as it is."""
    is_peft = any(cls.__module__ == "peft.peft_model" for cls in type(model).__mro__)
    return model.get_base_model() if is_peft else model


def _image_model(model: nn.Module) -> nn.Module:
    """Return the timm model inside open_clip's TimmModel or timm's features_only=True."""
    names = {f"{cls.__module__}.{cls.__name__}" for cls in type(model).__mro__}
    if "open_clip.timm_model.TimmModel" in names:
        return model.trunk
    return model.model if "timm.models._features.FeatureGetterNet" in names else model


def as_reducible(model: nn.Module) -> ReducibleModel:
    """Return the model in the form that profiling and visualization read.

    Args:
        model: a model of this project, a whole language-image model of another library, or an image
            model alone.

    Raises:
        TypeError: the model cannot be reduced, with the reason.
        ImportError: a library is missing.
    """
    if isinstance(model, ReducibleModel):
        return model
    image_text = as_image_text(model)
    if image_text is None or image_text.refuses() is not None:
        return ImageModel(as_tower(model if image_text is None else image_text.image_model))
    return image_text


def _check_sharding(model: nn.Module) -> None:
    reason = refuses_sharding(model) if isinstance(model, nn.Module) else None
    if reason is not None:
        raise TypeError(
            f"model: expected one that can be reduced, got {type(model).__name__}: {reason}"
        )


def library_of(model: nn.Module) -> str | None:
    """Return the library that defines the model's class or a base class of it, or None."""
    roots = (cls.__module__.split(".")[0] for cls in type(model).__mro__)
    return next((root for root in roots if root in ADAPTERS), None)


def _load(name: tuple[str, str]) -> Any:
    file, cls = name
    with require_extra("elip_models"):
        return getattr(import_module(f"elip_models.towers.{file}"), cls)
