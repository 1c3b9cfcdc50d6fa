"""Token reduction in the Trainer of transformers, which it takes as one more callback."""

from typing import Any

from torch import nn

from elip_models.reduction.patch import is_reduced, reduce_, reduction_summary, unreduce_
from elip_models.reduction.strategy import Strategy
from elip_models.validation import Count, PositiveShare, check, require_extra

with require_extra("elip_models.training"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ReductionCallback(TrainerCallback):
    """Reduces the Trainer's model by `reduce_`, and gives it all tokens again towards the end.

        Trainer(model, args, callbacks=[ReductionCallback("tome", until=0.9)], ..)

    The step that the Trainer counts decides, so that a resumed run goes on as it would have. An
    evaluation sees the model as the step before it did; after training it stays as the last step
    left it. The model may be compiled by the Trainer's `torch_compile`, which compiles again where
    the reduction changes.
    """

    def __init__(
        self,
        strategy: str | Strategy | None = None,
        *,
        until: Count | PositiveShare | None = None,
        **options: Any,
    ) -> None:
        """Args:
            strategy: as of `reduce_`; of `PatchDropout(.., until=..)` what it is in each step. None
                and no options: what the model is reduced by already, where it is.
            until: the first step that is dense, counted in optimiser steps from 0; a float is a
                share of all steps of the run (0.9: the last tenth is dense). None: none is.
            options: as of `reduce_`.

        Raises:
            TypeError, ValueError: `until` is neither. What `reduce_` refuses, it refuses when
                training begins.
        """
        check("until", until, Count | PositiveShare | None)
        self.strategy = strategy
        self.until = until
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
        """Before an optimiser step: changes the model where it is not yet as this step has it."""
        until = self.until
        if isinstance(until, float):
            until = round(until * state.max_steps)
        if until is not None and state.global_step >= until:
            unreduce_(model)
            return
        if self.strategy is None:
            self._choose(model)
        strategy = self.strategy
        if isinstance(strategy, Strategy):
            strategy = strategy.at(state.global_step)
        reduce_(model, strategy=strategy, **self.options)

    def _choose(self, model: nn.Module) -> None:
        """Once, since a model that is reduced no longer says what a saved one was."""
        if self.options or not is_reduced(model):
            reduce_(model, **self.options)
        self.strategy, self.options = reduction_summary(model).strategy, {}

    on_train_begin = on_step_begin  # for an evaluation before the first step
