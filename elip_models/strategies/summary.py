"""The summary of a reduced model: tokens per block, and FLOPs against dense."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from elip_models.strategies import flops
from elip_models.strategies.dense import Dense
from elip_models.strategies.strategy import Strategy, TokenCounts
from elip_models.towers import Tower


@dataclass(frozen=True)
class Summary:
    """The reduction of an image tower, independent of its weights; `print` shows all of it.

    strategy: the strategy with its settings; `Dense()` if nothing is reduced.
    tokens: in each block, the tokens in its attention and in its MLP, when the tower is reduced.
    dense_tokens: the tokens in each block of the dense tower.
    keep: the mean share of tokens over the blocks.
    forward_flops, training_flops: the image tower's FLOPs against dense, scorer included.
    guided_by: what selects the tokens, in words; None if no text can guide the strategy.
    is_part: the tower is a part of the model that was reduced, beside a text encoder for example.
    whole_output: how to get all tokens of a model that returns those of the last block; None if it
        returns others, or if all of them are there.
    """

    strategy: Strategy
    tokens: tuple[TokenCounts, ...]
    dense_tokens: int
    keep: float
    forward_flops: float
    training_flops: float
    guided_by: str | None
    is_part: bool = False
    whole_output: str | None = None

    @classmethod
    def of(cls, tower: Tower, strategy: Strategy | None, *, is_whole: bool) -> "Summary":
        """Summarize a tower under `strategy`.

        Args:
            tower: the image tower.
            strategy: None means dense.
            is_whole: the tower belongs to a whole language-image model, which has texts.
        """
        strategy, size = strategy or Dense(), tower.size
        tokens = strategy.token_counts(size)
        is_shorter = tokens[-1].mlp < size.num_tokens and not tower.pools
        return cls(
            strategy,
            tokens,
            size.num_tokens,
            flops.kept_share(strategy, size),
            flops.inference_ratio(strategy, size),
            flops.training_ratio(strategy, size),
            _guided_by(strategy, is_whole) if strategy.is_guided else None,
            is_whole or tower.is_part,
            tower.whole_output if is_shorter and not is_whole else None,
        )

    @property
    def line(self) -> str:
        """Return name, tokens and FLOPs in one line, and whether they are of the image tower."""
        return f"image tower: {self.figures}" if self.is_part else self.figures

    @property
    def figures(self) -> str:
        """Return name, tokens and FLOPs in one line."""
        ratio = f"{self.forward_flops:.2f} of dense FLOPs"
        return f"{self.strategy.name}: {self._counts} tokens{self._when}, {ratio}"

    @property
    def _counts(self) -> str:
        """Return the tokens in the attention of each block."""
        return runs(layer.attention for layer in self.tokens)

    @property
    def _when(self) -> str:
        """Return when the tokens are reduced, if it is not always."""
        return " in training" if self.strategy.training_only else ""

    def __str__(self) -> str:
        """Return the summary as a table of two columns."""
        if isinstance(self.strategy, Dense):
            whose = " in the image tower" if self.is_part else ""
            return f"dense: {self._counts} tokens{whose}, not reduced"
        last = self.tokens[-1]
        after = f", {last.mlp} after the last" if last.mlp != last.attention else ""
        kept = f"{self.keep:.3f} of {self.dense_tokens} tokens{self._when}, mean over the layers"
        lines = [
            ("strategy", str(self.strategy)),
            ("tokens per layer", f"{self._counts}{after}{self._when}"),
            ("kept", kept),
            ("FLOPs", f"{self.forward_flops:.3f} of dense in inference"),
            ("", f"{self.training_flops:.3f} in training, scorer included"),
            ("guided by", self.guided_by or "nothing"),
        ]
        if self.is_part:
            lines.insert(1, ("figures", "of the image tower; the rest of the model is not reduced"))
        if self.whole_output is not None:
            returned = (
                f"{self.tokens[-1].mlp} of {self.dense_tokens} tokens, whose mean is another one"
            )
            lines.append(("output", f"{returned}; {self.whole_output}"))
        return "\n".join(f"{name:<18}{value}" for name, value in lines)


def _guided_by(strategy: Strategy, is_whole: bool) -> str:
    paired = "its own texts, in calls about pairs"
    text = paired if is_whole else "guidance(model, text_cls)"
    without = getattr(strategy, "without_text", "dense")
    return f"{text}; without it {'the image alone' if without == 'vision' else 'not reduced'}"


def runs(counts: Iterable[int]) -> str:
    """Return counts as '2×197 2×178 6×129 2×80', or the first two and the last of many runs."""
    lengths = [(len(list(same)), count) for count, same in groupby(counts)]
    if len(lengths) > 6:
        return f"{lengths[0][1]} {lengths[1][1]} .. {lengths[-1][1]}"
    return " ".join(f"{times}×{count}" for times, count in lengths)
