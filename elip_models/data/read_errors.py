"""Samples that cannot be read: counted, reported, and an error where they are too many."""

from collections.abc import Iterable, Sequence
from typing import Self

from elip_models.data.sample import SampleError, Source
from elip_models.validation import Count, PositiveInt, Share, check

DEFAULT_MAX_BAD_SHARE = 0.05

# Fewer samples say too little about the share.
_JUDGED_FROM = 100
_EXAMPLES = 5


class DataError(Exception):
    """So much of the data cannot be read that the run should not go on."""


class SkipReport:
    """Counts the distinct samples that could not be read, among all that were tried.

    `length` is the number of samples of the source: repeats of later epochs then do not dilute the
    share, and a source of fewer than 100 is judged once as many samples as it has were seen.
    `what` is what they are called.
    """

    def __init__(
        self,
        max_bad_share: float = DEFAULT_MAX_BAD_SHARE,
        *,
        length: int | None = None,
        what: str = "samples",
    ) -> None:
        check("max_bad_share", max_bad_share, Share)
        check("length", length, Count | None)
        self.max_bad_share = max_bad_share
        self.length = length
        self.what = what
        self.seen = 0
        self.reasons: dict[str, str] = {}

    @classmethod
    def of(cls, skipped: Sequence[tuple[str, str]]) -> Self:
        """One of samples of which none could be read."""
        report = cls(0.0)
        report.record(skipped, len(skipped))
        return report

    @property
    def share(self) -> float:
        """Distinct unreadable samples over samples seen, repeats of later epochs not counted."""
        seen = self.seen if self.length is None else min(self.seen, self.length)
        return len(self.reasons) / max(1, seen)

    def update(self, skipped: Iterable[tuple[str, str]], seen: int) -> None:
        """Add the (id, reason) `skipped` among `seen` further samples.

        Raises DataError once the share is above `max_bad_share`, from 100 samples on.
        """
        self.record(skipped, seen)
        judged_from = _JUDGED_FROM if self.length is None else min(_JUDGED_FROM, self.length)
        if self.seen >= judged_from and self.share > self.max_bad_share:
            raise DataError(
                f"{self.summary()} At most {self.max_bad_share:.1%} may be unreadable; "
                "repair the data, or raise max_bad_share."
            )

    def record(self, skipped: Iterable[tuple[str, str]], seen: int) -> None:
        """As `update`, without judging."""
        self.seen += seen
        for sample_id, reason in skipped:
            self.reasons.setdefault(sample_id, reason)

    def summary(self) -> str:
        """One sentence: count, share, and up to five examples with their reasons."""
        if not self.reasons:
            return f"All of {self.seen} {self.what} could be read."
        examples = list(self.reasons.items())[:_EXAMPLES]
        listed = "; ".join(f"{sample_id} ({reason})" for sample_id, reason in examples)
        more = ", among them" if len(self.reasons) > len(examples) else ""
        return (
            f"{len(self.reasons)} of {self.seen} {self.what} ({self.share:.1%}) could not be read"
            f"{more}: {listed}."
        )


def check_source(source: Source, limit: int | None = None) -> SkipReport:
    """Read every sample, or the first `limit`, and report those that cannot be read."""
    check("limit", limit, PositiveInt | None)
    report = SkipReport(length=len(source))
    for index in range(len(source) if limit is None else min(limit, len(source))):
        skipped = []
        try:
            source[index]
        except SampleError as error:
            skipped.append((error.id, error.reason))
        report.record(skipped, 1)
    return report
