"""The search for settings within the tolerance, on the images that choose."""

from collections.abc import Callable, Sequence

from elip_models.calibration.candidates import Candidate
from elip_models.strategies.flops import TOLERANCE


class Search:
    """Tries settings that may be cheaper than the cheapest one within the tolerance so far.

    Bisection finds the lowest share of a strategy that is within, which assumes that the loss rises
    as the FLOPs fall.

    Attributes:
        tried: the settings, in the order in which they were tried.
        within: those within the tolerance.

    Args:
        is_within: measures a setting and returns whether it is within the tolerance.
        every: try every setting, without the search.
    """

    def __init__(self, is_within: Callable[[Candidate], bool], *, every: bool) -> None:
        self._measure, self.every = is_within, every
        self.tried: list[Candidate] = []
        self.within: list[Candidate] = []

    def add(self, settings: Sequence[Candidate]) -> None:
        """Try the settings of a strategy, whose FLOPs fall."""
        if self.every:
            for setting in settings:
                self._is_within(setting)
            return
        best = min((setting.flops for setting in self.within), default=1.0)
        cheaper = [setting for setting in settings if setting.flops < best - TOLERANCE]
        if not cheaper or not self._is_within(cheaper[0]):
            return
        low, high = 0, len(cheaper)  # within; not within, or not known
        while high - low > 1:
            middle = (low + high) // 2
            if self._is_within(cheaper[middle]):
                low = middle
            else:
                high = middle

    def _is_within(self, setting: Candidate) -> bool:
        is_within = self._measure(setting)
        self.tried.append(setting)
        if is_within:
            self.within.append(setting)
        return is_within
