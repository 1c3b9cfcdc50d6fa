"""State dicts in which a tensor that has several names, such as tied embeddings, stands once."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn


def first_names(model: nn.Module) -> dict[str, str]:
    """Map each name of the state dict to the first name of the same tensor."""
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
    """Load a state dict that may name a tied tensor once.

    Args:
        weights: by the model's names.
        allow_missing: patterns of names, `*` for any part, that keep the model's own values.
        allow_unexpected: patterns of names in `weights` that are left aside.

    Raises:
        ValueError: names that are missing or unexpected, or shapes that differ, all listed; the
            model is unchanged then.
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
    """Raises as `load_weights` does, of a model that may be on the meta device."""
    first, state = first_names(model), model.state_dict()
    by_first = {first[name] for name in weights if name in first}
    missing = [
        name for name in state if first[name] not in by_first and not _matches(name, allow_missing)
    ]
    unexpected = [
        name for name in weights if name not in state and not _matches(name, allow_unexpected)
    ]
    shapes = [
        f"{name} {tuple(state[name].shape)}, got {tuple(weight.shape)}"
        for name, weight in weights.items()
        if name in state and weight.shape != state[name].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "expected shape": shapes}
    if any(faults.values()):
        raise ValueError(
            "weights: expected those of the model; "
            + "; ".join(f"{what}: {', '.join(names)}" for what, names in faults.items() if names)
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
