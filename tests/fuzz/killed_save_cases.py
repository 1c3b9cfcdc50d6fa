"""Saves over others that end at one of their file operations."""

from tests.fuzz.harness import Loss, kind
from tests.killed_saves import PAIRS, Pair


@kind(share=1)
def killed_saves(folder, rng):
    try:
        Pair(folder, *rng.choice(PAIRS)).kill(rng.randrange(50))
    except AssertionError as error:
        raise Loss(str(error)) from error
    return "read"
