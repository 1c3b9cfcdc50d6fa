"""Which modules of a model are its own, if it contains other models."""

from collections.abc import Callable

from torch import nn


def modules_around(model: nn.Module, part: nn.Module) -> list[nn.Module]:
    """Return the modules from a model to its part, both included."""
    path = next(name for name, module in model.named_modules() if module is part)
    names = path.split(".") if path else []
    return [model.get_submodule(".".join(names[:i])) for i in range(len(names) + 1)]


def modules_outside(
    model: nn.Module, is_other: Callable[[nn.Module], bool]
) -> list[nn.Module]:
    """Return the modules of a model, without those of which `is_other` is true and their parts."""
    own: dict[nn.Module, None] = {}

    def add(module: nn.Module) -> None:
        if module not in own and not is_other(module):
            own[module] = None
            for child in module.children():
                add(child)

    add(model)
    return list(own)


def outermost(
    model: nn.Module, is_wanted: Callable[[nn.Module], bool]
) -> dict[str, nn.Module]:
    """Return the outermost modules of which `is_wanted` is true, by how code writes them."""
    wanted: dict[nn.Module, str] = {}
    seen: set[nn.Module] = set()

    def search(module: nn.Module, name: str) -> None:
        if module in seen:
            return
        seen.add(module)
        if is_wanted(module):
            wanted[module] = name
            return
        for child, inner in module.named_children():
            search(inner, f"{name}[{child}]" if child.isdigit() else f"{name}.{child}")

    search(model, "model")
    return {name: module for module, name in wanted.items()}
