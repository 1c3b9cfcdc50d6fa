"""Token reduction in the Trainer of transformers, as a callback."""

from typing import Any

from torch import nn

from elip_models.api import AnyStrategy, is_reduced, reduce_, strategies_in, unreduce_
from elip_models.strategies.strategy import Strategy
from elip_models.validation import Count, PositiveShare, check, require_extra

with require_extra("elip_models.integrations"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ReductionCallback(TrainerCallback):
    """A callback that reduces the Trainer's model by `reduce_`, and can end training dense.

        Trainer(model, args, callbacks=[ReductionCallback("merge", until=0.9)], ..)

    The state depends only on the Trainer's step count, so that a resumed run continues identically.
    An evaluation runs with the reduction of the step before it. After training the model keeps the
    state of the last step. With the Trainer's `torch_compile`, the model is compiled again when the
    reduction changes.
    """

    def __init__(
        self,
        strategy: str | AnyStrategy | None = None,
        *,
        until: Count | PositiveShare | None = None,
        **options: Any,
    ) -> None:
        """Store the reduction and the step at which it ends.

        Args:
            strategy: As in `reduce_`, also for a language model. A `PatchDropout(.., until=..)` is
                resolved for each step. None without options: the present reduction of the model,
                all its strategies, or the default one.
            until: The first dense step, counted in optimiser steps from 0. A float is a share of
                all steps of the run: with 0.9 the last tenth is dense. None: no step is dense.
            **options: As in `reduce_`.

        Raises:
            TypeError, ValueError: An invalid `until`. Invalid arguments of `reduce_` raise when
                training begins.
        """
        self.strategies = () if strategy is None else (strategy,)
        self.until = check("until", until, Count | PositiveShare | None)
        self.options = options

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **others: Any,
    ) -> None:
        """Reduce the model, or restore the dense one, as the coming optimiser step requires."""
        until = self.until
        if isinstance(until, float):
            until = round(until * state.max_steps)
        if until is not None and state.global_step >= until:
            unreduce_(model)
            return
        if not self.strategies:
            self._note_strategies(model)
        for strategy in self.strategies:
            if isinstance(strategy, Strategy):
                strategy = strategy.for_step(state.global_step)
            reduce_(model, strategy, **self.options)

    def _note_strategies(self, model: nn.Module) -> None:
        """Note the strategies of the model once, before `unreduce_` removes them."""
        if self.options or not is_reduced(model):
            reduce_(model, **self.options)
        self.strategies, self.options = strategies_in(model), {}

    on_train_begin = on_step_begin  # for an evaluation before the first step
