"""Counts how often a program waits for memory, while the interpreter runs it.

    with counted_waits() as launches:
        elip_kernels.reduce(tokens, scores, 166)
    launches[0].waits

Loads that are under way together are one wait. A program waits where its threads meet, in a
product, a reduction or a scan, for what goes in there; and where a loop goes round or ends, or a
branch is taken, for all that it has computed with, but not for what it merely loaded, such as a
tile for the next trip. In between the compiler orders the code: there a load waits only for what
its address and mask are made of. A loop around a product keeps `num_stages - 1` trips under way:
Triton pipelines those loops and no others. A load without an active lane is none.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from elip_kernels._triton import tl

STAGES = 3  # of a launch that says none, on NVIDIA
MEETS = ("create_dot", "create_histogram")


@dataclass
class Launch:
    """A launch: its arguments by their names, and how often its slowest program waits."""

    kernel: str
    arguments: dict[str, Any]
    waits: int = 0


class _Program:
    """How often a program has waited so far, `now`, and by then for what it `used`, or loaded
    `last`; `hidden` are those that a pipeline hides."""

    def __init__(self) -> None:
        self.now = self.used = self.last = self.hidden = 0
        self.has_product = [False]  # of the loops around

    def wait(self) -> None:
        self.now = max(self.now, self.used)

    def use(self, there: int, *, meets: bool = False) -> None:
        self.used = max(self.used, there)
        self.now = max(self.now, there) if meets else self.now

    def load(self, there: int) -> int:
        """-> after how many waits it is there, its address and mask being so after `there`."""
        there = 1 + max(self.now, there)
        self.last = max(self.last, there)
        return there

    def loop(self, in_flight: int, *bounds: Any) -> Iterator[int]:
        """`range` in a kernel; a loop of one trip that the compiler knows is none."""
        if len(range(*bounds)) == 1 and not any(isinstance(n, tl.tensor) for n in bounds):
            yield from range(*bounds)
            return
        self.wait()
        self.has_product.append(False)
        begin = self.now
        for index in range(*bounds):
            yield index
            self.wait()
        if self.has_product.pop():
            self.hidden += (self.now - begin) * (in_flight - 1) // in_flight


@contextmanager
def counted_waits() -> Iterator[list[Launch]]:
    """Inside, every launch appends a `Launch` to the list that is yielded."""
    with ExitStack() as stack:
        counter = _Counter(stack)
        for where, name, value in counter.patches():
            stack.enter_context(patch.object(where, name, value))
        yield counter.launches


class _Counter:
    """Follows the programs of every launch by patches of the interpreter, as it was before."""

    def __init__(self, stack: ExitStack) -> None:
        self.launches: list[Launch] = []
        self.program, self.in_flight, self.stack = _Program(), 1, stack

    def patches(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        from triton.runtime import interpreter

        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        reduction = interpreter.ReduceScanOpInterface
        operations = {n: f for n, f in vars(builder).items() if n.startswith("create_")}
        del operations["create_load"]  # which makes a masked one
        return [
            (executor, "__call__", self.launched(executor.__call__)),
            (builder, "set_grid_idx", self.next_program(builder.set_grid_idx)),
            *((builder, n, self.computed(n, f)) for n, f in operations.items()),
            (reduction, "apply", self.reduced(reduction.apply)),
            (interpreter, "_patch_lang", self.language(interpreter._patch_lang)),
        ]

    def launched(self, execute: Callable[..., None]) -> Callable[..., None]:
        def run(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.in_flight = max(1, kwargs.get("num_stages", STAGES) - 1)
            arguments = dict(zip(executor.arg_names, args, strict=False)) | kwargs
            self.launches.append(Launch(executor.fn.__name__, arguments))
            execute(executor, *args, **kwargs)
            self.end_program()

        return run

    def next_program(self, move_on: Callable[..., None]) -> Callable[..., None]:
        def run(builder: Any, *index: int) -> None:
            self.end_program()
            move_on(builder, *index)

        return run

    def end_program(self) -> None:
        launch, program = self.launches[-1], self.program
        launch.waits = max(launch.waits, program.last - program.hidden)
        self.program = _Program()

    def computed(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        """What an operation makes is there when what it is made of is; a load, one wait later."""

        def run(builder: Any, *args: Any) -> Any:
            there = max(map(_there, args), default=0)
            self.program.use(there, meets=name in MEETS)
            self.program.has_product[-1] |= name == "create_dot"
            result = operation(builder, *args)
            if name == "create_masked_load" and args[1].data.any():
                there = self.program.load(there)
            for handle in result if isinstance(result, tuple) else (result,):
                if hasattr(handle, "data"):
                    handle.there = there
            return result

        return run

    def reduced(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        def run(reduction: Any, inputs: Any) -> Any:
            if not isinstance(inputs, tuple):
                return reduction.apply((inputs,))[0]
            there = max(_there(each.handle) for each in inputs)
            self.program.use(there, meets=True)
            outputs = apply(reduction, inputs)
            for each in outputs:
                each.handle.there = there
            return outputs

        return run

    def language(self, patch_language: Callable[..., Any]) -> Callable[..., Any]:
        """Triton's own patches, and those of branches and loops in the code of a kernel."""

        def loop(*bounds: Any, **options: Any) -> Iterator[int]:
            return self.program.loop(self.in_flight, *bounds)

        def run(fn: Any, *args: Any) -> Any:
            scope = patch_language(fn, *args)
            to_bool = tl.tensor.__bool__

            def branch(tensor: Any) -> bool:
                if not sys._getframe(1).f_globals["__name__"].startswith("triton."):
                    self.program.use(_there(tensor.handle))
                    self.program.wait()
                return to_bool(tensor)

            tl.tensor.__bool__, tl.range = branch, loop
            if fn.__globals__.setdefault("range", loop) is loop:
                self.stack.callback(fn.__globals__.pop, "range", None)
            return scope

        return run


def _there(value: Any) -> int:
    """After how many waits a value is there."""
    return getattr(value, "there", 0)
