"""Work and warnings that one forward does and the next need not repeat."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def once(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, run once for equal arguments; the compiler, which warns of caches, traces it."""
    cached = cache(function)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return (function if torch.compiler.is_compiling() else cached)(*args, **kwargs)

    return run


class SlowScorerWarning(UserWarning):
    """In inference, choosing the tokens costs more than dropping them saves."""


class UnguidedWarning(UserWarning):
    """No text guides a reduction: it goes by the image alone, or there is none."""


@contextmanager
def deliberately_slow() -> Iterator[None]:
    """Scorers that cost more than they save are run on purpose inside: no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowScorerWarning)
        yield


@cache
def warn_once(message: str, category: type[Warning], *, stacklevel: int = 3) -> None:
    """Warn, unless the same was said before."""
    warnings.warn(message, category, stacklevel=stacklevel)
