"""Warnings of reduced models, each given once."""

import warnings
from contextlib import AbstractContextManager
from functools import cache
from typing import NamedTuple

from elip_models.call_context import items, within


class SlowScorerWarning(UserWarning):
    """In inference, choosing the tokens costs more than dropping them saves."""


class UnguidedWarning(UserWarning):
    """No text guides a reduction: the image alone selects, or nothing is reduced."""


class IgnoredWarning(NamedTuple):
    """A warning that is not given in this thread or task."""

    category: type[Warning]


def ignoring(category: type[Warning]) -> AbstractContextManager[None]:
    """Ignore a warning of this file inside, in this thread or task.

    `SlowScorerWarning` is ignored where slow scorers run on purpose, and `UnguidedWarning` where no
    text guides on purpose. `warnings.catch_warnings` would change the filters of all threads.
    """
    return within(IgnoredWarning(category))


def warn_once(message: str, category: type[Warning], *, stacklevel: int = 3) -> None:
    """Warn, unless the same message was given before or the warning is ignored."""
    if all(ignored.category is not category for ignored in items(IgnoredWarning)):
        _warn(message, category, stacklevel + 1)


@cache
def _warn(message: str, category: type[Warning], stacklevel: int) -> None:
    warnings.warn(message, category, stacklevel=stacklevel)


warn_again = _warn.cache_clear
"""Forget which messages were given."""
