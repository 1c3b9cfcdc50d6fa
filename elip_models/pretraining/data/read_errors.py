"""Unreadable samples: counting, reporting, and an error when there are too many."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from elip_models.images import SampleError
from elip_models.pretraining.data.samples import ExampleSource, Source
from elip_models.validation import DataError

_MIN_SAMPLES = 100  # the share of fewer samples is too uncertain to stop a run
_EXAMPLES = 5

Skipped = tuple[str, str] | tuple[str, str, int]
"""Id of a sample and the reason why it cannot be read, with its index in a source that has one."""


@dataclass
class SkipReport:
    """Count of the samples that could not be read, among all samples tried.

    A sample with an index is counted once, however often it is tried. Two samples are different
    even if their ids are equal.

    Args:
        max_bad_share: Largest allowed share of unreadable samples, in [0, 1].
        length: Number of samples of the source. Later epochs then do not dilute the share, and a
            source of fewer than 100 samples is checked after its first pass.
        what: Noun for the counted things in messages.

    Attributes:
        seen: Number of samples tried.
        reasons: Id of each unreadable sample and the reason, in the order of reading.
    """

    max_bad_share: float = 0.05
    _: KW_ONLY
    length: int | None = None
    what: str = "samples"
    seen: int = field(default=0, init=False)
    reasons: list[tuple[str, str]] = field(default_factory=list, init=False)
    _indices: set[int] = field(default_factory=set, init=False)

    @property
    def share(self) -> float:
        """Unreadable samples divided by samples seen; later epochs count once."""
        seen = self.seen if self.length is None else min(self.seen, self.length)
        return len(self.reasons) / max(1, seen)

    def update(self, skipped: Iterable[Skipped], seen: int) -> None:
        """Add unreadable samples among `seen` further ones.

        Raises DataError if the share is above `max_bad_share`, once 100 samples were seen.
        """
        self.record(skipped, seen)
        needed = _MIN_SAMPLES if self.length is None else min(_MIN_SAMPLES, self.length)
        if self.seen >= needed and self.share > self.max_bad_share:
            raise DataError(
                f"{self.summary()} At most {self.max_bad_share:.1%} may be unreadable; "
                "repair the data, or raise max_bad_share."
            )

    def record(self, skipped: Iterable[Skipped], seen: int) -> None:
        """Add samples as `update` does, without checking the share."""
        self.seen += seen
        for sample_id, reason, *index in skipped:
            if self._indices.isdisjoint(index):
                self._indices.update(index)
                self.reasons.append((sample_id, reason))

    def summary(self) -> str:
        """Return one sentence with the count, the share, and up to five examples with reasons."""
        if not self.reasons:
            return f"All of {self.seen} {self.what} could be read."
        examples = self.reasons[:_EXAMPLES]
        listed = "; ".join(f"{name:.200} ({reason:.300})" for name, reason in examples)
        more = ", among them" if len(self.reasons) > len(examples) else ""
        return (
            f"{len(self.reasons)} of {self.seen} {self.what} ({self.share:.1%}) could not be "
            f"read{more}: {listed}."
        )


def check_source(source: Source | ExampleSource, limit: int | None = None) -> SkipReport:
    """Read every sample, or the first `limit`, and report those that cannot be read."""
    report = SkipReport(length=len(source))
    for index in range(len(source))[:limit]:
        try:
            source[index]
        except SampleError as error:
            report.record([(error.id, error.reason)], 0)
        report.seen += 1
    return report


def readable_samples(source: Source | ExampleSource, indices: Iterable[int]) -> Iterator[Any]:
    """Yield the samples, or examples, at `indices` that can be read."""
    for index in indices:
        with suppress(SampleError):
            yield source[index]
