"""How a model is reduced, in numbers that a person reads: tokens a block, FLOPs against dense."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from elip_models.reduction import flops
from elip_models.reduction.strategies.dense import Dense
from elip_models.reduction.strategy import Layer, Strategy
from elip_models.towers import Tower


@dataclass(frozen=True)
class Summary:
    """How an image tower is reduced, whatever its weights; `print` shows all of it.

    strategy: with its settings; `Dense()` where nothing is reduced.
    tokens: in each block, those that go through its attention and through its MLP, where it
        reduces.
    dense_tokens: in each block of the tower as it is.
    keep: the mean share of tokens over the blocks.
    forward_flops, training_flops: of the image tower against dense, the scorer included.
    guided_by: whose attention chooses, in words; None where nothing is guided.
    """

    strategy: Strategy
    tokens: tuple[Layer, ...]
    dense_tokens: int
    keep: float
    forward_flops: float
    training_flops: float
    guided_by: str | None

    @classmethod
    def of(cls, tower: Tower, strategy: Strategy | None, *, is_whole: bool) -> "Summary":
        """The summary of a tower under `strategy`; None is dense. is_whole: the model has texts."""
        strategy, size = strategy or Dense(), tower.size
        return cls(
            strategy,
            strategy.token_counts(size),
            size.num_tokens,
            flops.kept_share(strategy, size),
            flops.inference_ratio(strategy, size),
            flops.training_ratio(strategy, size),
            _guided_by(strategy, is_whole) if strategy.is_guided else None,
        )

    @property
    def line(self) -> str:
        """All that matters, in one line."""
        attention = runs(layer.attention for layer in self.tokens)
        return f"{self.strategy.name}: {attention} tokens, {self.forward_flops:.2f} of dense FLOPs"

    def __str__(self) -> str:
        if isinstance(self.strategy, Dense):
            return f"dense: {runs(layer.attention for layer in self.tokens)} tokens, not reduced"
        lines = [
            ("strategy", str(self.strategy)),
            ("tokens a layer", runs(layer.attention for layer in self.tokens)),
            ("kept", f"{self.keep:.3f} of {self.dense_tokens} tokens, mean over the layers"),
            ("FLOPs", f"{self.forward_flops:.3f} of dense in inference"),
            ("", f"{self.training_flops:.3f} in training, scorer included"),
            ("guided by", self.guided_by or "nothing"),
        ]
        return "\n".join(f"{name:<16}{said}" for name, said in lines)


def _guided_by(strategy: Strategy, is_whole: bool) -> str:
    text = "its own text" if is_whole else "guidance(model, text_cls)"
    without = getattr(strategy, "without_text", "dense")
    return f"{text}; without it {'the image alone' if without == 'vision' else 'not reduced'}"


def runs(counts: Iterable[int]) -> str:
    """Write counts as '2×197 2×178 6×129 2×80'; of many different ones, the first two and the
    last.
    """
    found = [(len(list(same)), count) for count, same in groupby(counts)]
    if len(found) > 6:
        return f"{found[0][1]} {found[1][1]} .. {found[-1][1]}"
    return " ".join(f"{times}×{count}" for times, count in found)
