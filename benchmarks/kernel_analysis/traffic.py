"""Count the bytes that kernels read and write in Triton's interpreter.

    with traffic() as launches:
        elip_kernels.reduce(tokens, scores, 166)
    launches[0].loads["tokens"].unique

Tensors have the names of the kernel's pointers without `_ptr`, including outputs that a launcher
allocates. An active lane outside all tensors of its launch raises an error. Accesses are those of
the source; the compile report shows their width in the code.
"""

import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from elip_kernels.testing import call, launchers_on_cpu


@dataclass
class Access:
    """Bytes of one tensor that a launch loads, or that it stores.

    Attributes:
        requested: sum over all active lanes of all accesses.
        per_program: distinct bytes per program, summed over programs: traffic from L2 or memory.
        unique: distinct bytes of the launch: the minimum traffic from memory.
        rounds: largest number of loads (or stores) of this tensor in a program; not bytes.
    """

    requested: int = 0
    per_program: int = 0
    unique: int = 0
    rounds: int = 0


@dataclass
class LaunchTraffic:
    """Bytes that one launch accesses, by tensor."""

    kernel: str
    programs: int = 0
    loads: dict[str, Access] = field(default_factory=dict)
    stores: dict[str, Access] = field(default_factory=dict)

    @property
    def per_program(self) -> int:
        """Return the bytes that each program loads and stores, summed over programs."""
        return sum(access.per_program for access in self.accesses)

    @property
    def unique(self) -> int:
        """Return the distinct bytes that the launch loads and stores."""
        return sum(access.unique for access in self.accesses)

    @property
    def accesses(self) -> list[Access]:
        """Return the loads and the stores of all tensors."""
        return [*self.loads.values(), *self.stores.values()]


class Memory:
    """The interpreter's memory, after `visit(kind, pointers, mask)`, which returns the pointers."""

    def __init__(self, memory: Any, visit: Callable[[str, np.ndarray, np.ndarray], np.ndarray]):
        self._memory, self._visit = memory, visit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> Any:
        """Load from the pointers that `visit` returns."""
        return self._memory.load(self._visit("load", pointers, mask), mask, other, dtype)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        """Store to the pointers that `visit` returns."""
        return self._memory.store(self._visit("store", pointers, mask), value, mask)

    def atomic_rmw(self, *args: Any) -> Any:
        """Raise NotImplementedError."""
        raise NotImplementedError("an atomic operation: only loads and stores are counted")

    atomic_cas = atomic_rmw


@contextmanager
def traffic() -> Iterator[list[LaunchTraffic]]:
    """Append a `LaunchTraffic` to the yielded list for every launch inside the block.

    Raises:
        IndexError: an active lane is outside all tensors; the message names kernel and tensor.
    """
    from triton.runtime import interpreter

    launches: list[LaunchTraffic] = []
    counter: _Counter
    execute = interpreter.GridExecutor.__call__
    move_on = interpreter.InterpreterBuilder.set_grid_idx

    def counted(executor: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal counter
        counter = _Counter(executor.fn.__name__, tensor_arguments(executor.fn, args, kwargs))
        launches.append(counter.launch)
        try:
            execute(executor, *args, **kwargs)
        except interpreter.InterpreterError as error:
            raise _root(error) from None
        counter.end_program()
        counter.end_launch()

    def next_program(builder: Any, *index: int) -> None:
        counter.end_program()
        counter.launch.programs += 1
        move_on(builder, *index)

    memory = Memory(interpreter._interpreter, lambda *access: counter.visit(*access))
    with (
        patch.object(interpreter, "_interpreter", memory),
        patch.object(interpreter.GridExecutor, "__call__", counted),
        patch.object(interpreter.InterpreterBuilder, "set_grid_idx", next_program),
    ):
        yield launches


def tensor_arguments(
    kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a launch by the name of their pointer, without `_ptr`."""
    parameters = inspect.signature(kernel).parameters
    bound = dict(zip(parameters, args, strict=False)) | kwargs
    tensors = {n: v for n, v in bound.items() if n in parameters and torch.is_tensor(v)}
    return {name.removesuffix("_ptr"): tensor for name, tensor in tensors.items()}


def _root(error: BaseException) -> BaseException:
    """Return the innermost cause of an interpreter error; device functions wrap it again."""
    return error if error.__cause__ is None else _root(error.__cause__)


class _Span:
    """Addresses of one tensor, and which of its elements were accessed."""

    def __init__(self, tensor: torch.Tensor):
        last = sum(
            (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        self.start, self.itemsize = tensor.data_ptr(), tensor.element_size()
        self.length = last + 1 if tensor.numel() else 0
        positions = torch.arange(self.length).as_strided(tensor.shape, tensor.stride())
        self.is_element = np.zeros(self.length, bool)
        self.is_element[positions.numpy()] = True
        self.touched: dict[str, np.ndarray] = {}  # by kind, in the launch
        self.current: dict[str, np.ndarray] = {}  # by kind, in the program
        self.rounds: Counter[str] = Counter()  # by kind, in the program

    def inside(self, pointers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which pointers are elements of the tensor, and the indices of those elements."""
        offset = pointers.astype(np.int64) - self.start
        element = offset // self.itemsize
        mine = (offset >= 0) & (element < self.length) & (offset % self.itemsize == 0)
        mine[mine] = self.is_element[element[mine]]
        return mine, element[mine]


class _Counter:
    """Counter of one launch."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor]):
        self.launch = LaunchTraffic(kernel)
        self.spans = {name: _Span(tensor) for name, tensor in tensors.items()}

    def visit(self, kind: str, pointers: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Attribute every active lane to a tensor, or raise IndexError."""
        lanes = np.asarray(pointers)[np.broadcast_to(mask, np.shape(pointers)).astype(bool)]
        for name, span in self.spans.items():
            mine, elements = span.inside(lanes)
            if elements.size:
                self._access(kind, name).requested += elements.size * span.itemsize
                empty = np.zeros(span.length, bool)
                span.current.setdefault(kind, empty)[elements] = True
                span.rounds[kind] += 1
                lanes = lanes[~mine]
        if lanes.size:
            raise IndexError(self._outside(kind, lanes))
        return pointers

    def end_program(self) -> None:
        """Add the accesses of the program to those of the launch."""
        for name, span in self.spans.items():
            for kind, touched in span.current.items():
                access = self._access(kind, name)
                access.per_program += int(touched.sum()) * span.itemsize
                access.rounds = max(access.rounds, span.rounds[kind])
                span.touched[kind] = span.touched.get(kind, False) | touched
            span.current, span.rounds = {}, Counter()

    def end_launch(self) -> None:
        """Store the distinct bytes of the launch."""
        for name, span in self.spans.items():
            for kind, touched in span.touched.items():
                self._access(kind, name).unique = int(touched.sum()) * span.itemsize

    def _access(self, kind: str, name: str) -> Access:
        accesses = self.launch.loads if kind == "load" else self.launch.stores
        return accesses.setdefault(name, Access())

    def _outside(self, kind: str, lanes: np.ndarray) -> str:
        below = {n: int(lanes[0]) - s.start for n, s in self.spans.items() if s.start <= lanes[0]}
        name = min(below, key=lambda n: below[n], default=None)
        where = "" if name is None else f", the first {below[name]} bytes after the start of {name}"
        return f"{self.launch.kernel}: {kind} of {lanes.size} lanes outside every tensor{where}"


def moved_over_distinct(ops: Sequence[str]) -> dict[str, float]:
    """Return the bytes that programs access over the distinct ones, by kernel of these ops.

    They are those of one image of a ViT-B with 257 tokens in bf16.
    """
    with launchers_on_cpu(), traffic() as launches:
        for op in ops:
            call(op, 1, 257, 768, 166, 12, torch.bfloat16)
    return {launch.kernel: round(launch.per_program / launch.unique, 3) for launch in launches}


if __name__ == "__main__":
    json.dump(moved_over_distinct(sys.argv[1:]), sys.stdout)
