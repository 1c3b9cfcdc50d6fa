"""Count how often a program waits for memory in Triton's interpreter.

    with counted_waits() as launches:
        elip_kernels.reduce(tokens, scores, 166)
    launches[0].waits

Loads that are in flight together are one wait. A program waits at a product, a reduction or a scan
for its operands. At the end of a loop trip, after a loop and at a branch it waits for all values
that it has computed with, but not for values that it only loaded, such as a tile for the next trip.
Elsewhere the compiler orders the code: a load waits only for the operands of its address and mask.
In a loop, loads that feed a product are issued `num_stages - 1` trips ahead, as Triton pipelines
them. In a loop with its own `num_stages` all loads are. A load without an active lane is not
counted.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple
from unittest.mock import patch

from elip_kernels._triton import tl

STAGES = 3  # Triton's default on NVIDIA
MEETS = ("create_dot", "create_histogram")


@dataclass
class LaunchWaits:
    """A launch: its arguments by name, and the waits of its slowest program."""

    kernel: str
    arguments: dict[str, Any]
    waits: int = 0


class _Availability(NamedTuple):
    """Number of waits before a value is available, and the loads in loops that it depends on."""

    waits: int = 0
    loads: frozenset[tuple["_Loop", int]] = frozenset()


class _Loop:
    """Body of a loop: loads of this trip, loads that feed a product, and loads issued ahead."""

    def __init__(self, *, all_ahead: bool = False) -> None:
        self.loads, self.feeding, self.all_ahead = 0, set[int](), all_ahead
        self.ahead: frozenset[int] = frozenset()


class _Program:
    """Number of waits of a program so far, and those after which used and loaded values arrive."""

    def __init__(self) -> None:
        self.now = self.used = self.last = 0
        self.body = _Loop()  # innermost loop

    def wait(self) -> None:
        """Wait for all values that the program has used."""
        self.now = max(self.now, self.used)

    def use(self, waits: int, *, meets: bool = False) -> None:
        """Use a value that arrives after `waits`; with `meets`, wait for it at once."""
        self.used = max(self.used, waits)
        self.now = max(self.now, waits) if meets else self.now

    def load(self, made_of: _Availability) -> _Availability:
        """Return the availability of a load whose address and mask have that of `made_of`."""
        load, waits = self.body.loads, 1 + max(self.now, made_of.waits)
        self.body.loads += 1
        if self.body.all_ahead or load in self.body.ahead:
            waits = self.now
        self.last = max(self.last, waits)
        return _Availability(waits, made_of.loads | {(self.body, load)})

    def feed(self, made_of: _Availability) -> None:
        """Mark the loads that a product depends on."""
        self.body.feeding |= {load for body, load in made_of.loads if body is self.body}

    def loop(self, in_flight: int, has_own_stages: bool, *bounds: Any) -> Iterator[int]:
        """Iterate as `range` and count waits; a trip known at compile time is no loop."""
        trips = range(*bounds)
        if len(trips) == 1 and not any(isinstance(n, tl.tensor) for n in bounds):
            yield from trips
            return
        self.wait()
        all_ahead = has_own_stages and in_flight > 1
        begin, first, around, self.body = self.now, 0, self.body, _Loop(all_ahead=all_ahead)
        self.now += all_ahead
        for index in trips:
            self.body.loads = 0
            yield index
            self.wait()
            first = first or self.now - begin
            self.body.ahead = frozenset(self.body.feeding if in_flight > 1 else ())
        if all_ahead or self.body.ahead:
            self.now = max(self.now, begin + ceil(first * len(trips) / in_flight))
        self.body = around


@contextmanager
def counted_waits() -> Iterator[list[LaunchWaits]]:
    """Append a `LaunchWaits` to the yielded list for every launch inside the block."""
    with ExitStack() as stack:
        counter = _Counter(stack)
        for where, name, value in counter.patches():
            stack.enter_context(patch.object(where, name, value))
        yield counter.launches


class _Counter:
    """Counts the waits of every launch by patching the interpreter."""

    def __init__(self, stack: ExitStack) -> None:
        self.launches: list[LaunchWaits] = []
        self.program, self.in_flight, self.stack = _Program(), 1, stack

    def patches(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        """Return (object, attribute, replacement) for each patch of the interpreter."""
        from triton.runtime import interpreter

        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        reduction = interpreter.ReduceScanOpInterface
        operations = {n: f for n, f in vars(builder).items() if n.startswith("create_")}
        del operations["create_load"]  # it calls create_masked_load
        return [
            (executor, "__call__", self.launched(executor.__call__)),
            (builder, "set_grid_idx", self.next_program(builder.set_grid_idx)),
            *((builder, n, self.computed(n, f)) for n, f in operations.items()),
            (reduction, "apply", self.reduced(reduction.apply)),
            (interpreter, "_patch_lang", self.language(interpreter._patch_lang)),
        ]

    def launched(self, execute: Callable[..., None]) -> Callable[..., None]:
        """Wrap the execution of a launch to record it."""

        def run(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.in_flight = max(1, kwargs.get("num_stages", STAGES) - 1)
            arguments = dict(zip(executor.arg_names, args, strict=False)) | kwargs
            self.launches.append(LaunchWaits(executor.fn.__name__, arguments))
            execute(executor, *args, **kwargs)
            self.end_program()

        return run

    def next_program(self, move_on: Callable[..., None]) -> Callable[..., None]:
        """Wrap the step to the next program to end the current one."""

        def run(builder: Any, *index: int) -> None:
            self.end_program()
            move_on(builder, *index)

        return run

    def end_program(self) -> None:
        """Update the waits of the launch and start a new program."""
        launch, program = self.launches[-1], self.program
        launch.waits = max(launch.waits, program.last, program.now)
        self.program = _Program()

    def computed(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap an operation: its result arrives with its operands; a load, one wait later."""

        def run(builder: Any, *args: Any) -> Any:
            there = _combined(args)
            self.program.use(there.waits, meets=name in MEETS)
            if name == "create_dot":
                self.program.feed(_combined(args[:2]))
            result = operation(builder, *args)
            if name == "create_masked_load" and args[1].data.any():
                there = self.program.load(there)
            for handle in result if isinstance(result, tuple) else (result,):
                if hasattr(handle, "data"):
                    handle.there = there
            return result

        return run

    def reduced(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a reduction or scan, which waits for its operands."""

        def run(reduction: Any, inputs: Any) -> Any:
            if not isinstance(inputs, tuple):
                return reduction.apply((inputs,))[0]
            there = _combined(each.handle for each in inputs)
            self.program.use(there.waits, meets=True)
            outputs = apply(reduction, inputs)
            for each in outputs:
                each.handle.there = there
            return outputs

        return run

    def language(self, patch_language: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Triton's own patches of the language to observe branches and loops."""

        def loop(*bounds: Any, num_stages: int | None = None, **options: Any) -> Iterator[int]:
            has_own_stages = num_stages is not None
            in_flight = max(1, int(num_stages) - 1) if has_own_stages else self.in_flight
            return self.program.loop(in_flight, has_own_stages, *bounds)

        def run(fn: Any, *args: Any) -> Any:
            scope = patch_language(fn, *args)
            to_bool = tl.tensor.__bool__

            def branch(tensor: Any) -> bool:
                if not sys._getframe(1).f_globals["__name__"].startswith("triton."):
                    self.program.use(_combined([tensor.handle]).waits)
                    self.program.wait()
                return to_bool(tensor)

            tl.tensor.__bool__, tl.range = branch, loop
            if fn.__globals__.setdefault("range", loop) is loop:
                self.stack.callback(fn.__globals__.pop, "range", None)
            return scope

        return run


def _combined(values: Iterable[Any]) -> _Availability:
    """Return the availability of a value that depends on all of these."""
    # A tuple of Triton 3.5 raises ValueError for an attribute that it does not have.
    attributes = [getattr(value, "__dict__", {}) for value in values]
    there = [each.get("there", _Availability()) for each in attributes]
    loads = frozenset[tuple[_Loop, int]]().union(*(each.loads for each in there))
    return _Availability(max((each.waits for each in there), default=0), loads)
