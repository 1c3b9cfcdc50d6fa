"""What becomes of the tokens that a reduction drops."""

from typing import Any, Literal, get_args

from elip_models.validation import shortened

Merge = Literal["one", "none", "nearest"]
"""What becomes of the tokens that a stage drops: they are merged into one appended token, they are
discarded, or each is merged into the kept token with the most similar key."""


def check_merge(merge: Any) -> None:
    """Raise TypeError or ValueError unless `merge` is a word of `Merge`."""
    if not isinstance(merge, str) or merge not in get_args(Merge):
        error = ValueError if isinstance(merge, str) else TypeError
        advice = f"; pass {'one' if merge else 'none'!r}" if isinstance(merge, bool) else ""
        raise error(f"merge: expected 'one', 'none' or 'nearest', got {shortened(merge)}{advice}")
