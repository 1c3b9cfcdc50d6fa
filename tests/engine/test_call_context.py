"""The items of a thread or task, and the one context variable that has them."""

import contextvars
from pathlib import Path
from typing import NamedTuple

import elip_models
from elip_models.call_context import add, items, latest, put, remove, take, within


class Number(NamedTuple):
    value: int


class Word(NamedTuple):
    value: str


def in_own_context(function):
    return contextvars.copy_context().run(function)


def test_the_package_has_one_context_variable():
    files = Path(elip_models.__file__).parent.rglob("*.py")
    makers = [path.name for path in files if " ContextVar(" in path.read_text(encoding="utf-8")]
    assert makers == ["call_context.py"]


def test_items_of_a_class_are_found_put_and_taken_apart_from_others():
    def run():
        add(Word("a"))
        put(Number(1))
        put(Number(2))  # in place of the first
        assert items(Number) == [Number(2)] and latest(Word) == Word("a")
        assert take(Number) == Number(2) and take(Number) is None
        remove(lambda item: item == Word("a"))
        assert latest(Word) is None

    in_own_context(run)


def test_an_item_ends_with_its_block_in_another_context_too():
    def run():
        block = within(Number(1))
        block.__enter__()
        assert items(Number) == [Number(1)]
        in_own_context(lambda: block.__exit__(None, None, None))
        assert items(Number) == []

    in_own_context(run)
