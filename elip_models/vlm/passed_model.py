"""The model that a call of `reduce_` or of its companions acts on.

It is the model that was passed, with its own image tower. A wrapper stands for the one model inside
it: DistributedDataParallel, torch.compile, an average of weights, or any other module without a
tower of its own. A model inside another one, such as a teacher that a student has as an attribute,
is never meant.
"""

from torch import nn

from elip_models.engine.install import reduction_of
from elip_models.towers import is_reducible
from elip_models.towers.nested_modules import outermost
from elip_models.vlm.families import find_multimodal


def passed_model(model: nn.Module) -> nn.Module:
    """Return the model, or the only one in a wrapper; the wrapper itself if it has none.

    Raises:
        ValueError: a wrapper around several models.
    """
    inside = models_in(model)
    if len(inside) > 1:
        raise ValueError(
            f"model: expected one model, got a {type(model).__name__} with {len(inside)} of them; "
            f"pass {' or '.join(inside)}"
        )
    return next(iter(inside.values()), model)


def models_in(model: nn.Module) -> dict[str, nn.Module]:
    """Return the models that a module is or wraps, by how code writes them."""
    return outermost(model, _is_model)


def _is_model(module: nn.Module) -> bool:
    """Return whether the module is a model of its own, and no wrapper and no part of one."""
    is_own = is_reducible(module) or find_multimodal(module) is not None
    return is_own or reduction_of(module) is not None
