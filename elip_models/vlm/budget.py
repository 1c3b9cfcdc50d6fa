"""How many tokens of each image stay: by the strategy, or by a budget in place of its `keep`.

keep=256           256 tokens of each image
keep=[64, 0.5]     one for each image of the batch, in the order of the prompts
total=1024         for all images and tiles of a prompt together, in proportion to their tokens
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from elip_models.call_context import items
from elip_models.vlm.clips import TokenGroup

Keep = float | int


class Budget(NamedTuple):
    """The budget of the model with these hooks; either `keep` or `total` is None."""

    hooks: object
    keep: Keep | tuple[Keep, ...] | None
    total: int | None

    @property
    def keep_of_one(self) -> Keep:
        """Return the `keep` of the first image, for a prompt without others."""
        if self.keep is None:
            return self.total
        return self.keep[0] if isinstance(self.keep, tuple) else self.keep

    def __str__(self) -> str:
        """Return the arguments of `budget`, and the image whose figures `keep_of_one` gives."""
        if self.keep is None:
            return f"total={self.total} for a prompt, here with one image"
        if isinstance(self.keep, tuple):
            return f"keep={list(self.keep)}, here the first"
        return f"keep={self.keep}"


class Image(NamedTuple):
    """An image of a batch, of which at least `least` tokens stay; see `TokenGroup`."""

    row: int
    start: int
    length: int
    least: int
    group: int
    index: int


Count = Callable[[int, Keep | None], int]
"""Returns how many of so many tokens stay by a `keep`, or by that of the strategy for None."""


def budget_of(hooks: object) -> Budget | None:
    """Return the most recent budget in this thread or task of the model with these hooks."""
    return next((b for b in reversed(items(Budget)) if b.hooks is hooks), None)


def parts(
    groups: Iterable[TokenGroup], count: Count, budget: Budget | None, sequences: Tensor
) -> Iterator[tuple[TokenGroup, list[int], int]]:
    """Yield images of a group of which as many tokens stay.

    Args:
        groups: the images of a batch.
        count: the strategy's.
        budget: in place of the strategy's own `keep`, or None.
        sequences: (B, N), equal for the beams of a prompt.

    Yields:
        A group, the indices of some of its images, and how many tokens of each of these stay.

    Raises:
        ValueError: a budget for another number of images, or of less than a token for each.
    """
    groups = list(groups)
    for group, numbers in zip(groups, _numbers(groups, count, budget, sequences), strict=True):
        for number in sorted(set(numbers)):
            yield group, [i for i, other in enumerate(numbers) if other == number], number


def _numbers(
    groups: Sequence[TokenGroup], count: Count, budget: Budget | None, sequences: Tensor
) -> list[list[int]]:
    """Return how many tokens of each image stay, for each group."""
    keep = None if budget is None else budget.keep
    if budget is None or (budget.total is None and not isinstance(keep, tuple)):
        return [[max(count(g.length, keep), len(g.always))] * len(g.rows) for g in groups]
    images = sorted(
        Image(row, start, group.length, len(group.always), number, i)
        for number, group in enumerate(groups)
        for i, (row, start) in enumerate(
            zip(group.rows[:, 0].tolist(), group.positions[:, 0].tolist(), strict=True)
        )
    )
    rows = [list(row) for _, row in groupby(images, lambda image: image.row)]
    if budget.total is None:
        keeps = _keeps(rows, keep, sequences)
    else:
        keeps = [share for row in rows for share in _shares(row, budget.total)]
    numbers = [[0] * len(group.rows) for group in groups]
    for image, own in zip(images, keeps, strict=True):
        numbers[image.group][image.index] = max(count(image.length, own), image.least)
    return numbers


def _keeps(rows: list[list[Image]], keep: tuple[Keep, ...], sequences: Tensor) -> list[Keep]:
    """Return the `keep` of each image; beams repeat the rows of a prompt."""
    images = sum(map(len, rows))
    beams = images // max(len(keep), 1)
    repeats = sequences.unique_consecutive(dim=0, return_counts=True)[1]
    is_fit = beams and sum(map(len, rows[::beams])) == len(keep)
    if not is_fit or bool((repeats % beams).any()):
        raise ValueError(
            f"keep: expected one for each of the {images} images of the batch, got {len(keep)}; "
            "pass a single one for all images, or `total` for a prompt"
        )
    own = iter(keep)
    prompts = [[next(own) for _ in row] for row in rows[::beams]]
    return [value for prompt in prompts for _ in range(beams) for value in prompt]


def _shares(images: list[Image], total: int) -> list[int]:
    """Divide `total` among the images of a prompt, in proportion to their tokens.

    Fractions go to the largest remainders, the first image first.
    """
    least = sum(image.least for image in images)
    if total < least:
        raise ValueError(
            f"total: expected at least {least}, a token for each image or frame of the prompt, got "
            f"{total}; pass a larger total"
        )
    spare, missing = total - least, sum(image.length for image in images) - least
    if spare >= missing:
        return [image.length for image in images]
    shares = [divmod(spare * (image.length - image.least), missing) for image in images]
    rest = spare - sum(whole for whole, _ in shares)
    order = sorted(range(len(images)), key=lambda i: -shares[i][1])
    for i in order[:rest]:
        shares[i] = shares[i][0] + 1, 0
    return [image.least + whole for image, (whole, _) in zip(images, shares, strict=True)]
