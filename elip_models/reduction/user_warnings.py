"""Warnings of reduced models, each given once."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


class SlowScorerWarning(UserWarning):
    """In inference, choosing the tokens costs more than dropping them saves."""


class UnguidedWarning(UserWarning):
    """No text guides a reduction: the image alone selects, or nothing is reduced."""


@contextmanager
def ignore_slow_scorers() -> Iterator[None]:
    """Ignore `SlowScorerWarning` inside, where slow scorers run on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowScorerWarning)
        yield


@cache
def warn_once(message: str, category: type[Warning], *, stacklevel: int = 3) -> None:
    """Warn, unless the same message was given before."""
    warnings.warn(message, category, stacklevel=stacklevel)
