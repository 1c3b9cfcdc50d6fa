"""State dicts with one name for each tensor, also where a model shares it, as tied embeddings."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn


def first_names(model: nn.Module) -> dict[str, str]:
    """Return the first name of the same tensor for each name of the state dict."""
    firsts: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    return {name: firsts.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> None:
    """Load a state dict that may have a tied tensor under one of its names.

    allow_missing are patterns of names, `*` for any part, that keep the model's own values;
    allow_unexpected those of names in `weights` that are ignored. ValueError lists names that are
    missing or unexpected, and shapes that differ; the model is unchanged then.
    """
    check_weights(model, weights, allow_missing=allow_missing, allow_unexpected=allow_unexpected)
    first, state = first_names(model), model.state_dict()
    by_first = {first[name]: weight for name, weight in weights.items() if name in first}
    model.load_state_dict({name: by_first.get(first[name], state[name]) for name in state})


def check_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> None:
    """Raise the errors of `load_weights`, for a model that may be on the meta device."""
    first, state = first_names(model), model.state_dict()
    by_first = {first[name] for name in weights if name in first}
    absent = [name for name in state if first[name] not in by_first]
    missing = [name for name in absent if not matches_any(name, allow_missing)]
    others = [name for name in weights if name not in state]
    unexpected = [name for name in others if not matches_any(name, allow_unexpected)]
    shapes = [
        f"{name} {tuple(state[name].shape)}, got {tuple(weight.shape)}"
        for name, weight in weights.items()
        if name in state and weight.shape != state[name].shape
    ]
    dtypes = [
        f"{name} {state[name].dtype}, got {weight.dtype}"
        for name, weight in weights.items()
        if name in state and kind_of(weight) != kind_of(state[name])
    ]
    errors = {"missing": missing, "unexpected": unexpected, "expected shape": shapes}
    errors["expected dtype"] = dtypes
    if any(errors.values()):
        raise ValueError(
            "weights: expected the names and shapes of the model; "
            + "; ".join(f"{what}: {', '.join(names)}" for what, names in errors.items() if names)
        )


def kind_of(tensor: Tensor) -> str:
    """Return 'float', 'complex', 'bool' or 'int': what copying into another kind changes."""
    if tensor.dtype == torch.bool:
        return "bool"
    return "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "int"


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name matches one of the patterns, `*` for any part."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
