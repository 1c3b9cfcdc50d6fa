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
    """Modules that are referred to weakly."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.references = tuple(map(_weak, modules))

    def __getitem__(self, i: int) -> Any:
        return existing(self.references[i])

    def __iter__(self) -> Iterator[Any]:
        return map(existing, self.references)

    def __len__(self) -> int:
        return len(self.references)


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
    if isinstance(value, tuple | list):
        return WeakModules(value)
    return ref(value) if isinstance(value, nn.Module) else value


def _strong(value: Any) -> Any:
    if isinstance(value, WeakModules):
        return tuple(map(_strong, value.references))
    return value() if isinstance(value, ref) else value
