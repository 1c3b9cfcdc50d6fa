"""Which modules of a model are its own, if it contains other models."""

from collections.abc import Callable, Iterator

from torch import nn

Test = Callable[[nn.Module], bool]


def modules_around(model: nn.Module, part: nn.Module) -> list[nn.Module]:
    """Return the modules from a model to its part, both included."""
    path = next(name for name, module in model.named_modules() if module is part)
    names = path.split(".") if path else []
    return [model.get_submodule(".".join(names[:i])) for i in range(len(names) + 1)]


def modules_outside(model: nn.Module, is_other: Test) -> list[nn.Module]:
    """Return the modules of a model, except those of other models inside it (`is_other`)."""
    return [module for _, module, ends in _walk(model, "model", is_other, set()) if not ends]


def outermost(model: nn.Module, is_wanted: Test) -> dict[str, nn.Module]:
    """Return the outermost modules of which `is_wanted` is true, by how code writes them."""
    return {name: m for name, m, ends in _walk(model, "model", is_wanted, set()) if ends}


def _walk(
    module: nn.Module, name: str, ends: Test, seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield names and modules from the outside, and whether `ends` is true; then no inner ones."""
    if module in seen:
        return
    seen.add(module)
    is_end = ends(module)
    yield name, module, is_end
    for child, inner in () if is_end else module.named_children():
        inner_name = f"{name}[{child}]" if child.isdigit() else f"{name}.{child}"
        yield from _walk(inner, inner_name, ends, seen)
