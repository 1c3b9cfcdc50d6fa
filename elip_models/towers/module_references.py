"""Attributes that refer to modules, strongly or weakly.

A reduced model has the objects that reduce it. If these held the model, only the garbage collector
could free its memory. So they refer to its modules by weak references. A copy or a pickle of such
an object has strong ones, so that the modules are copied too, until the copy is made.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar
from weakref import ref

from torch import nn

T = TypeVar("T")
PREFIX = "_to_"


class ModuleReference:
    """A class attribute that makes an attribute of its objects refer to a module.

    Reading it raises ReferenceError if the module is referred to weakly, and does not exist.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = PREFIX + name

    def __get__(self, holder: Any, owner: type | None = None) -> Any:
        value = getattr(holder, self.name)
        return value if isinstance(value, nn.Module | Sequence) else existing(value)

    def __set__(self, holder: Any, value: Any) -> None:
        setattr(holder, self.name, value)


class WeakModules(Sequence):
    """The items of a list of modules, or the modules that it had if the model has another list.

    Both are referred to weakly. Code may replace an item by a wrapper, or the list by another one.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.container = ref(modules) if isinstance(modules, nn.Module) else None
        self.references = [None if module is None else ref(module) for module in modules]

    @property
    def present(self) -> Any:
        """Return the list, or the modules' references if there is another one."""
        modules = None if self.container is None else self.container()
        return self.references if modules is None else modules

    def __getitem__(self, i: int) -> Any:
        item = self.present[i]
        return item if isinstance(item, nn.Module) else existing(item)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self.present)


def existing(reference: "ref[nn.Module] | None") -> nn.Module:
    """Return the module of a weak reference; raise ReferenceError if it does not exist any more."""
    module = None if reference is None else reference()
    if module is None:
        raise ReferenceError(
            "model: expected the reduced model that this part belongs to, got one that was "
            "deleted; keep a reference to it, or unreduce_ it before its part is taken or copied"
        )
    return module


def is_gone(holder: Any, name: str) -> bool:
    """Return whether an attribute refers to a module that does not exist any more."""
    return _strong(vars(holder)[PREFIX + name]) is None


def weakly(holder: T) -> T:
    """Return a copy whose references to modules are weak."""
    return _changed(holder, _weak)


def strongly(holder: T) -> T:
    """Return a copy whose references to modules are strong."""
    return _changed(holder, _strong)


def _changed(holder: T, change: Callable[[Any], Any]) -> T:
    changed = object.__new__(type(holder))
    for name, value in vars(holder).items():
        vars(changed)[name] = change(value) if name.startswith(PREFIX) else value
    return changed


def _weak(value: Any) -> Any:
    if isinstance(value, nn.ModuleList | nn.Sequential | tuple | list):
        return WeakModules(value)
    return ref(value) if isinstance(value, nn.Module) else value


def _strong(value: Any) -> Any:
    if isinstance(value, WeakModules):
        present = value.present
        return present if isinstance(present, nn.Module) else tuple(map(_strong, present))
    return value() if isinstance(value, ref) else value
