"""The search for settings within the tolerance, on the images that choose."""

from collections.abc import Callable, Iterable, Sequence

from elip_models.calibration.candidates import Candidate
from elip_models.strategies.flops import TOLERANCE


class Search:
    """Tries settings that may be cheaper than the cheapest one within the tolerance so far.

    Bisection finds the lowest share of a strategy that is within, which assumes that the loss rises
    as the FLOPs fall.

    Attributes:
        tried: the settings that were measured, in their order.
        within: those within the tolerance.

    Args:
        is_within: measures a setting and returns whether it is within the tolerance.
        is_promising: returns whether a setting is worth measuring; None: each is.
        every: try every setting, without the search.
    """

    def __init__(
        self,
        is_within: Callable[[Candidate], bool],
        *,
        is_promising: Callable[[Candidate], bool] | None = None,
        every: bool = False,
    ) -> None:
        self._is_within, self._is_promising, self.every = is_within, is_promising, every
        self.tried: list[Candidate] = []
        self.within: list[Candidate] = []

    def add_all(self, strategies: Iterable[Sequence[Candidate]]) -> None:
        """Try the settings of each strategy."""
        for settings in strategies:
            self.add(settings)

    def add(self, settings: Sequence[Candidate]) -> None:
        """Try the settings of a strategy, whose FLOPs fall."""
        if self.every:
            for setting in settings:
                self._passes(setting)
            return
        best = min((setting.flops for setting in self.within), default=1.0)
        cheaper = [setting for setting in settings if setting.flops < best - TOLERANCE]
        if not cheaper or not self._passes(cheaper[0]):
            return
        low, high = 0, len(cheaper)  # within; not within, or not known
        while high - low > 1:
            middle = (low + high) // 2
            if self._passes(cheaper[middle]):
                low = middle
            else:
                high = middle

    def _passes(self, setting: Candidate) -> bool:
        """Return whether a setting is within the tolerance; one without promise is not measured."""
        if self._is_promising is not None and not self._is_promising(setting):
            return False
        is_within = self._is_within(setting)
        self.tried.append(setting)
        if is_within:
            self.within.append(setting)
        return is_within
